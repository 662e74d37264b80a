"""Pictures of predictions during training: when, of what, and that training is the same with and without them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.checkpoint.reading import read_checkpoint
from maskfeat.engine.run import main
from tests.small import MFM_PT, MFM_RECIPES, RECIPES, VIT_PT, images

VIT = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
R50 = str(MFM_RECIPES / "in1k_R50_MFM_PT.yaml")


def run(folder: Path, data: Path, *opts: str, recipe: str = VIT, small: tuple[str, ...] = tuple(VIT_PT)) -> Path:
    assert main(["--cfg", recipe, *small, *images(data), "OUTPUT_DIR", str(folder), *opts]) == 0
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "pictures").glob("*")) if (folder / "pictures").exists() else []


@pytest.mark.slow
def test_after_the_first_each_period_and_the_last(image_data: Path, tmp_path: Path) -> None:
    opts = ("SOLVER.MAX_EPOCH", "5", "TRAIN.CHECKPOINT_PERIOD", "5", "TRAIN.EVAL_PERIOD", "0")
    with_pictures = run(
        tmp_path / "a", image_data, *opts, "VIS.PERIOD", "2", "VIS.SAMPLES", "2", "TENSORBOARD.ENABLE", "True"
    )
    assert names(with_pictures) == [f"ssl_epoch_{number:05d}.png" for number in (1, 2, 4, 5)]
    first, last = (np.asarray(Image.open(with_pictures / "pictures" / f"ssl_epoch_0000{n}.png")) for n in (1, 5))
    assert first.shape == last.shape and first.shape[2] == 3
    # Input, input of the model and target (three columns of four) are those of the same samples; the rest is predicted.
    column = first.shape[1] // 4
    below = 60  # the title says the epoch
    assert (first[below:, : 3 * column - 20] == last[below:, : 3 * column - 20]).all()
    assert (first[below:, 3 * column :] != last[below:, 3 * column :]).any()
    events = EventAccumulator(str(with_pictures / "tensorboard" / "ssl"))
    events.Reload()
    assert [event.step for event in events.Images("predictions")] == [0, 1, 3, 4]
    without = run(tmp_path / "b", image_data, *opts)
    assert names(without) == []
    states = [
        read_checkpoint(find_checkpoints(folder, "ssl")[-1])["model_state"] for folder in (with_pictures, without)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items()), "training is the same"


@pytest.mark.slow
def test_spectra_and_a_task_in_the_name(image_data: Path, tmp_path: Path) -> None:
    opts = ("SOLVER.MAX_EPOCH", "1", "VIS.PERIOD", "1", "TASK", "pt")
    assert names(run(tmp_path, image_data, *opts, recipe=R50, small=tuple(MFM_PT))) == ["pt_epoch_00001.png"]


def test_a_folder_that_cannot_be_written_is_a_warning(
    image_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").write_text("in the way")
    run(tmp_path, image_data, "SOLVER.MAX_EPOCH", "2", "VIS.PERIOD", "1")
    assert (tmp_path / "stdout.log").read_text().count("epoch_00001.png cannot be written") == 1
    assert "epoch_00002.png" not in (tmp_path / "stdout.log").read_text()
