"""The file in which a check keeps what it found: valid JSON at any moment, whenever the check is cut off."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import Part, write_json
from benchmarks.report import aligned, machine
from maskfeat.errors import UserError

PASSED, FAILED, HUNG, NOT_RUN, RUNNING = "passed", "failed", "hung", "not run", "running"
NO_TIME, NEEDS_CUDA = "no time left", "needs CUDA"


def now() -> str:
    """The time, for people."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe_machine() -> dict[str, Any]:
    """What the results depend on beside the code; CUDA is not started for it."""
    found = {**machine(torch.device("cpu")), "python": platform.python_version(), "cuda": torch.version.cuda}
    asked = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            found |= dict(zip(("gpu", *asked[1:]), (text.strip() for text in done.stdout.split(",")), strict=False))
    return found


class Results:
    """results.json of a folder, written anew after every change.

    Args:
        path: the file; what an earlier call left there is continued.
        device, toy: what the results are of.

    Raises:
        UserError: the file is of something else, or cannot be read.
    """

    def __init__(self, path: Path, device: str, toy: bool) -> None:
        self.path = path
        of = {"device": device, "toy": toy}
        self.content: dict[str, Any] = {"of": of, "calls": [], "parts": {}}
        if path.exists():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
                before = self.content["of"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is not a file of this program ({error}): give another --output") from error
            if before != of:
                raise UserError(f"{path} holds results of {before}, not of {of}: give another --output")

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """What is known of each part, by name."""
        parts: dict[str, dict[str, Any]] = self.content["parts"]
        return parts

    def begin(self, wheels: dict[str, str]) -> None:
        """Note a call of the program: command, machine, what was installed."""
        call = {"command": sys.argv, "at": now(), "machine": describe_machine(), "wheels": wheels}
        self.content["calls"].append(call)
        self.write()

    def is_done(self, part: Part) -> bool:
        """Whether a part has passed, and left nothing out for want of time."""
        found = self.parts.get(part.name, {})
        return found.get("status") == PASSED and not any(str(one).endswith(NO_TIME) for one in found.get("not_run", ()))

    def set(self, part: Part, status: str, **more: Any) -> None:
        """Replace what is known of a part."""
        self.parts[part.name] = {"group": part.group, "status": status, "at": now(), **more}
        self.write()

    def update(self, part: Part, **more: Any) -> None:
        """Change or add something of a part."""
        self.parts[part.name].update(more)
        self.write()

    def write(self) -> None:
        """Write the file."""
        write_json(self.path, self.content)

    def table(self, parts: Sequence[Part]) -> str:
        """How each of `parts` ended."""
        rows = [("part", "group", "result", "seconds", "")]
        for part in parts:
            found = self.parts.get(part.name, {"status": NOT_RUN, "why": ""})
            why = str(found.get("why", "")).strip().splitlines()
            seconds = found.get("seconds")
            rows.append((
                part.name,
                part.group,
                found["status"],
                "-" if seconds is None else f"{seconds:.1f}",
                why[-1][:100] if why else "",
            ))  # fmt: skip
        return aligned(rows)

    def not_run(self, parts: Sequence[Part]) -> list[str]:
        """What within those `parts` that ran was left out, and why."""
        return [f"{part.name}: {what}" for part in parts for what in self.parts.get(part.name, {}).get("not_run", ())]
