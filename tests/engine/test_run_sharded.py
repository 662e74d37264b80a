"""Whole runs with parameters in pieces (TRAIN.PARALLEL fsdp): the same weights, from checkpoints of either kind."""

import shutil
from pathlib import Path

import pytest
import torch

from maskfeat.checkpoint.files import find_checkpoints, open_checkpoint, verify_checkpoint
from maskfeat.config import load_config
from tests.small import RECIPES, VIT_FT, VIT_PT, images
from tests.worker import json_stats, run_in_processes

PT, FT = "in1k_VIT_B_MaskFeat_PT.yaml", "in1k_VIT_B_MaskFeat_FT.yaml"
FSDP = ["TRAIN.PARALLEL", "fsdp"]


def weights(output: Path, task: str) -> dict[str, torch.Tensor]:
    return open_checkpoint(find_checkpoints(output, task)[-1])["model_state"]


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gathered", "sharded"])
def test_pretraining(form: str, image_data: Path, tmp_path: Path) -> None:
    """Two processes train, one goes on from what they left, and all is as with one process throughout."""
    opts = [*VIT_PT, *images(image_data), "TASK", "pt", "TRAIN.EVAL_PERIOD", "2"]

    def run(processes: int, output: Path, *more: str) -> None:
        cfg = load_config(RECIPES / PT, [*opts, "OUTPUT_DIR", str(output), *more])
        run_in_processes(cfg, processes)

    run(1, tmp_path / "plain")
    expected = weights(tmp_path / "plain", "pt")
    sharded = [*FSDP, "TRAIN.CHECKPOINT_FORMAT", form]
    run(2, tmp_path / "pieces", *sharded)
    found = find_checkpoints(tmp_path / "pieces", "pt")
    assert [path.is_dir() for path in found] == [form == "sharded"] * 2
    for path in found:
        verify_checkpoint(path)
    assert apart(weights(tmp_path / "pieces", "pt"), expected) < 1e-6
    validated = [json_stats(tmp_path / name, "val_epoch")[-1]["loss"] for name in ("plain", "pieces")]
    assert validated[1] == pytest.approx(validated[0], rel=1e-5)

    shutil.rmtree(found[-1]) if found[-1].is_dir() else found[-1].unlink()
    run(1, tmp_path / "pieces")
    assert find_checkpoints(tmp_path / "pieces", "pt")[-1].suffix == ".pyth", "one process writes one file again"
    assert f"resumed from {found[0]}, after epoch 1" in (tmp_path / "pieces" / "stdout.log").read_text()
    assert apart(weights(tmp_path / "pieces", "pt"), expected) < 1e-6


@pytest.mark.slow
def test_finetuning_and_testing(image_data: Path, tmp_path: Path) -> None:
    """Batch norms aside: mixup, layer decay, validation and multi-view testing, from pieces."""
    opts = [*VIT_FT, *images(image_data), *FSDP, "TASK", "ft", "TRAIN.CHECKPOINT_FILE_PATH", ""]
    opts += ["TRAIN.EVAL_PERIOD", "1", "TEST.ENABLE", "True"]
    cfg = load_config(RECIPES / FT, [*opts, "OUTPUT_DIR", str(tmp_path), "TRAIN.CHECKPOINT_FORMAT", "sharded"])
    run_in_processes(cfg, 2)
    assert len(json_stats(tmp_path, "val_epoch")) == 2
    tested = json_stats(tmp_path, "test_final")[-1]
    alone = load_config(RECIPES / FT, [*opts, "OUTPUT_DIR", str(tmp_path), "TRAIN.ENABLE", "False"])
    run_in_processes(alone, 1)
    again = json_stats(tmp_path, "test_final")[-1]
    assert again["top1"] == tested["top1"] and len(json_stats(tmp_path, "test_final")) == 2
