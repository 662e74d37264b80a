"""TRAIN.KEEP_BEST: the checkpoint of the best validation stays, whatever becomes of the others."""

import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from maskfeat.checkpoint.files import (
    Position,
    checkpoint_path,
    checksum_path,
    find_checkpoints,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from maskfeat.checkpoint.sharded import save_sharded
from maskfeat.config import load_config
from maskfeat.distributed.preemption import PREEMPTED
from maskfeat.engine import validation
from maskfeat.engine.best import BestCheckpoint
from maskfeat.engine.run import main
from tests.small import RECIPES, VIT_FT, VIT_PT, images
from tests.worker import json_stats, run_in_processes

PT, FT = (str(RECIPES / f"in1k_VIT_B_MaskFeat_{kind}.yaml") for kind in ("PT", "FT"))


def keeper(folder: Path, task: str = "") -> BestCheckpoint:
    cfg = CfgNode()
    cfg.OUTPUT_DIR, cfg.TASK = str(folder), task
    return BestCheckpoint(cfg)


def consider(best: BestCheckpoint, path: Path, epochs: int, values: dict[str, float]) -> None:
    if best.is_beaten(values):
        best.keep(path, epochs, values)


def checkpoint(folder: Path, epochs: int, step: int = 0, sharded: bool = False) -> Path:
    """A checkpoint whose weights are its number of epochs."""
    path = checkpoint_path(folder, "ft", Position(epochs, step), ".dcp" if sharded else ".pyth")
    weights, plain = torch.full((5,), float(epochs)), {"epoch": epochs - 1}
    if sharded:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_sharded(path, {"model.a": weights}, plain).wait()
    else:
        save_checkpoint(path, {**plain, "model_state": {"a": weights}})
    return path


def kept(folder: Path, suffix: str = ".pyth") -> int:
    """Epochs of what is kept, which is whole."""
    path = folder / "checkpoints" / f"ft_best{suffix}"
    verify_checkpoint(path)
    content = open_checkpoint(path)
    assert content["model_state"]["a"].tolist() == [content["epoch"] + 1] * 5
    return int(content["epoch"]) + 1


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("validations", "expected"),
    [
        ([{"top1": 3.0}, {"top1": 9.0}, {"top1": 5.0}, {"top1": 9.0}], 2),  # of equals the first
        ([{"loss": 3.0}, {"loss": 2.0}, {"loss": 5.0}], 2),
        ([{"top1": float("nan")}, {"top1": 1.0}, {"top1": float("nan")}], 2),
        ([{"top1": 9.0, "ema_top1": 1.0}, {"top1": 5.0, "ema_top1": 2.0}], 2),
        ([{"top1": 1.0, "top5": 9.0, "mAP": 2.0}, {"top1": 2.0, "mAP": 1.0}], 1),
        ([{"top1": 9.0}, {"ema_top1": 2.0, "top1": 1.0}], 2),  # the average is new: values of before do not count
    ],
)
def test_what_is_best(
    validations: list[dict[str, float]], expected: int, sharded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch, values in enumerate(validations, 1):
        # A keeper of its own each time, as if the run had been resumed.
        consider(keeper(tmp_path, "ft"), checkpoint(tmp_path, epoch, sharded=sharded), epoch, values)
    assert kept(tmp_path, ".dcp" if sharded else ".pyth") == expected
    record = json.loads((tmp_path / "checkpoints" / "ft_best.json").read_text())
    assert record["epochs"] == expected and record["value"] == validations[expected - 1][record["metric"]]
    assert len(find_checkpoints(tmp_path, "ft")) == len(validations), "it is none of the checkpoints to resume from"
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("links", [True, False])
def test_it_outlives_its_checkpoint(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", refused)
    path = checkpoint(tmp_path, 1, step=4)
    consider(keeper(tmp_path, "ft"), path, 2, {"top1": 3.0})
    assert os.path.samefile(path, path.with_name("ft_best.pyth")) == links
    for epoch in (2, 3):
        checkpoint(tmp_path, epoch)
    prune_checkpoints(tmp_path, "ft", Position(3), keep=1)
    assert [one.name for one in find_checkpoints(tmp_path, "ft")] == ["ft_checkpoint_epoch_00003.pyth"]
    assert kept(tmp_path) == 1


def test_records_that_are_damaged_or_of_another_run(tmp_path: Path) -> None:
    best = keeper(tmp_path, "ft")
    record = tmp_path / "checkpoints" / "ft_best.json"
    consider(best, checkpoint(tmp_path, 1), 1, {"top1": 9.0})
    for number, text in enumerate(("", "[]", '{"metric": "top1"}', '{"metric": "top1", "value": "x"}'), 2):
        record.write_text(text)
        consider(best, checkpoint(tmp_path, number), number, {"top1": 2.0})
        assert kept(tmp_path) == number
    best.forget()
    consider(best, checkpoint(tmp_path, 6), 6, {"top1": 1.0})
    assert kept(tmp_path) == 6
    (tmp_path / "checkpoints" / "ft_best.pyth").unlink()  # by its user, to whom the next one belongs
    consider(best, checkpoint(tmp_path, 7), 7, {"top1": 0.5})
    assert kept(tmp_path) == 7
    consider(best, checkpoint(tmp_path, 8), 8, {"zero_predictor": 0.5})
    assert kept(tmp_path) == 7


def test_the_format_changes(tmp_path: Path) -> None:
    best = keeper(tmp_path, "ft")
    consider(best, checkpoint(tmp_path, 1), 1, {"top1": 1.0})
    consider(best, checkpoint(tmp_path, 2, sharded=True), 2, {"top1": 2.0})
    assert kept(tmp_path, ".dcp") == 2 and not (tmp_path / "checkpoints" / "ft_best.pyth").exists()
    consider(best, checkpoint(tmp_path, 3), 3, {"top1": 3.0})
    assert kept(tmp_path) == 3 and not (tmp_path / "checkpoints" / "ft_best.dcp").exists()


def test_a_checkpoint_without_a_checksum(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    checksum_path(path).unlink()  # killed between the two renames
    consider(keeper(tmp_path, "ft"), path, 1, {"top1": 1.0})
    assert kept(tmp_path) == 1


def told(monkeypatch: pytest.MonkeyPatch, found: Iterator[dict[str, float] | None]) -> None:
    """Let validations find these values; None = the run is asked to stop in the middle."""

    def validate(objective: Any, loader: Any, device: Any, precision: Any, heartbeat: Any) -> dict[str, float]:
        values = next(found)
        if values is None:
            os.kill(os.getpid(), 15)
            for _ in range(3):
                heartbeat("validating")
            raise AssertionError("the heartbeat ends the run")
        return values

    monkeypatch.setattr(validation, "validate", validate)


@pytest.mark.slow
def test_a_run(image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within a validation and gone on with; its last checkpoint alone is kept, and the best one tested."""
    opts = [*VIT_FT, *images(image_data), "SOLVER.MAX_EPOCH", "5", "TRAIN.EVAL_PERIOD", "1"]
    opts += ["TRAIN.CHECKPOINT_FILE_PATH", "", "TRAIN.CHECKPOINT_PERIOD", "2", "TRAIN.KEEP_CHECKPOINTS", "1"]
    opts += ["TEST.ENABLE", "True", "TRAIN.KEEP_BEST", "True", "TASK", "ft", "OUTPUT_DIR", str(tmp_path)]
    best = tmp_path / "checkpoints" / "ft_best.pyth"
    command = ["--cfg", FT, *opts, "TEST.CHECKPOINT_FILE_PATH", str(best)]
    tops: list[float | None] = [4.0, 5.0, None, 9.0, 6.0, 7.0]
    told(monkeypatch, iter([None if top is None else {"top1": top} for top in tops]))
    assert main(command) == PREEMPTED
    assert open_checkpoint(best)["epoch"] == 1
    assert main(command) == 0
    assert [path.name for path in find_checkpoints(tmp_path, "ft")] == ["ft_checkpoint_epoch_00005.pyth"]
    content = open_checkpoint(best)
    assert content["step"] > 0 and content["epoch"] == 1, "the third epoch, at whose end only the validation was due"
    verify_checkpoint(best)
    log = (tmp_path / "stdout.log").read_text()
    assert log.count("best top1 so far") == 3 and "best top1 so far, 9: ft_checkpoint_epoch_00002_step" in log
    assert f"weights from {best}" in log and len(json_stats(tmp_path, "test_final")) == 1
    # Anew in the same folder: what was best before does not count.
    told(monkeypatch, iter([{"top1": 1.0}] * 5))
    assert main([*command, "TRAIN.AUTO_RESUME", "False"]) == 0
    again = open_checkpoint(best)
    assert again["epoch"] == -1 and again["step"] == content["step"], "the first epoch"


@pytest.mark.slow
def test_a_run_in_pieces(image_data: Path, tmp_path: Path) -> None:
    """Of pre-training, by two processes; the loss falls, so that the last is the best."""
    opts = [*VIT_PT, *images(image_data), "TRAIN.EVAL_PERIOD", "1", "TASK", "ft", "OUTPUT_DIR", str(tmp_path)]
    opts += ["TRAIN.PARALLEL", "fsdp", "TRAIN.CHECKPOINT_FORMAT", "sharded", "TRAIN.KEEP_BEST", "True"]
    run_in_processes(load_config(PT, opts), processes=2)
    found = [float(stats["loss"]) for stats in json_stats(tmp_path, "val_epoch")]
    best = tmp_path / "checkpoints" / "ft_best.dcp"
    verify_checkpoint(best)
    assert found[1] < found[0] and open_checkpoint(best)["epoch"] == 1
    assert (best / ".metadata").samefile(find_checkpoints(tmp_path, "ft")[-1] / ".metadata")


def test_what_cannot_be_kept_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from maskfeat.engine.saver import Saver
    from maskfeat.engine.trainer import build_trainer

    opts = ["TRAIN.KEEP_BEST", "True", "TRAIN.EVAL_PERIOD", "1", "TASK", "ft", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(PT, [*VIT_PT, *opts])
    trainer = build_trainer(cfg, torch.device("cpu"))
    saver = Saver(cfg, trainer)
    trainer.position = Position(1)
    with caplog.at_level(logging.ERROR):
        saver.keep_if_best({"loss": 1.0})
    assert "NOT KEPT: the checkpoint after epoch 1 could not be written" in caplog.text
    saver.save()
    monkeypatch.setattr("maskfeat.engine.best._link", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with caplog.at_level(logging.ERROR):
        saver.keep_if_best({"loss": 1.0})
    assert "cannot be kept as the best one: [Errno 28] No space left" in caplog.text
    assert not list((tmp_path / "checkpoints").glob("*best*"))
