"""`maskfeat inspect`: what a file of weights is, and what a recipe would do with it."""

import json
from pathlib import Path

import pytest
import torch

from maskfeat.analysis.inspect_checkpoint import inspect, main
from maskfeat.build import build_objective, build_optimizer
from maskfeat.checkpoint.files import AVERAGE, save_checkpoint
from maskfeat.checkpoint.reading import CLASSES
from maskfeat.checkpoint.sharded import save_sharded, training_tensors
from maskfeat.config import dump_config, load_config
from maskfeat.errors import UserError
from tests.analysis.upstream import mae_file, resnet_state, timm_vit, training_script
from tests.small import RECIPES, VIT_FT, VIT_PT

PT, FT = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt") / "ssl_checkpoint_epoch_00010.pyth"
    cfg = load_config(PT, VIT_PT)
    state = build_objective(cfg).released_state()
    save_checkpoint(path, {"epoch": 9, "model_state": state, "optimizer_state": {}, "cfg": dump_config(cfg)})
    return path


@pytest.mark.slow
def test_own_checkpoint(pretrained: Path, tmp_path: Path) -> None:
    found = inspect(pretrained)
    assert found["writer"] == "maskfeat" and found["kind"] == "pre-trained" and found["epoch"] == 10
    assert found["recipe"] == "masked_ssl/in1k_VIT_B_MaskFeat_PT"
    assert found["changed keys"]["MVIT.EMBED_DIM"] == 24 and "OUTPUT_DIR" not in found["changed keys"]
    assert "ViT of 2 blocks, 2 attention heads" in found["network"]
    assert found["integrity"] == {"verified": f"the checksum in {pretrained.name}.sha256 holds", "not finite": []}
    state = torch.load(pretrained, weights_only=True)["model_state"]
    sizes = found["parameters"]
    assert sizes["count"] == sum(value.numel() for value in state.values()) and sizes["types"] == ["float32"]
    assert sizes["count"] == sum(part["count"] for part in sizes["parts"].values())
    assert sizes["parts"]["blocks"]["count"] == sum(v.numel() for k, v in state.items() if k.startswith("blocks."))
    assert found["optimizer"] and not found["averaged weights"] and found["classes"] is None
    assert sorted(found["loading"]["loaded"]) == sorted(state) and not found["loading"]["dropped"]


@pytest.mark.parametrize("resumable", [True, False])
def test_the_optimizer_of_a_sharded_one(resumable: bool, tmp_path: Path) -> None:
    cfg = load_config(PT, VIT_PT)
    objective = build_objective(cfg)
    optimizer = build_optimizer(cfg, objective) if resumable else None
    if optimizer is not None:
        for parameter in objective.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    path = tmp_path / "ssl_checkpoint_epoch_00001.dcp"
    save_sharded(path, training_tensors(objective, optimizer), {"epoch": 0, "cfg": dump_config(cfg)}).wait()
    assert inspect(path)["optimizer"] == resumable


def test_what_a_recipe_would_load(pretrained: Path) -> None:
    """As fine-tuning starts from it: what is loaded, resized, fresh and dropped."""
    cfg = load_config(FT, [*VIT_FT, "DATA.TRAIN_CROP_SIZE", "64", "DATA.TEST_CROP_SIZE", "64"])
    found = inspect(pretrained, cfg)["loading"]
    assert found["resized"] == {"pos_embed": "(1, 5, 24) -> (1, 17, 24)"}
    assert set(found["fresh"]) == {"norm.weight", "norm.bias", "head.projection.weight", "head.projection.bias"}
    assert {name.split(".")[0] for name in found["dropped"]} == {"mask_token", "hogs", "pred_head"}
    wider = inspect(pretrained, load_config(FT, [*VIT_FT, "MVIT.EMBED_DIM", "48"]))
    assert "has a different shape" in wider["loading"]["error"] and wider["recipe"].endswith("VIT_B_MaskFeat_PT")


def test_averages_classes_and_broken_values(tmp_path: Path) -> None:
    cfg = load_config(FT, VIT_FT)
    state = build_objective(cfg).released_state()
    state["blocks.1.norm1.bias"] = torch.full_like(state["blocks.1.norm1.bias"], float("nan"))
    more = {AVERAGE: state, CLASSES: ["a", "b", "c", "d"], "step": 7}
    torch.save({"epoch": 1, "model_state": state, "cfg": dump_config(cfg), **more}, tmp_path / "x.pyth")
    found = inspect(tmp_path / "x.pyth")
    assert found["averaged weights"] and found["classes"] == ["a", "b", "c", "d"] and found["step"] == 7
    assert found["integrity"]["not finite"] == ["blocks.1.norm1.bias"] and "CRC-32" in found["integrity"]["verified"]
    assert "not finite" in found["loading"]["error"]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: timm_vit().state_dict(), "timm"),
        (mae_file, "MAE"),
        (lambda: training_script(resnet_state(18, None, 1)), "CoinCheung"),
        (lambda: resnet_state(18, 5), "torchvision"),
    ],
)
def test_foreign_files(make: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(make(), tmp_path / "x.pth")  # type: ignore[operator]
    assert main([str(tmp_path / "x.pth")]) == 0
    shown = capsys.readouterr().out
    assert f"writer            {said}" in shown and "normalised" in shown and "all values are finite" in shown
    assert main([str(tmp_path / "x.pth"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert said in found["writer"] and found["assumed"] and "error" not in found["loading"]


def test_commands(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(pretrained), "--cfg", str(FT), *VIT_FT]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "into the given recipe:" in shown and "  fresh               4  norm.weight, norm.bias" in shown
    assert "recipe            masked_ssl/in1k_VIT_B_MaskFeat_PT, with" in shown and "epoch             10" in shown


@pytest.mark.parametrize(
    "given, said",
    [
        (["nothing.pyth"], "error: there is no file nothing.pyth"),
        (["maskfeat_vit"], "the nearest is 'maskfeat_vit_"),
        ([__file__], "it was not written by torch.save"),
        (["x.pyth", "A.B", "1"], "overrides change the recipe of --cfg, and none is given: A.B 1"),
        (["x.pyth", "--cfg", "nothing"], "config file nothing does not exist"),
        (["UNKNOWN"], "its network is not known: 1 tensors of 3 numbers in all: some.weight (3,)"),
        (["DAMAGED"], "is damaged: its SHA-256 differs"),
    ],
)
def test_bad_input(
    given: list[str], said: str, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if given == ["UNKNOWN"]:
        torch.save({"some.weight": torch.zeros(3)}, tmp_path / "u.pth")
        given = [str(tmp_path / "u.pth")]
    elif given == ["DAMAGED"]:
        given = [str(tmp_path / "d.pyth")]
        Path(given[0]).write_bytes(pretrained.read_bytes() + b"\0")
        Path(f"{given[0]}.sha256").write_text(Path(f"{pretrained}.sha256").read_text())
    assert main(given) == 2
    assert said in caplog.text and len(caplog.records) == 1 and "Traceback" not in caplog.text


def test_an_unknown_network_with_a_recipe(tmp_path: Path) -> None:
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "u.pth")
    with pytest.raises(UserError, match="is not known"):
        inspect(tmp_path / "u.pth")
    found = inspect(tmp_path / "u.pth", load_config(FT, VIT_FT))
    assert "is not in the file" in found["loading"]["error"]
