"""How long a run has made no progress, as its processes believe."""

import time

import pytest
import torch.distributed as dist

from maskfeat.distributed.hang_watchdog import HangWatchdog
from maskfeat.distributed.preemption import StopRequest
from maskfeat.distributed.world import World


@pytest.mark.parametrize("size", [2, 4])
def test_what_a_process_hears_is_not_its_own_progress(size: int) -> None:
    """Handed on from one to another, progress of long ago would seem to be of now."""
    store = dist.HashStore()
    dogs = [HangWatchdog(World(rank, size, rank, size), store, 0.0, StopRequest(), 0.1) for rank in range(size)]
    began = time.monotonic()
    dogs[-1].beat("the last that anybody does")
    time.sleep(3.0)
    now = time.monotonic()
    found = [now - dog._last_progress() for dog in dogs]
    for dog in dogs:
        dog.close()
    assert all(now - began - 0.8 < idle <= now - began for idle in found), found
