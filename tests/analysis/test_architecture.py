"""Which network a file holds: every kind of foreign file is recognised without a config."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from maskfeat.analysis.architecture import build_recognised, recognise
from maskfeat.analysis.foreign import BACKBONE, CLASSIFIER, PRETRAINED
from maskfeat.config import dump_config, load_config
from maskfeat.errors import UserError
from tests.analysis.upstream import (
    as_meta,
    mae_file,
    mfm_vit_state,
    resnet_state,
    timm_vit,
    training_script,
)
from tests.golden.golden import load_golden
from tests.small import MFM_PT, MFM_RECIPES, MVIT_FT, MVIT_PT, RECIPES, VIT_PT

MANIFEST = load_golden("state_dict_manifest")
GREY, COLOUR = [0.4] * 3, [0.485, 0.456, 0.406]


def shapes(cfg_or_found: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        objective = build_recognised(cfg_or_found)
    return {name: tuple(value.shape) for name, value in objective.released_state().items()}


@pytest.mark.parametrize("name", MANIFEST)
def test_released_files_are_their_recipes(name: str) -> None:
    """Every key, from names and shapes alone, and every name and shape of the network."""
    found = recognise(as_meta(MANIFEST[name]))
    assert found.recipe == f"masked_ssl/{name}" and not found.changed
    assert found.kind == (CLASSIFIER if name.endswith("FT") else PRETRAINED)
    assert shapes(found) == {parameter: tuple(shape) for parameter, shape in MANIFEST[name].items()}


@pytest.mark.parametrize(
    "path, opts",
    [
        (RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", MVIT_PT),
        (RECIPES / "k400_MVITv2_S_16x4_FT.yaml", MVIT_FT),
        (RECIPES / "k400_MVITv2_S_16x4_FT.yaml", ["DATA.TRAIN_CROP_SIZE", "160", "DATA.TEST_CROP_SIZE", "160"]),
        (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", [*VIT_PT, "MVIT.EMBED_DIM", "128", "MASK.HOG_CELL", "4"]),
        (RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", ["MVIT.QKV_BIAS", "False", "MVIT.MLP_RATIO", "2.0"]),
        (RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", ["MVIT.CLS_EMBED_ON", "False", "MODEL.NUM_CLASSES", "5"]),
        (RECIPES.parent / "shapes" / "shapes_MVITv2_MaskFeat_PT.yaml", []),
        (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", MFM_PT[-8:-6]),
        (MFM_RECIPES / "in1k_VIT_B_MFM_PT.yaml", ["DATA.TRAIN_CROP_SIZE", "32", "MFM.RADIUS", "9"]),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_networks_of_other_sizes(path: Path, opts: list[str]) -> None:
    cfg = load_config(path, opts)
    with torch.device("meta"):
        state = build_recognised(recognise({"model_state": {"a": torch.zeros(1)}}, cfg)).released_state()
    found = recognise({"model_state": state})
    assert shapes(found) == {name: tuple(value.shape) for name, value in state.items()}
    for key in ("DEPTH", "EMBED_DIM", "NUM_HEADS", "CLS_EMBED_ON", "DIM_MUL", "HEAD_MUL", "PATCH_STRIDE"):
        if cfg.MODEL.ARCH != "resnet":
            assert found.cfg.MVIT[key] == cfg.MVIT[key], key
    if cfg.MODEL.ARCH != "resnet":
        assert found.cfg.DATA.TRAIN_CROP_SIZE == cfg.DATA.TRAIN_CROP_SIZE


FOREIGN: dict[str, tuple[Any, str, str, list[float], dict[str, Any]]] = {
    "timm": (lambda: timm_vit().state_dict(), CLASSIFIER, "timm", COLOUR, {"MVIT.USE_MEAN_POOLING": False}),
    "timm mean": (
        lambda: timm_vit(global_pool="avg").state_dict(), CLASSIFIER, "timm", COLOUR, {"MVIT.USE_MEAN_POOLING": True}
    ),
    "timm backbone": (lambda: timm_vit(num_classes=0).state_dict(), BACKBONE, "timm", COLOUR, {"MVIT.DEPTH": 3}),
    "MAE": (mae_file, BACKBONE, "MAE", COLOUR, {"MVIT.EMBED_DIM": 128}),
    "MAE fine-tuned": (
        lambda: training_script(timm_vit(global_pool="avg").state_dict()), CLASSIFIER, "MAE", COLOUR,
        {"MVIT.USE_MEAN_POOLING": True, "MODEL.NUM_CLASSES": 7},
    ),
    "MFM's paper, ViT": (
        lambda: {"model": mfm_vit_state(), "config": {}}, PRETRAINED, "MFM", COLOUR, {"MFM.TARGET_CHANNELS": 3}
    ),
    "MFM's paper, ViT without a norm": (
        lambda: {"model": mfm_vit_state(norm=False)}, BACKBONE, "MFM's paper", COLOUR, {"MVIT.DEPTH": 3}
    ),
    "MFM's paper, ViT fine-tuned": (
        lambda: {"model": timm_vit(global_pool="avg").state_dict(), "config": {}}, CLASSIFIER, "MFM's paper", COLOUR,
        {"MVIT.USE_MEAN_POOLING": True},
    ),
    "MFM's paper, ResNet-50": (
        lambda: {"model": {k if "decoder" in k else f"encoder.{k}": v for k, v in resnet_state(50, None, 3).items()}},
        PRETRAINED, "MFM's paper", COLOUR, {"MFM.TARGET_CHANNELS": 3},
    ),
    "CoinCheung's MFM": (
        lambda: training_script(resnet_state(50, None, 1)), PRETRAINED, "CoinCheung", GREY, {"MFM.TARGET_CHANNELS": 1}
    ),
    "CoinCheung's MFM fine-tuned": (
        lambda: training_script(resnet_state(50, 9)), CLASSIFIER, "CoinCheung", GREY, {"MODEL.NUM_CLASSES": 9}
    ),
    "torchvision": (lambda: resnet_state(50, 9), CLASSIFIER, "torchvision", COLOUR, {"RESNET.DEPTH": 50}),
    "torchvision, basic blocks": (lambda: resnet_state(34, 9), CLASSIFIER, "torchvision", COLOUR, {"RESNET.DEPTH": 34}),
    "ResNet backbone": (
        lambda: {"state_dict": {f"module.{k}": v for k, v in resnet_state(18, None).items()}}, BACKBONE, "torchvision",
        COLOUR, {"RESNET.DEPTH": 18},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_recognised(name: str) -> None:
    make, kind, writer, mean, keys = FOREIGN[name]
    with torch.device("meta"):
        content = make()
    found = recognise(content)
    assert found.kind == kind and writer in found.writer and mean == found.cfg.DATA.MEAN
    flat = {key: value for key, value in load_flat(found.cfg).items() if key in keys}
    assert flat == keys
    assert any("normalised" in note for note in found.notes)


def load_flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat |= load_flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value}
    return flat


@pytest.mark.slow
def test_clips_of_a_plain_vit(shared: Path) -> None:
    for name, manifest in json.loads((shared / "goldens" / "mae_manifest.json").read_text()).items():
        found = recognise(as_meta(manifest))
        assert found.kind == (CLASSIFIER if name.endswith("FT") else BACKBONE)
        own = shapes(found)
        assert own == {name: tuple(manifest[name]) for name in own} and found.cfg.DATA.NUM_FRAMES == 16
        assert all(name.startswith(("decoder", "mask_token", "pred_head")) for name in manifest if name not in own)


def test_what_is_assumed_is_said() -> None:
    assert any("2 of 64 channels" in note for note in recognise(timm_vit().state_dict()).notes)
    huge = {name: (shape[0], *shape[1:]) for name, shape in MANIFEST["in1k_VIT_B_MaskFeat_FT"].items()}
    scaled = {name: [1280 * s // 768 if s % 768 == 0 else s for s in shape] for name, shape in huge.items()}
    assert recognise(as_meta(scaled)).cfg.MVIT.NUM_HEADS == 16, "heads of ViT-H are 80 wide"


@pytest.mark.parametrize(
    "make, said",
    [
        (
            lambda: {"a.weight": torch.zeros(3, 4), "b": torch.zeros(5)},
            r"2 tensors of 17 numbers in all: a.weight \(3, 4\), b",
        ),
        (lambda: timm_vit(init_values=1.0).state_dict(), "is not known"),  # layer scale
        (lambda: timm_vit(reg_tokens=2).state_dict(), "is not known"),
        (lambda: timm_vit(embed_dim=24).state_dict(), "24 channels: no shape shows its number of attention heads"),
        (lambda: {**resnet_state(18, 3), "layer1.0.conv2.weight": torch.zeros(64, 4, 3, 3)}, "is not known"),  # groups
        (lambda: {k: v for k, v in resnet_state(18, 3).items() if not k.startswith("layer2.1")}, "is not known"),
        (
            lambda: {"blocks.0.norm1.weight": torch.zeros(0), "patch_embed.proj.weight": torch.zeros(0, 3, 4, 4)},
            "is not known",
        ),
        (lambda: {"patch_embed.proj.weight": torch.zeros(8), "conv1.weight": torch.zeros(())}, "is not known"),
        (lambda: {}, "no parameters"),
    ],
)
def test_unknown_networks(make: Callable[[], dict[str, torch.Tensor]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recognise(make())


def test_a_files_own_config(tmp_path: Path) -> None:
    cfg = load_config(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", VIT_PT)
    content = {"model_state": {"a": torch.zeros(1)}, "cfg": dump_config(cfg)}
    found = recognise(content)
    assert found.cfg == cfg and found.cfg.is_frozen() and found.writer == "maskfeat" and found.kind == PRETRAINED
    text = content["cfg"] + "\nFUTURE_KEY: 3\n"
    assert recognise({**content, "cfg": text}).cfg == cfg, "a key of a later version is left out"
    given = load_config(RECIPES / "in1k_VIT_L_MaskFeat_FT.yaml")
    assert recognise(content, given).cfg == given, "what the caller says wins"
    with pytest.raises(UserError, match="is not valid here, give the recipe"):
        recognise({**content, "cfg": content["cfg"].replace("PATCH_2D: true", "PATCH_2D: false")})


def test_plugins_of_a_file_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of somebody else must not choose what Python runs."""
    (tmp_path / "named_in_a_file.py").write_text("raise SystemExit('it was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = dump_config(load_config(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"))
    content = {"model_state": {"a": torch.zeros(1)}, "cfg": cfg.replace("PLUGINS: []", "PLUGINS: [named_in_a_file]")}
    with pytest.raises(UserError, match="PLUGINS named_in_a_file, which a file may not import"):
        recognise(content)
    assert "named_in_a_file" not in sys.modules
