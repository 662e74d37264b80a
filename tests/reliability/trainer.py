"""tools/run_net.py with a fault in it, or a record of what it reads. Run as a script: spawned processes import it.

RECORD_TO=FOLDER      every rank writes the samples of each step to FOLDER/rank_0.jsonl
HANG_AT=RANK,STEP     that rank sleeps before that step (from 0)
STOP_AFTER=EPOCH      rank 0 alone is sent SIGTERM as it begins the validation after that epoch (from 1)
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from maskfeat.data.loader import Loader  # noqa: E402
from maskfeat.distributed.hang_watchdog import HangWatchdog  # noqa: E402
from maskfeat.engine.run import main  # noqa: E402
from maskfeat.engine.validation import Validator  # noqa: E402

_iterate, _beat, _validate = Loader.__iter__, HangWatchdog.beat, Validator.run


def _recorded(self: Loader) -> Iterator[Any]:
    sampler = self.sampler
    path = Path(os.environ["RECORD_TO"]) / f"rank_{sampler.rank}.jsonl"
    for step, batch in enumerate(_iterate(self), start=sampler.start):
        line = {"epoch": sampler.epoch, "step": step, "rank": sampler.rank, "index": batch.index.tolist()}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        yield batch


def _hanging(self: HangWatchdog, status: str) -> None:
    rank, at = (int(part) for part in os.environ["HANG_AT"].split(","))
    if self._world.rank == rank and status.endswith(f"waiting for data after step {at}"):
        fall_asleep()
    _beat(self, status)


def fall_asleep() -> None:
    """A name to look for in a stack."""
    time.sleep(600)


def _stopped(self: Validator, epoch: int) -> None:
    if self._trainer.world.is_main and epoch + 1 == int(os.environ["STOP_AFTER"]):
        os.kill(os.getpid(), signal.SIGTERM)
    _validate(self, epoch)


if "RECORD_TO" in os.environ:
    Loader.__iter__ = _recorded  # type: ignore[method-assign]
if "HANG_AT" in os.environ:
    HangWatchdog.beat = _hanging  # type: ignore[method-assign]

if "STOP_AFTER" in os.environ:
    Validator.run = _stopped  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
