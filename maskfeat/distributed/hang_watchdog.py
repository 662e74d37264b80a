"""Which processes of a run still make progress: a report, with stacks, where one hangs or is gone.

Every process tells the others, once in a while, how far it is and what it is doing, through the store that they share:
its beat. Rank 0 reads all beats, the others that of rank 0, so that the traffic grows with the number of processes
and not with its square. A process that is stopped or cut off falls silent; one that hangs goes on beating, but its
work does not proceed. The stack travels with the beat: that of a process which is stopped can be told by others.
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
"""Seconds without a beat, beyond the time from beat to beat, after which a process is taken for stopped or gone."""
_TELL = 10.0  # seconds that a process which was asked to stop waits at most until the others know
_FRAMES = 24  # of a stack, innermost
_WRAPPER = os.path.join("torch", "nn", "modules", "module.py")  # two frames a module, which say nothing


@dataclass
class _Peer:
    """Another process as this one knows it."""

    heard: float  # when its last beat came in, by this process's clock
    moved: float  # when its work was last known to proceed
    beat: dict[str, Any]


class HangWatchdog:
    """Follows this process and the others, from threads of its own, until `close`.

    Args:
        world: where this process stands.
        store: shared by all processes; None where there is only one.
        patience: seconds without progress after which a run of several processes is ended, with a report, and one
            process alone is reported; 0 = never.
        stop: asked to stop where any process was.
        interval: seconds between two beats.
    """

    def __init__(
        self, world: World, store: Store | None, patience: float, stop: StopRequest, interval: float = 1.0
    ) -> None:
        self._world, self._store, self._patience, self._stop = world, store, patience, stop
        self._interval = max(interval, world.size / 100)
        self._main = threading.get_ident()
        self._who = all_gather_object(f"{socket.gethostname()}, process {os.getpid()}")
        self._doing, self._steps, self._since = "starting", 0, time.monotonic()
        self._peers: dict[int, _Peer] = {}
        self._answered, self._deaf = time.monotonic(), False  # the store
        self._closed = threading.Event()
        jobs = [self._guard] if patience else []
        if store is not None:
            jobs.append(self._talk)
        for job in jobs:
            threading.Thread(target=job, name=f"watch {job.__name__}", daemon=True).start()

    def beat(self, doing: str) -> None:
        """The work of this process proceeds; what it turns to, in words."""
        self._doing, self._since = doing, time.monotonic()
        self._steps += 1

    def proceed(self, doing: str) -> None:
        """`beat`, for work that needs no saving and in which ranks are not in step, such as validation.

        Raises:
            Preempted: where this process or another one was asked to stop; not before every process has heard of it,
                for those that then miss this one must know why.
        """
        self.beat(doing)
        if self._stop:
            end = time.monotonic() + _TELL + 3 * self._interval
            while self._store is not None and not self._has_told() and time.monotonic() < end:
                time.sleep(0.05)
        self._stop.check()

    def _has_told(self) -> bool:
        """Whether every process knows that the run stops, as far as this one can find out."""
        if self._deaf:
            return True
        if self._world.is_main:
            known = [peer for peer in list(self._peers.values()) if peer.beat["stop"]]
            return len(known) == self._world.size - 1
        return 0 in self._peers and self._peers[0].beat["told"]

    def close(self) -> None:
        """End of the watch. What follows may take its time."""
        self._closed.set()

    def gone(self, wait: float = SILENT_SECONDS) -> str:
        """Who is silent, in words, or "": asked when a collective failed, it listens for another `wait` seconds."""
        if self._store is None:
            return ""
        self._closed.wait(self._interval + wait)
        return "; ".join(self._describe(rank) for rank in self._silent(wait))

    def _talk(self) -> None:
        """Send beats and read those of others; where the store blocks, only this thread waits."""
        number = 0
        while not self._closed.wait(self._interval if number else 0.0):
            number += 1
            beat = {
                "number": number,
                "steps": self._steps,
                "doing": self._doing,
                "idle": time.monotonic() - self._newest(),
                "stop": self._stop.reason,
                "told": self._world.is_main and self._has_told(),
                "stack": self._stack(),
            }
            try:
                self._store.set(f"beat {self._world.rank}", json.dumps(beat))  # type: ignore[union-attr]
                self._read(range(self._world.size) if self._world.is_main else (0,))
            except Exception as error:  # whatever it raises when its host is gone, which does not come back
                logger.debug("no answer from the store: %s", error)
                self._deaf = True
                return
            self._answered = time.monotonic()

    def _read(self, ranks: Sequence[int]) -> None:
        assert self._store is not None
        for rank in ranks:
            key = f"beat {rank}"
            if rank == self._world.rank or not self._store.check([key]):
                continue
            beat = json.loads(self._store.get(key))
            known = self._peers.get(rank)
            if known is None or known.beat["number"] != beat["number"]:
                now = time.monotonic()
                self._peers[rank] = _Peer(now, now - beat["idle"], beat)
            if beat["stop"]:
                self._stop.ask(beat["stop"])

    def _newest(self) -> float:
        """When the work of any process was last known to proceed: ranks wait for one another at the end of a
        validation, say, and that is no hang."""
        return max([self._since, *(peer.moved for peer in list(self._peers.values()))])

    def _silent(self, limit: float) -> list[int]:
        """Who has not been heard for longer than `limit` seconds beyond the time from beat to beat."""
        now, limit = time.monotonic(), limit + self._interval
        if now - self._answered > limit:  # the store answers nobody: it lives with rank 0
            return [] if self._world.is_main else [0]
        return [rank for rank, peer in sorted(self._peers.items()) if now - peer.heard > limit]

    def _describe(self, rank: int) -> str:
        """Which process, and what was last heard of it."""
        peer = self._peers.get(rank)
        if peer is None:
            return f"rank {rank} ({self._who[rank]}; never heard)"
        silence = time.monotonic() - peer.heard
        return f"rank {rank} ({self._who[rank]}; silent for {silence:.0f} s, last {peer.beat['doing']})"

    def _guard(self) -> None:
        """Ends the process, or reports it where it is alone, once nothing has proceeded for too long."""
        looked = time.monotonic()
        reported = -1
        while not self._closed.wait(0.5):
            now = time.monotonic()
            if (
                now - looked > self._interval + SILENT_SECONDS
            ):  # it was stopped itself (Ctrl-Z), and others may have been
                self._since = self._answered = now
                for peer in self._peers.values():
                    peer.heard = peer.moved = now
            looked = now
            stuck = now - self._newest()
            if stuck <= self._patience or reported == self._steps:
                continue
            if self._world.size == 1:
                reported = self._steps
                where = "\n  ".join(self._stack())
                logger.warning("no progress for %d s, %s (HANG_MINUTES); at\n  %s", stuck, self._doing, where)
                continue
            silent = self._silent(SILENT_SECONDS)
            reporter = min(set(range(self._world.size)) - set(silent))
            if reporter != self._world.rank and stuck <= self._patience + 5:
                continue  # it knows more, and one report is enough
            if reporter == self._world.rank:
                logger.error("%s", self._report(stuck, silent))
                faulthandler.dump_traceback(all_threads=True)
            os._exit(1)

    def _stack(self) -> list[str]:
        """Where this process's work is, outermost first."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return []
        # Told with every beat, so no source is looked up, which would ask the file system for every file.
        codes = ((one.f_code, line) for one, line in traceback.walk_stack(frame))
        told = (f"{c.co_filename}:{line} in {c.co_name}" for c, line in codes if not c.co_filename.endswith(_WRAPPER))
        return list(islice(told, _FRAMES))[::-1]

    def _report(self, stuck: float, silent: list[int]) -> str:
        """Who holds the others up, and where everybody is."""
        steps = {rank: peer.beat["steps"] for rank, peer in self._peers.items()} | {self._world.rank: self._steps}
        behind = [rank for rank in sorted(steps) if steps[rank] < max(steps.values())]
        lines = [f"HANG: no progress for {stuck:.0f} s, {self._doing} (HANG_MINUTES {self._patience / 60:g})"]
        if silent:
            lines += [f"not answering: {self._describe(rank)}" for rank in silent]
        elif behind:
            lines += [f"behind the others: {self._describe(rank)}" for rank in behind if rank in self._peers]
            lines += ["behind the others: this process"] if self._world.rank in behind else []
        else:
            lines.append("no process is silent or behind: they wait for one another, or for the network")
        stacks = {rank: peer.beat["stack"] for rank, peer in self._peers.items()} | {self._world.rank: self._stack()}
        alike: dict[str, list[int]] = {}
        for rank in sorted(stacks):
            alike.setdefault("\n  ".join(stacks[rank]), []).append(rank)
        lines += [f"stack of rank {', '.join(map(str, ranks))}:\n  {stack}" for stack, ranks in alike.items()]
        return "\n".join([*lines, f"this is rank {self._world.rank}"])
