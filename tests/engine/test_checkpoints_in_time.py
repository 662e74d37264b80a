"""Checkpoints by the clock are written once, and an earlier one that failed costs nothing but itself."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.checkpoint import sharded
from maskfeat.checkpoint.files import Position, find_checkpoints, verify_checkpoint
from maskfeat.checkpoint.reading import read_checkpoint
from maskfeat.config import load_config
from maskfeat.distributed.launch import launch
from maskfeat.distributed.world import World
from maskfeat.engine import saver as saving
from maskfeat.engine.run import main, work
from maskfeat.engine.setup import CommandLine
from maskfeat.engine.trainer import Trainer, build_trainer
from maskfeat.errors import UserFileError
from tests.small import RECIPES, VIT_PT, images

PT = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"
SHARDED = ["TRAIN.PARALLEL", "fsdp", "TRAIN.CHECKPOINT_FORMAT", "sharded"]


def clocked_work(world: World, init_method: str, cfg: CfgNode, given: CommandLine, late: float) -> int:
    """A whole run in which every step takes a minute, on ranks whose clocks are `late` minutes apart."""
    step, minutes = Trainer.train_step, [0.0]

    def timed(self: Trainer, batch: Batch) -> None:
        minutes[0] += 1 + (late if world.rank and not minutes[0] else 0)
        step(self, batch)

    Trainer.train_step = timed  # type: ignore[method-assign]
    saving.time = SimpleNamespace(monotonic=lambda: 60 * minutes[0])  # type: ignore[attr-defined]
    return work(world, init_method, cfg, given)


def saved(folder: Path) -> list[tuple[int, int]]:
    """Epoch and step of what a run says it has saved."""
    names = re.findall(r"saved \S+_epoch_(\d+)(?:_step_(\d+))?\.(?:pyth|dcp)", (folder / "stdout.log").read_text())
    return [(int(epoch), int(step or 0)) for epoch, step in names]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("minutes", "late", "expected"),
    [
        # Due after step 2, agreed on after step 3; due after step 5, which ends the epoch and saves anyway.
        (2, 0.5, [(0, 3), (1, 0), (1, 3), (2, 0)]),
        (3, 1.0, [(0, 3), (1, 0), (1, 4), (2, 0)]),  # the second rank asks a step before the first
        (5, 0.0, [(1, 0), (2, 0)]),  # asked for in the last step of an epoch, which saves
    ],
)
def test_two_processes_save_once(
    minutes: int, late: float, expected: list[tuple[int, int]], image_data: Path, tmp_path: Path
) -> None:
    opts = [*VIT_PT, *images(image_data), "TRAIN.CHECKPOINT_MINUTES", str(minutes), "OUTPUT_DIR", str(tmp_path)]
    opts += ["NUM_GPUS", "2", "DIST_BACKEND", "gloo"]
    assert launch(clocked_work, (load_config(PT, opts), CommandLine("", ()), late), processes=2) == 0
    assert saved(tmp_path) == expected
    within = [read_checkpoint(path) for path in find_checkpoints(tmp_path, "ssl") if "step" in path.name]
    assert all(content["samples_per_step"] == 8 for content in within), "of both processes together"


def failing_once(output_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer, saving.Saver, str]:
    """A trainer after three steps, what saves it, and the task; its first checkpoint fails while it is written."""
    finish, calls = sharded._finish, [0]

    def fails(writing: Any, partial: Path, folder: Path, *more: Any) -> None:
        calls[0] += 1
        if calls[0] == 1:
            writing.result()
            raise UserFileError(f"could not write the checkpoint {folder}: No space left on device")
        finish(writing, partial, folder, *more)

    monkeypatch.setattr(sharded, "_finish", fails)
    cfg = load_config(PT, [*VIT_PT, *SHARDED, "OUTPUT_DIR", str(output_dir)])
    trainer = build_trainer(cfg, torch.device("cpu"))
    saver = saving.Saver(cfg, trainer)
    trainer.position = Position(0, 3)
    return trainer, saver, cfg.TASK


@pytest.mark.parametrize("must", [True, False])
def test_an_earlier_failure_does_not_cost_the_state_of_now(
    must: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, saver, task = failing_once(tmp_path, monkeypatch)
    saver.save()
    trainer.position = Position(0, 4)
    with caplog.at_level(logging.ERROR):
        saver.save(must=must)
    assert caplog.text.count("NOT SAVED: could not write the checkpoint") == 1 and "step_000003" in caplog.text
    saver.finish()
    (found,) = find_checkpoints(tmp_path, task)
    assert found.name == "ssl_checkpoint_epoch_00000_step_000004.dcp"
    verify_checkpoint(found)


def test_a_failed_checkpoint_is_written_again_at_the_same_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, saver, task = failing_once(tmp_path, monkeypatch)
    saver.save()
    saver.save(must=True)
    (found,) = find_checkpoints(tmp_path, task)
    verify_checkpoint(found)


def test_what_fails_at_a_stop_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, saver, task = failing_once(tmp_path, monkeypatch)
    with pytest.raises(UserFileError, match="No space left"):
        saver.save(must=True)
    assert not find_checkpoints(tmp_path, task)


def test_a_run_ends_in_an_error_where_its_last_checkpoint_fails(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An earlier one that fails is only reported: there may be room by the next."""

    def fails(path: Path, content: object) -> None:
        raise UserFileError(f"could not write the checkpoint {path}: No space left on device")

    monkeypatch.setattr(saving, "save_checkpoint", fails)
    assert main(["--cfg", str(PT), *VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert (said.out + said.err).count("NOT SAVED, training continues") == 1
    assert "epoch_00002.pyth: No space left" in said.out + said.err
