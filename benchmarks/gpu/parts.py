"""What a check on a GPU is made of: parts, each run in a process of its own, and what they are given.

Nothing but PyTorch is imported here: the program starts on machines where the rest is still to be installed.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

CORRECTNESS, SPEED, LEARNING = "correctness", "speed", "learning"
GROUPS = (CORRECTNESS, SPEED, LEARNING)

Figures = dict[str, Any]
"""What a part found out: anything that JSON can hold."""


class Failed(Exception):
    """A wrong result; the text says what was found and what was expected."""


def write_json(path: Path, content: object) -> None:
    """Write a file so that its readers see all of it or what it held before, whenever the process is killed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


@dataclass
class Context:
    """What a part works with.

    Attributes:
        device: where to compute.
        toy: the smallest sizes at which every path is taken: this machine is to check the program, not itself.
        folder: a new folder for the files of the part, gone afterwards.
        data: a folder for files that parts share; it stays.
        seconds: how long the part may run.
        partial: file in which `note` leaves figures.
    """

    device: torch.device
    toy: bool
    folder: Path
    data: Path
    seconds: float
    partial: Path
    began: float = field(default_factory=time.monotonic)
    figures: Figures = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def needs_cuda(self, what: str) -> bool:
        """Whether the device is a GPU; where it is none, `what` is listed as "not run"."""
        if not self.cuda:
            self.not_run.append(f"{what}: needs CUDA")
            self.note()
        return self.cuda

    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.seconds - (time.monotonic() - self.began)

    def note(self, **figures: object) -> None:
        """Keep figures at once. They stay if the part fails, hangs or runs out of time, and are joined with those it
        returns."""
        self.figures.update(figures)
        write_json(self.partial, {"figures": self.figures, "not_run": self.not_run})


class Part(NamedTuple):
    """One thing to find out.

    Attributes:
        name: unique.
        group: one of `GROUPS`.
        seconds: after so many it is stopped, with all processes that it started.
        run: finds it out; returns figures, raises `Failed` for a wrong result.
        covers: code paths of the package that only CUDA takes and that this part reaches, as
            "models/pooling.py:_forward" (a file of maskfeat/ and a function; the file alone for what is in none).
        cuda: there is nothing to run on a CPU.
        environment: variables of the part's process, for those that are read at import.
    """

    name: str
    group: str
    seconds: float
    run: Callable[[Context], Figures]
    covers: tuple[str, ...] = ()
    cuda: bool = False
    environment: Mapping[str, str] = {}
