"""Exports compute what the network computes: in timm, torchvision, the Hub's mixin, ONNX Runtime and torch.export."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import yaml
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from maskfeat import cli
from maskfeat.analysis import export as module
from maskfeat.analysis.export import TARGETS, Job, Network, Target, Written, export, greatest_difference, onnx_runtime
from maskfeat.analysis.hub import HubModel, without_head
from maskfeat.analysis.model import Model, load_model
from maskfeat.build import build_objective
from maskfeat.checkpoint.files import save_checkpoint
from maskfeat.checkpoint.weights import LoadReport
from maskfeat.config import dump_config, load_config
from maskfeat.config.schema import schema
from maskfeat.errors import UserError
from maskfeat.registry import lookup
from tests.small import MFM_PT, MFM_RECIPES, MVIT_FT, MVIT_PT, R50_FT, RECIPES, VIT_FT, VIT_PT

ONE_BLOCK = ["MVIT.DEPTH", "1"]
MVIT_ONE = [*ONE_BLOCK, "MVIT.DIM_MUL", "[]", "MVIT.HEAD_MUL", "[]", "MVIT.POOL_Q_STRIDE", "[[0, 1, 2, 2]]"]
VIT, MVIT, R50 = "in1k_VIT_B_MaskFeat_FT", "k400_MVITv2_S_16x4_FT", "in1k_R50_MFM_FT"
CASES: dict[str, tuple[Path, Sequence[str]]] = {
    "ViT": (RECIPES / f"{VIT}.yaml", VIT_FT),
    "ViT of a class token": (RECIPES / f"{VIT}.yaml", [*VIT_FT, "MVIT.USE_MEAN_POOLING", "False"]),
    "ViT without": (RECIPES / f"{VIT}.yaml", [*VIT_FT, "MVIT.CLS_EMBED_ON", "False", "MVIT.QKV_BIAS", "False"]),
    "MaskFeat ViT": (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", VIT_PT),
    "MFM ViT": (MFM_RECIPES / "in1k_VIT_B_MFM_PT.yaml", [*VIT_PT[:-2], "MFM.RADIUS", "6"]),
    "MViTv2": (RECIPES / f"{MVIT}.yaml", MVIT_FT),
    "MaskFeat MViTv2": (RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", MVIT_PT),
    "ResNet-18": (MFM_RECIPES / f"{R50}.yaml", [*R50_FT, "RESNET.DEPTH", "18"]),
    "ResNet-10": (MFM_RECIPES / f"{R50}.yaml", R50_FT),
    "MFM ResNet": (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", MFM_PT),
}
SLOW = pytest.mark.slow
NAMES = ["cat", "dog", "owl", "fox"]


def trained(recipe: Path, opts: Sequence[str] = ()) -> Model:
    """A model none of whose parameters and statistics has a special value, such as 0 or 1."""
    cfg = load_config(recipe, opts)
    objective = build_objective(cfg)
    for name, value in objective.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and "hogs" not in name:
            value.add_(torch.randn_like(value) * 0.05)
    classifies = objective.classifies
    return Model(
        objective,
        cfg,
        "runs/some.pyth",
        "classifier" if classifies else "pre-trained",
        LoadReport(),
        NAMES if classifies and objective.num_classes == len(NAMES) else None,
    )


def small(case: str, *opts: str) -> Model:
    recipe, own = CASES[case]
    return trained(recipe, [*own, *opts])


def parts(model: Model) -> list[str]:
    return ["backbone", "classifier"] if model.kind == "classifier" else ["backbone"]


def pictures(model: Model, number: int = 4) -> Tensor:
    """Smooth pictures rather than noise."""
    size = model.clip_size
    coarse = torch.randn(number, 3, *(max(side // 8, 1) for side in size))
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return torch.nn.functional.interpolate(coarse, size=size, mode=mode)


def expected(model: Model, what: str, x: Tensor) -> list[Tensor]:
    """What the network computes, by the functions of `Model` and of the objective."""
    if what == "classifier":
        return [model.objective.logits(x)]  # type: ignore[operator]
    return [model.tokens(x).x, model.features(x)]


def far(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    assert [one.shape for one in ours] == [one.shape for one in theirs]
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def by_its_words(how: str) -> Any:
    """The network that the Python which an export prints makes of it."""
    names = {"timm": timm, "torch": torch, "torchvision": torchvision, "safetensors": safetensors}
    names["maskfeat"] = type("maskfeat", (), {"load_model": staticmethod(load_model)})
    if how.startswith("network ="):
        exec(how, names)
        return names["network"].eval()  # type: ignore[attr-defined]
    return eval(how, names).eval()


@pytest.mark.parametrize(
    "case",
    ["ViT", "ViT of a class token", "ViT without", "MaskFeat ViT", "MFM ViT", pytest.param("ResNet-18", marks=SLOW)],
)
@torch.no_grad()
def test_timm_computes_the_same(case: str, tmp_path: Path) -> None:
    model = small(case)
    x = pictures(model)
    for what in parts(model):
        worst, how = export(model, "timm", tmp_path / f"{what}.safetensors", what)
        network = by_its_words(how)
        if what == "classifier":
            found = [network(x)]
        else:
            tokens = network.forward_features(x)
            found = [tokens if tokens.dim() == 3 else tokens.flatten(2).transpose(1, 2), network(x)]
        assert far(expected(model, what, x), found) <= 1e-5 >= worst
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
        shown = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
        assert far([model.transform(image)], [shown(image)]) < 1e-5, "and is shown the same"


@pytest.mark.parametrize(
    ("case", "library"),
    [
        ("ViT", "timm"),
        ("ViT of a class token", "timm"),
        ("MaskFeat ViT", "timm"),
        pytest.param("ResNet-18", "timm", marks=SLOW),
        pytest.param("ResNet-10", "torchvision", marks=SLOW),
    ],
)
@torch.no_grad()
def test_what_was_written_for_others_is_read_again(case: str, library: str, tmp_path: Path) -> None:
    """With its size, mean and classes, and the number of heads that no shape shows."""
    opts = ["MVIT.NUM_HEADS", "3", "MVIT.EMBED_DIM", "48"] if "ViT" in case else []
    model = small(case, *opts, "DATA.MEAN", "[0.1, 0.2, 0.3]")
    x = pictures(model)
    for what in parts(model):
        path = tmp_path / f"{what}.safetensors"
        export(model, library, path, what)
        again = load_model(path, device="cpu")
        assert again.kind == what and far(expected(model, what, x), expected(again, what, x)) == 0
        assert again.cfg.DATA.MEAN == [0.1, 0.2, 0.3] and again.clip_size == model.clip_size
        assert again.classes == (model.classes if what == "classifier" else None)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ViT of a class token", "MaskFeat ViT", "MFM ViT", "ResNet-10", "MFM ResNet"])
@torch.no_grad()
def test_torchvision_computes_the_same(case: str, tmp_path: Path) -> None:
    model = small(case)
    x = pictures(model)
    for what in parts(model):
        worst, how = export(model, "torchvision", tmp_path / f"{what}.safetensors", what)
        network = by_its_words(how)
        if what == "classifier":
            ours = model.objective.logits(x)  # type: ignore[operator]
        else:
            ours = model.features(x, "cls" if "ViT" in case else "mean")
        # Its attention of a ViT is written in another way, its ResNet is ours.
        assert far([ours], [network(x)]) <= (5e-6 if "ViT" in case else 1e-6) >= worst / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "library", "why"),
    [
        ("ViT", "torchvision", "classifies the class token"),
        ("MViTv2", "torchvision", "DIM_MUL_IN_ATT"),
        ("MViTv2", "timm", "DIM_MUL_IN_ATT"),
        ("ResNet-10", "timm", "ResNet-10"),
    ],
)
def test_where_a_library_has_no_such_network_the_names_are_ours(
    case: str, library: str, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(case)
    export(model, library, tmp_path / "x.safetensors")
    assert f"{library} has no network that computes the same" in caplog.text and why in caplog.text
    assert set(safetensors.torch.load_file(tmp_path / "x.safetensors")) == set(model.objective.released_state())


def test_the_folder_of_the_hub_names_no_place_of_the_machine_that_wrote_it(tmp_path: Path) -> None:
    kinds = schema().rules.kinds
    paths = [word for key, kind in kinds.items() if kind == "path" for word in (key, f"/home/me/{key}")]
    assert "DATA.CLASS_NAMES" in paths and "TENSORBOARD.LOG_DIR" in paths
    model = small("ViT", *paths, "AVA.FRAME_DIR", "/home/me/frames", "DATA.PATH_TO_PRELOAD_IMDB", "/home/me/imdb")
    export(model, "hf", tmp_path / "network", licence="cc-by-nc-4.0")
    for name in ("config.json", "README.md"):
        assert "/home/me" not in (tmp_path / "network" / name).read_text()
    again = HubModel.from_pretrained(tmp_path / "network", local_files_only=True)
    assert all(lookup(again.cfg, key) == schema().known[key] for key, kind in kinds.items() if kind == "path")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ViT", "MaskFeat ViT", "MFM ViT", "MViTv2", "MaskFeat MViTv2", "MFM ResNet"])
@torch.no_grad()
def test_the_folder_of_the_hub_gives_the_same_model(case: str, tmp_path: Path) -> None:
    model = small(case)
    x = pictures(model, 2)
    for what in parts(model):
        folder = tmp_path / what
        export(model, "hf", folder, what, licence="cc-by-nc-4.0", figures=["82.2 % top-1 on its validation set"])
        again = HubModel.from_pretrained(folder, local_files_only=True)
        assert again.kind == what and far(expected(model, what, x), expected(again, what, x)) == 0
        _, head, text = (folder / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(head)["license"] == "cc-by-nc-4.0"
        assert "82.2 % top-1" in text and "Training:" not in text and "the config of the network" in text
        read = load_model(folder, device="cpu")
        assert read.kind == what and far(expected(model, what, x), expected(read, what, x)) == 0
        assert read.classes == (NAMES if what == "classifier" else None)
        settings = json.loads((folder / "config.json").read_text())
        assert settings["source"] == "some.pyth", "and no folder of the machine that wrote it"
        assert (what == "classifier") == (settings["classes"] == NAMES)
        names = set(safetensors.torch.load_file(folder / "model.safetensors"))
        assert "mask_token" not in names and any(name.startswith("head.") for name in names) == (what == "classifier")


@pytest.mark.slow
@torch.no_grad()
def test_ones_own_names_are_recognised_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained(RECIPES / f"{VIT}.yaml", [*VIT_FT, "MVIT.EMBED_DIM", "64", "MVIT.NUM_HEADS", "1"])
    for what in parts(model):
        worst, how = export(model, "safetensors", tmp_path / f"{what}.safetensors", what)
        again, x = by_its_words(how), pictures(model)
        assert worst == 0 and far(expected(model, what, x), expected(again, what, x)) == 0
    # 64 / 2 is not the usual width of a head, and no shape shows it: the file of a classifier has its config.
    odd, x = small("ViT", "MVIT.EMBED_DIM", "64", "MVIT.NUM_HEADS", "2", "OUTPUT_DIR", "/home/me"), pictures(model)
    odd.classes = NAMES
    caplog.clear()
    again = by_its_words(export(odd, "safetensors", tmp_path / "odd.safetensors")[1])
    assert far(expected(odd, "classifier", x), expected(again, "classifier", x)) == 0 and again.classes == NAMES
    assert not caplog.text and b"/home/me" not in (tmp_path / "odd.safetensors").read_bytes()
    bare = tmp_path / "bare.safetensors"
    again = by_its_words(export(odd, "safetensors", bare, "backbone")[1])
    assert far(expected(odd, "backbone", x), expected(again, "backbone", x)) == 0 and not caplog.text
    # Without its words the number of heads is a guess, and said to be one; a recipe says it.
    safetensors.torch.save_file(safetensors.torch.load_file(bare), bare)
    assert load_model(bare, device="cpu").cfg.MVIT.NUM_HEADS == 1
    assert "assumed" in caplog.text and "number of attention heads: 1 of 64 channels" in caplog.text
    for cfg in (odd.cfg, load_config(CASES["MaskFeat ViT"][0], [*VIT_PT, "MVIT.EMBED_DIM", "64"])):
        again = load_model(bare, cfg, device="cpu")
        assert again.kind == "backbone" and far(expected(odd, "backbone", x), expected(again, "backbone", x)) == 0


def reloaded(to: str, path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    if to == "torch.export":
        return torch.export.load(str(path)).module()
    session = onnx_runtime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@torch.no_grad()
def check_graph(model: Model, to: str, what: str, folder: Path) -> None:
    """A saved graph takes batches of other sizes than it was compared with, and computes what the network does."""
    path = folder / f"{what}{TARGETS[to].suffix}"
    export(model, to, path, what)
    run = reloaded(to, path)
    for batch in (1, 2, 3, 5) if max(model.backbone.clip_size) < 64 else (1, 3):
        x = pictures(model, batch)
        ours = expected(model, what, x)
        # Values of a deep ResNet with random weights grow to 1e8, and roundings with them.
        largest = max(1.0, *(float(one.abs().max()) for one in ours))
        assert far(ours, list(run(x))) <= 1e-4 * largest
    assert [item.name for item in folder.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "opts", "what"),
    [
        ("MViTv2", MVIT_ONE, "backbone"),
        pytest.param("ViT", ONE_BLOCK, "classifier", marks=SLOW),
        pytest.param("ResNet-10", [], "backbone", marks=SLOW),
    ],
)
def test_saved_programs(case: str, opts: list[str], what: str, tmp_path: Path) -> None:
    check_graph(small(case, *opts), "torch.export", what, tmp_path)


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    check_graph(small("ViT", *ONE_BLOCK), "onnx", "backbone", tmp_path)


@SLOW
@pytest.mark.parametrize("what", ["backbone", "classifier"])
@pytest.mark.parametrize("case", ["MViTv2", "ResNet-10"])
def test_onnx_of_the_other_networks(case: str, what: str, tmp_path: Path) -> None:
    check_graph(small(case), "onnx", what, tmp_path)


@SLOW
@pytest.mark.full_size
@pytest.mark.parametrize("to", ["onnx", "torch.export"])
@pytest.mark.parametrize("what", ["backbone", "classifier"])
@pytest.mark.parametrize("recipe", [RECIPES / f"{VIT}.yaml", MFM_RECIPES / f"{R50}.yaml", RECIPES / f"{MVIT}.yaml"])
def test_graphs_of_published_sizes(recipe: Path, what: str, to: str, tmp_path: Path) -> None:
    quick = what == "classifier" and (recipe.stem != MVIT or to == "torch.export")  # the backbone is a part of it
    if not quick and os.environ.get("MASKFEAT_LONG") != "1":
        pytest.skip(
            "PyTorch's exporters take long at these sizes, minutes for MViTv2-S: MASKFEAT_LONG=1 runs all graphs"
        )
    check_graph(trained(recipe), to, what, tmp_path)


@SLOW
@pytest.mark.full_size
@torch.no_grad()
def test_features_of_published_sizes(image_data: Path, tmp_path: Path) -> None:
    """ViT-B in timm to 1e-5, ResNet-50 in torchvision to 1e-6, on image files."""
    files = sorted(image_data.rglob("*.*g"))[:4]
    for recipe, library, allowed in (
        (RECIPES / f"{VIT}.yaml", "timm", 1e-5),
        (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", "timm", 1e-5),
        (MFM_RECIPES / f"{R50}.yaml", "torchvision", 1e-6),
    ):
        model = trained(recipe)
        x = model.transform(files)
        _, how = export(model, library, tmp_path / f"{recipe.stem}.safetensors", "backbone")
        assert len(x) == 4 and far([model.features(x)], [by_its_words(how)(x)]) <= allowed


def test_what_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(job: Job, path: Path) -> Written:
        written = TARGETS["safetensors"].write(job, path)
        return written._replace(outputs=lambda x: [out + 1e-3 for out in written.outputs(x)])

    model = small("ViT", *ONE_BLOCK)
    monkeypatch.setattr(module, "TARGETS", {**TARGETS, "other": Target(".safetensors", writes)})
    with pytest.raises(UserError, match=r"tokens of the export differ from ours by up to 0\.001.* nothing was written"):
        export(model, "other", tmp_path / "new" / "x.safetensors", "backbone")
    assert not list((tmp_path / "new").iterdir())
    nothing = Written(lambda x: [x.new_full((len(x), 4), torch.nan)], "", 1.0)
    with pytest.raises(UserError, match="logits of the export differ"):
        greatest_difference(Job(Network(model)), nothing)
    with pytest.raises(UserError, match="have shape"):
        greatest_difference(Job(Network(without_head(model))), nothing._replace(outputs=lambda x: [x, x]))


def checkpoint(path: Path, case: str) -> Path:
    model = small(case)
    content = {"model_state": model.objective.released_state(), "cfg": dump_config(model.cfg), "classes": NAMES}
    save_checkpoint(path, content)
    return path


def test_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = checkpoint(tmp_path / "run.pyth", "ViT")
    given = ["export", "--checkpoint", str(file), "--to", "timm", "--output"]
    assert cli.main([*given, str(tmp_path / "a" / "b.safetensors")]) == 0
    assert "greatest difference from the network here" in caplog.text and "timm.create_model(" in caplog.text
    assert (tmp_path / "a" / "b.safetensors").is_file()
    with safe_open(tmp_path / "a" / "b.safetensors", "pt") as found:
        assert "timm.create_model(" in found.metadata()["load"]


@pytest.mark.slow
def test_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained, classifier = checkpoint(tmp_path / "p.pyth", "MaskFeat ViT"), checkpoint(tmp_path / "c.pyth", "ViT")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    (tmp_path / "d.onnx").mkdir()
    missing, out = str(tmp_path / "none.pyth"), str(tmp_path / "o")
    tensors = tmp_path / "c.safetensors"
    tensors.write_bytes(b"weights")
    for file, to, output, options, text in (
        (missing, "timm", f"{out}.safetensors", [], "none.pyth"),
        (classifier, "onnx", f"{out}.pt", [], "--output must end with .onnx for --to onnx; given"),
        (classifier, "onnx", str(tmp_path / "d.onnx"), [], "is a folder"),
        (classifier, "onnx", f"{out}.onnx", ["--opset", "7"], "--opset must be"),
        (classifier, "hf", str(full), [], "exists: --to hf writes a new folder"),
        (classifier, "timm", str(full / "mine.txt" / "x.safetensors"), [], "cannot be written"),
        (pretrained, "timm", f"{out}.safetensors", ["--what", "classifier"], "does not classify"),
        (tensors, "timm", str(tensors), [], "is what is read"),
    ):
        caplog.clear()
        given = ["export", "--checkpoint", str(file), "--to", to, "--output", output, *options]
        assert cli.main(given) == 2, text
        assert text in caplog.text and "Traceback" not in caplog.text
    assert (full / "mine.txt").read_text() == "mine" and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match="--what must be one of backbone, classifier; given 'features'"):
        export(small("ViT"), "safetensors", f"{out}.safetensors", "features")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime.*pip install '\.\[export\]'"):
        onnx_runtime()
