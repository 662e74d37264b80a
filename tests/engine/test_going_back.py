"""A run goes on from the checkpoint that it saved last, also where the folder has some of later positions."""

import os
import signal
from pathlib import Path

import pytest

from maskfeat.batch import Batch
from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.distributed.preemption import PREEMPTED, STOPPED
from maskfeat.engine.run import main
from maskfeat.engine.trainer import Trainer
from tests.small import RECIPES, VIT_PT, images

PT = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Steps after which SIGTERM comes."""
    train_step, left = Trainer.train_step, {"steps": 10**6}

    def counted(self: Trainer, batch: Batch) -> None:
        train_step(self, batch)
        left["steps"] -= 1
        if not left["steps"]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", counted)
    return left


def newest(folder: Path) -> str:
    return find_checkpoints(folder, "ssl")[-1].name


@pytest.mark.slow
def test_more_samples_a_step(stopped_after: dict[str, int], image_data: Path, tmp_path: Path) -> None:
    """Step 3 of 8 samples comes after step 4 of 4 samples, whose checkpoint has the larger number."""
    command = ["--cfg", PT, *VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_EPOCH", "1"]
    stopped_after["steps"] = 5
    assert main([*command, "TRAIN.BATCH_SIZE", "4"]) == PREEMPTED
    before = newest(tmp_path)
    assert before == "ssl_checkpoint_epoch_00000_step_000005.pyth"
    stopped_after["steps"] = 1
    assert main(command) == PREEMPTED
    assert newest(tmp_path) == "ssl_checkpoint_epoch_00000_step_000003.pyth"
    assert (tmp_path / "checkpoints" / "superseded" / before).exists()
    assert main(command) == 0
    log = (tmp_path / "stdout.log").read_text()
    assert log.count("resumed from") == 2 and "step_000003.pyth, after epoch 0, step 3" in log
    assert "checkpoints of another course of this run, which come after it, are now in" in log


@pytest.mark.slow
def test_starting_over(stopped_after: dict[str, int], image_data: Path, tmp_path: Path) -> None:
    command = ["--cfg", PT, *VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path)]
    assert main(command) == 0
    stopped_after["steps"] = 2
    assert main([*command, "TRAIN.AUTO_RESUME", "False"]) == STOPPED
    assert newest(tmp_path) == "ssl_checkpoint_epoch_00000_step_000002.pyth"
    assert len(list((tmp_path / "checkpoints" / "superseded").glob("*.pyth"))) == 2
    assert main(command) == 0
    log = (tmp_path / "stdout.log").read_text()
    assert "this run starts over, and moves it away when it saves" in log
    assert "step_000002.pyth, after epoch 0, step 2" in log and newest(tmp_path) == "ssl_checkpoint_epoch_00002.pyth"
