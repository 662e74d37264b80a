"""Heartbeats between the ranks of a run, and a report with stack traces when one of them hangs or dies.

Every rank regularly writes a heartbeat with its progress, its current activity and its stack to the shared store.
Rank 0 reads all heartbeats and the other ranks read that of rank 0, so that the traffic grows linearly with the number
of ranks. A process that is stopped or cut off from the network sends no heartbeats; one that hangs still sends them,
but makes no progress. Because heartbeats carry the stack, other ranks can report the stack of a stopped process.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.distributed import Store

from maskfeat.distributed.collectives import all_gather_object
from maskfeat.distributed.preemption import StopRequest
from maskfeat.distributed.world import World

logger = logging.getLogger(__name__)

SILENT_SECONDS = 3.0
"""Seconds without a heartbeat, beyond the heartbeat interval, after which a process counts as stopped or gone."""
_MAX_STOP_WAIT = 10.0  # seconds to wait for all ranks to learn of a stop request
_MAX_FRAMES = 24  # innermost frames of a stack that are kept
_MODULE_CALL = os.path.join("torch", "nn", "modules", "module.py")  # adds two frames per module without information


@dataclass
class _Peer:
    """The last heartbeat of another rank. Times are those of this process's monotonic clock."""

    received: float  # when the heartbeat arrived
    progressed: float  # when the rank, or any rank that it knew of, last made progress
    heartbeat: dict[str, Any]


class HangWatchdog:
    """Monitor the progress of all ranks in background threads until `close`.

    Args:
        world: Rank and world size of this process.
        store: Store shared by all ranks; None if there is only one.
        timeout: Seconds without progress of any rank after which a run of several ranks is ended with a report, and a
            single process logs a warning; 0 = never.
        stop: Stop request of this process; set when any rank was asked to stop.
        interval: Seconds between two heartbeats; at least 1/100 s per rank.
    """

    def __init__(
        self, world: World, store: Store | None, timeout: float, stop: StopRequest, interval: float = 1.0
    ) -> None:
        self._world, self._store, self._timeout, self._stop = world, store, timeout, stop
        self._interval = max(interval, world.size / 100)
        self._main_thread = threading.get_ident()
        self._processes = all_gather_object(f"{socket.gethostname()}, process {os.getpid()}")
        self._activity, self._steps, self._progressed = "starting", 0, time.monotonic()
        self._peers: dict[int, _Peer] = {}
        self._store_answered, self._store_lost = time.monotonic(), False
        self._closed = threading.Event()
        loops = [self._check_progress] if timeout else []
        if store is not None:
            loops.append(self._exchange_heartbeats)
        for loop in loops:
            threading.Thread(target=loop, name=f"HangWatchdog.{loop.__name__}", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Record progress of this process.

        Args:
            doing: What it does next, for reports, such as "epoch 3, step 7".
        """
        self._activity, self._progressed = doing, time.monotonic()
        self._steps += 1

    def proceed(self, doing: str) -> None:
        """Record progress like `beat`, and stop if any rank was asked to stop.

        For work that has nothing to save and in which ranks are not synchronized, such as validation.

        Raises:
            Preempted: A rank was asked to stop. Raised only after every rank knows of the request, so that none takes
                the end of this process for a failure.
        """
        self.beat(doing)
        if self._stop:
            end = time.monotonic() + _MAX_STOP_WAIT + 3 * self._interval
            while self._store is not None and not self._all_know_of_stop() and time.monotonic() < end:
                time.sleep(0.05)
        self._stop.check()

    def _all_know_of_stop(self) -> bool:
        """Return whether every rank knows of the stop request; True as well if the store cannot be reached."""
        if self._store_lost:
            return True
        if self._world.is_main:
            informed = [peer for peer in list(self._peers.values()) if peer.heartbeat["stop"]]
            return len(informed) == self._world.size - 1
        return 0 in self._peers and self._peers[0].heartbeat["all_know_of_stop"]

    def close(self) -> None:
        """Stop monitoring: what follows may take any time."""
        self._closed.set()

    def gone(self, wait: float = SILENT_SECONDS) -> str:
        """Describe the ranks that send no heartbeats. To be called after a collective failed.

        Args:
            wait: Seconds, in addition to the heartbeat interval, to wait for heartbeats.

        Returns:
            "" if all ranks send heartbeats, or if there is only one rank.
        """
        if self._store is None:
            return ""
        self._closed.wait(self._interval + wait)
        return "; ".join(self._describe(rank) for rank in self._silent_ranks(wait))

    def _exchange_heartbeats(self) -> None:
        """Write and read heartbeats, in a thread of its own because the store may block."""
        number = 0
        while not self._closed.wait(self._interval if number else 0.0):
            number += 1
            heartbeat = {
                "number": number,
                "steps": self._steps,
                "activity": self._activity,
                # Rank 0 answers for all. The others speak for themselves: they would hand back to it what they have
                # heard from it, each time a little later, and no hang would be as long as it is.
                "idle": time.monotonic() - (self._last_progress() if self._world.is_main else self._progressed),
                "stop": self._stop.reason,
                "all_know_of_stop": self._world.is_main and self._all_know_of_stop(),
                "stack": self._stack(),
            }
            try:
                self._store.set(f"heartbeat {self._world.rank}", json.dumps(heartbeat))  # type: ignore[union-attr]
                self._read_heartbeats(range(self._world.size) if self._world.is_main else (0,))
            except Exception as error:  # of any type once rank 0, which hosts the store, is gone for good
                logger.debug("no answer from the store: %s", error)
                self._store_lost = True
                return
            self._store_answered = time.monotonic()

    def _read_heartbeats(self, ranks: Sequence[int]) -> None:
        assert self._store is not None
        for rank in ranks:
            key = f"heartbeat {rank}"
            if rank == self._world.rank or not self._store.check([key]):
                continue
            heartbeat = json.loads(self._store.get(key))
            known = self._peers.get(rank)
            if known is None or known.heartbeat["number"] != heartbeat["number"]:
                now = time.monotonic()
                self._peers[rank] = _Peer(now, now - heartbeat["idle"], heartbeat)
            if heartbeat["stop"]:
                self._stop.ask(heartbeat["stop"])

    def _last_progress(self) -> float:
        """Return when any rank last made progress.

        Ranks may wait for one another, at the end of a validation for example, which is not a hang.
        """
        return max([self._progressed, *(peer.progressed for peer in list(self._peers.values()))])

    def _silent_ranks(self, limit: float) -> list[int]:
        """Return the ranks without a heartbeat for `limit` seconds in addition to the interval."""
        now, limit = time.monotonic(), limit + self._interval
        if now - self._store_answered > limit:  # rank 0 hosts the store
            return [] if self._world.is_main else [0]
        return [rank for rank, peer in sorted(self._peers.items()) if now - peer.received > limit]

    def _describe(self, rank: int) -> str:
        """Return the host and process of a rank, and its last activity."""
        peer = self._peers.get(rank)
        if peer is None:
            return f"rank {rank} ({self._processes[rank]}; no heartbeat yet)"
        silence = time.monotonic() - peer.received
        return f"rank {rank} ({self._processes[rank]}; silent for {silence:.0f} s, last {peer.heartbeat['activity']})"

    def _check_progress(self) -> None:
        """End the process once no rank has made progress for too long; a single process logs a warning instead."""
        checked = time.monotonic()
        reported = -1
        while not self._closed.wait(0.5):
            now = time.monotonic()
            # This process was stopped itself, by Ctrl-Z for example, and others may have been stopped with it.
            if now - checked > self._interval + SILENT_SECONDS:
                self._progressed = self._store_answered = now
                for peer in self._peers.values():
                    peer.received = peer.progressed = now
            checked = now
            stuck = now - self._last_progress()
            if stuck <= self._timeout or reported == self._steps:
                continue
            if self._world.size == 1:
                reported = self._steps
                where = "\n  ".join(self._stack())
                logger.warning("no progress for %d s, %s (HANG_MINUTES); at\n  %s", stuck, self._activity, where)
                continue
            silent = self._silent_ranks(SILENT_SECONDS)
            reporter = min(set(range(self._world.size)) - set(silent))
            if reporter != self._world.rank and stuck <= self._timeout + 5:
                continue  # one report is enough, that of the lowest rank that answers
            if reporter == self._world.rank:
                logger.error("%s", self._report(stuck, silent))
                faulthandler.dump_traceback(all_threads=True)
            os._exit(1)

    def _stack(self) -> list[str]:
        """Return the stack of the main thread, outermost frame first."""
        frame = sys._current_frames().get(self._main_thread)
        if frame is None:
            return []
        # Without source lines, for which every heartbeat would access the file system.
        codes = ((one.f_code, line) for one, line in traceback.walk_stack(frame))
        calls = (f"{c.co_filename}:{n} in {c.co_name}" for c, n in codes if not c.co_filename.endswith(_MODULE_CALL))
        return list(islice(calls, _MAX_FRAMES))[::-1]

    def _report(self, stuck: float, silent: list[int]) -> str:
        """Return a report that names the ranks that block the run and gives the stacks of all."""
        steps = {rank: peer.heartbeat["steps"] for rank, peer in self._peers.items()} | {self._world.rank: self._steps}
        behind = [rank for rank in sorted(steps) if steps[rank] < max(steps.values())]
        lines = [f"HANG: no progress for {stuck:.0f} s, {self._activity} (HANG_MINUTES {self._timeout / 60:g})"]
        if silent:
            lines += [f"not answering: {self._describe(rank)}" for rank in silent]
        elif behind:
            lines += [f"behind the others: {self._describe(rank)}" for rank in behind if rank in self._peers]
            lines += ["behind the others: this process"] if self._world.rank in behind else []
        else:
            lines.append("no process is silent or behind: they wait for one another, or for the network")
        stacks = {rank: peer.heartbeat["stack"] for rank, peer in self._peers.items()}
        stacks[self._world.rank] = self._stack()
        alike: dict[str, list[int]] = {}
        for rank in sorted(stacks):
            alike.setdefault("\n  ".join(stacks[rank]), []).append(rank)
        lines += [f"stack of rank {', '.join(map(str, ranks))}:\n  {stack}" for stack, ranks in alike.items()]
        return "\n".join([*lines, f"reported by rank {self._world.rank}"])
