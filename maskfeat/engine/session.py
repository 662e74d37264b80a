"""What surrounds the work of a process: logging, process group, watchdog, signals, and errors as exit codes."""

import logging
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
from yacs.config import CfgNode

from maskfeat.data.bad_samples import TooManyBadSamples
from maskfeat.distributed.collectives import destroy_process_group, init_process_group, is_collective_error
from maskfeat.distributed.hang_watchdog import HangWatchdog
from maskfeat.distributed.preemption import PREEMPTED, Preempted, StopRequest
from maskfeat.distributed.world import World, choose_device
from maskfeat.engine.metrics_log import MetricsLog, setup_logging
from maskfeat.engine.oom import explain_oom

logger = logging.getLogger(__name__)

# What the user, or the administrator of the machine, can fix: reported in one line, without a traceback.
EXPECTED = (ValueError, TooManyBadSamples, FloatingPointError, OSError)


class Session:
    """What one process of a run works with, as a context manager that turns errors into an exit code.

    An error that a user can fix, a preemption and the loss of another process are logged and end in `exit_code`; any
    other error is raised.

    Args:
        cfg: the config of the run.
        world: this process and how many there are.

    Attributes:
        stop: whether this process was asked to stop.
        exit_code: of the process, once the block has ended.
        device, watchdog, metrics_log: after `start`.
    """

    device: torch.device
    watchdog: HangWatchdog
    metrics_log: MetricsLog

    def __init__(self, cfg: CfgNode, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.stop, self.exit_code = StopRequest(), 0
        self._signals, self._closing = ExitStack(), ExitStack()

    def start(self, init_method: str = "") -> None:
        """Set up logging, listen for signals, join the process group and start the hang watchdog.

        Args:
            init_method: tcp:// address at which the processes meet; "" where there is only one.
        """
        cfg, world = self.cfg, self.world
        setup_logging(cfg.OUTPUT_DIR, world)
        self._signals.enter_context(self.stop.listening())
        self.device = choose_device(cfg.NUM_GPUS, world.local_rank)
        # Collectives time out after the watchdog does, whose report says more than their error.
        timeout = timedelta(minutes=cfg.HANG_MINUTES + 5) if cfg.HANG_MINUTES else timedelta(days=1)
        store = init_process_group(world, cfg.DIST_BACKEND, self.device, init_method, timeout)
        self.watchdog = HangWatchdog(world, store, 60 * cfg.HANG_MINUTES, self.stop)
        self._closing.callback(self.watchdog.close)
        folder = Path(cfg.OUTPUT_DIR) / cfg.TENSORBOARD.LOG_DIR if cfg.TENSORBOARD.ENABLE else None
        self.metrics_log = MetricsLog(world, folder)
        self._signals.callback(self.metrics_log.close)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        with self._closing:
            if error is None or isinstance(error, Preempted):
                self._signals.callback(destroy_process_group)
            self._signals.close()
            code = None
            if isinstance(error, Preempted):
                code = self._preempted(str(error))
            elif isinstance(error, (*EXPECTED, RuntimeError, MemoryError, EOFError)):
                code = self._explain(error)
            self.exit_code = code or 0
            return code is not None

    def _explain(self, error: Exception) -> int | None:
        """Log what ended the process; its exit code, or None where the traceback says more."""
        world = self.world
        memory = None if isinstance(error, TooManyBadSamples) else explain_oom(error, self.cfg, world.local_size)
        if memory is not None or isinstance(error, EXPECTED):
            if world.is_main or memory or isinstance(error, TooManyBadSamples | OSError):
                logger.error("error: %s", memory or error)
            return 2
        if self.stop and world.size > 1:  # the other ranks have left, in the middle of something that needs no saving
            return self._preempted(self.stop.reason)
        watchdog = getattr(self, "watchdog", None)
        gone = watchdog.gone(1.0) if watchdog is not None and is_collective_error(error) else ""
        if not gone:
            return None
        logger.error("error: gone, or cut off from this process (rank %d): %s: %s", world.rank, gone, error)
        return 1

    def _preempted(self, reason: str) -> int:
        if self.world.is_main:
            logger.info(
                "stopped on %s; the same command resumes from here (exit code %d: requeue me)", reason, PREEMPTED
            )
        return PREEMPTED
