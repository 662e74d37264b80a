"""Folders of runs, written as a run writes them."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from maskfeat.report.run_log import STATS, started

MODEL = "MaskFeat, 2.85 M parameters, on 1 x CPU, fp32 precision (evaluation: fp32)"


class Log:
    """The lines of a stdout.log; `now` is the time of the next one."""

    def __init__(self, now: datetime = datetime(2026, 11, 1)) -> None:
        self.now, self.lines = now, [""]

    def say(self, text: str, seconds: float = 0.0) -> None:
        self.now += timedelta(seconds=seconds)
        self.lines.append(f"[{self.now:%m/%d %H:%M:%S}] {text}")

    def start(self, task: str = "", pause: float = 0.0) -> None:
        self.say(started("commit 1234abc+", "2.14.0+cpu", "host7 (Some CPU, 2 cores)", task), pause)
        self.say(MODEL)

    def stats(self, kind: str, values: Mapping[str, Any], seconds: float = 0.0) -> None:
        self.say(STATS + json.dumps({"_type": kind, **values}), seconds)

    def train(self, epoch: int, step: int, steps: int, loss: float | str, epochs: int = 4, **more: Any) -> None:
        values = {"epoch": f"{epoch}/{epochs}", "iter": f"{step}/{steps}", "loss": loss, **more, "eta": "1:00:00"}
        self.stats("train_iter", values, seconds=10)

    def validate(self, epoch: int, epochs: int = 4, **values: float) -> None:
        self.stats("val_epoch", {"epoch": f"{epoch}/{epochs}", **values})

    def text(self) -> str:
        return "\n".join(self.lines[1:]) + "\n"


def write_run(folder: Path, log: Log | str, config: str = "", overrides: Sequence[tuple[str, str]] = ()) -> Path:
    """Write the files of a run, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stdout.log").write_text(log if isinstance(log, str) else log.text(), encoding="utf-8")
    if config:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    if overrides:
        lines = [f"# override: {json.dumps(pair)}\n" for pair in overrides]
        (folder / "config_given.yaml").write_text("".join(lines), encoding="utf-8")
    return folder


def whole(loss: float = 0.5) -> Log:
    """A run of four epochs of ten steps, validated after each."""
    log = Log()
    log.start()
    for epoch in range(1, 5):
        for step in (5, 10):
            log.train(epoch, step, 10, loss / epoch, lr=1e-3, skipped=0, samples_per_second=100.0 + step)
        log.validate(epoch, loss=loss / epoch, top1=[0.0, 40.0, 60.0, 55.5, 50.25][epoch])
    return log
