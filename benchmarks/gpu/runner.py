"""Runs parts one after another, each in a process group of its own, and keeps what they find."""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import Part
from benchmarks.gpu.processes import Process, Server, end_family, start
from benchmarks.gpu.results import FAILED, HUNG, NEEDS_CUDA, NO_TIME, NOT_RUN, PASSED, RUNNING, Results
from benchmarks.gpu.worker import outcome_file

logger = logging.getLogger(__name__)

_LOOK = 0.1  # seconds between two looks at a part
_TOY = 5  # a toy run has so many times the limits: continuous integration has slow and busy machines
_LEAST = 0.5  # share of its limit that a part must find left to be started


class Runner:
    """One call of the program.

    Args:
        results: where what is found is kept.
        output: folder of logs and of what parts write.
        device, toy: see `Context`.
        table: the module whose PARTS a part's process looks itself up in.
        ends: when (`time.monotonic`) the time of the call is over.
    """

    def __init__(
        self, results: Results, output: Path, device: torch.device, toy: bool, table: str, ends: float
    ) -> None:
        self.results, self.output, self.device, self.toy = results, output, device, toy
        self.table, self.ends = table, ends
        self._server: Server | None = None

    def run(self, parts: Sequence[Part], again: bool = False) -> int:
        """Run parts that have not passed yet (`again`: all), as long as there is time.

        Returns:
            the exit code: 1 where a part failed or hung.
        """
        wanted = [part for part in parts if again or not self.results.is_done(part)]
        try:
            self._run_all(wanted)
        finally:
            if self._server is not None:
                self._server.close()
        states = [self.results.parts.get(part.name, {}).get("status") for part in parts]
        return int(FAILED in states or HUNG in states)

    def _run_all(self, wanted: Sequence[Part]) -> None:
        """Run parts in their order."""
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        forked = [part for part in wanted if not part.environment and not self._needs_cuda(part)]
        if forked:
            self._server = Server(self.table, self.device.type == "cuda", self.output / "logs" / "server.log")
        for number, part in enumerate(wanted, 1):
            if self._needs_cuda(part):
                self.results.set(part, NOT_RUN, why=NEEDS_CUDA)
                continue
            left, limit = self.ends - time.monotonic(), part.seconds * (_TOY if self.toy else 1)
            if left < limit * _LEAST:
                self.results.set(part, NOT_RUN, why=NO_TIME)
                continue
            logger.info("[%d/%d] %s (at most %.0f s) ...", number, len(wanted), part.name, min(left, limit))
            self._run(part, min(left, limit), cut=left < limit)
            found = self.results.parts[part.name]
            logger.info("    %s in %.1f s  %s", found["status"], found["seconds"], found.get("why", ""))

    def _needs_cuda(self, part: Part) -> bool:
        """Whether a part cannot run on this device."""
        return part.cuda and self.device.type != "cuda"

    def _start(self, part: Part, limit: float, log: Path) -> Process:
        """Start the process of a part: a fork, unless it needs variables that are read at import."""
        arguments = ["--part", part.name, "--table", self.table, "--seconds", str(limit)]
        arguments += ["--output", str(self.output), "--device", str(self.device), *(["--toy"] if self.toy else [])]
        if part.environment:
            interpreted = {} if self.device.type == "cuda" else {"TRITON_INTERPRET": "1"}
            return start(arguments, log, {**part.environment, **interpreted})
        server = self._server
        if server is not None and server.usable:
            with suppress(BrokenPipeError):
                return server.start(arguments, log)
            server.usable = False
        return start(arguments, log, {})

    def _run(self, part: Part, limit: float, cut: bool) -> None:
        """Run one part; `cut`: it gets less than its own limit."""
        log, outcome = self.output / "logs" / f"{part.name}.log", outcome_file(self.output, part.name)
        outcome.parent.mkdir(parents=True, exist_ok=True)
        outcome.unlink(missing_ok=True)
        self.results.set(part, RUNNING)
        began = time.monotonic()
        process = self._start(part, limit, log)
        try:
            hung = self._wait(part, process, outcome, began + limit)
        finally:
            code = end_family(process)
        found: dict[str, Any] = {"seconds": round(time.monotonic() - began, 2), **_read(outcome)}
        done, why = found.pop("done", False), found.pop("why", "")
        if hung and cut:
            status, why = NOT_RUN, f"{NO_TIME} after {limit:.0f} s"
        elif hung:
            status, why = HUNG, f"stopped after {limit:.0f} s; its last lines are in {log}"
        elif done and not why and code == 0:
            status = PASSED
        else:
            status, why = FAILED, why or f"its process ended with {_code(code)}: {_last_line(log)}"
        self.results.set(part, status, **({"why": why} if why else {}), **found)

    def _wait(self, part: Part, process: Process, outcome: Path, until: float) -> bool:
        """Wait for the end of a part and note figures as they come; return whether it had to be stopped."""
        seen = 0.0
        while process.poll() is None:
            if time.monotonic() > until:
                return True
            time.sleep(_LOOK)
            with suppress(OSError):
                changed = outcome.stat().st_mtime
                if changed != seen:
                    seen = changed
                    self.results.update(part, **_read(outcome))
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def _code(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
