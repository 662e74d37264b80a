"""Speed and time left leave out what is not training."""

import time
from pathlib import Path
from typing import Any

import pytest

from maskfeat.engine.run import main
from maskfeat.engine.saver import Saver
from tests.small import RECIPES, VIT_PT, images
from tests.worker import json_stats

PAUSE = 3.0


@pytest.mark.slow
@pytest.mark.parametrize("within_an_epoch", [True, False])
def test_saving_takes_no_time_of_steps(
    within_an_epoch: bool, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, saves = Saver.save, []

    def slow(self: Saver, **options: Any) -> None:
        saves.append(1)
        time.sleep(PAUSE)
        plain(self, **options)

    monkeypatch.setattr(Saver, "save", slow)
    if within_an_epoch:
        monkeypatch.setattr(Saver, "is_due", property(lambda saver: saver._trainer.position.step in (2, 4)))
    opts = [*VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path), "TRAIN.CHECKPOINT_PERIOD", "1"]
    assert main(["--cfg", str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"), *opts]) == 0
    lines = json_stats(tmp_path, "train_iter")
    assert len(lines) == 10 and len(saves) == (6 if within_an_epoch else 2)
    assert max(line["dt"] for line in lines) < PAUSE
    assert min(line["samples_per_second"] for line in lines) > 8 / PAUSE
    # 0:00:00 to 0:00:02 a step: the pauses would make it more.
    hours, minutes, seconds = (int(part) for part in lines[-2]["eta"].split(":"))
    assert 3600 * hours + 60 * minutes + seconds < PAUSE / 2
