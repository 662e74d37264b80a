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
from maskfeat.engine import trainer as training  # noqa: E402
from maskfeat.engine.run import main  # noqa: E402

_iterate, _state, _validate = Loader.__iter__, training._Checks.after_step, training._validate


def _recorded(self: Loader) -> Iterator[Any]:
    sampler = self.sampler
    path = Path(os.environ["RECORD_TO"]) / f"rank_{sampler.rank}.jsonl"
    for step, batch in enumerate(_iterate(self), start=sampler.start):
        line = {"epoch": sampler.epoch, "step": step, "rank": sampler.rank, "index": batch.index.tolist()}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        yield batch


def _hanging(self: Any, epoch: int, step: int) -> None:
    rank, at = (int(part) for part in os.environ["HANG_AT"].split(","))
    _state(self, epoch, step)
    watch: HangWatchdog = self._watch
    if watch._world.rank == rank and step == at:
        fall_asleep()


def fall_asleep() -> None:
    """A name to look for in a stack."""
    time.sleep(600)


def _stopped(*args: Any) -> None:
    epoch, watch = args[-2:]
    if watch._world.is_main and epoch + 1 == int(os.environ["STOP_AFTER"]):
        os.kill(os.getpid(), signal.SIGTERM)
    _validate(*args)


if "RECORD_TO" in os.environ:
    Loader.__iter__ = _recorded  # type: ignore[method-assign]
if "HANG_AT" in os.environ:
    training._Checks.after_step = _hanging  # type: ignore[method-assign]

if "STOP_AFTER" in os.environ:
    training._validate = _stopped

if __name__ == "__main__":
    sys.exit(main())
