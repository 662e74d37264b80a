"""What surrounds the work of a process: logging, process group, watchdog, signals, and errors as exit codes."""

import hashlib
import logging
import platform
import queue
import signal
import threading
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
from torch.distributed import DistStoreError, Store
from yacs.config import CfgNode

from maskfeat.config.show import flat
from maskfeat.distributed.collectives import destroy_process_group, init_process_group, is_collective_error
from maskfeat.distributed.hang_watchdog import HangWatchdog
from maskfeat.distributed.preemption import INTERRUPTED, PREEMPTED, STOPPED, Preempted, StopRequest
from maskfeat.distributed.world import World, choose_device
from maskfeat.engine.agreement import check_same_config
from maskfeat.engine.metrics_log import MetricsLog, logged_to_file, setup_logging
from maskfeat.engine.oom import explain_oom
from maskfeat.engine.owner import owned, owner_of
from maskfeat.engine.parallelize import choose_kernels
from maskfeat.engine.provenance import machine, revision
from maskfeat.engine.trackers import TENSORBOARD, About, Trackers
from maskfeat.errors import UserError, naming
from maskfeat.progress import close_lines
from maskfeat.report.command import write_report
from maskfeat.report.run_log import started

logger = logging.getLogger(__name__)

ANSWER = 0.75
"""Seconds that a rank waits for rank 0 to meet the error that it has met."""


def _appears(store: Store, key: str) -> bool:
    """Whether a key is set within ANSWER seconds."""
    try:
        store.wait([key], timedelta(seconds=ANSWER))
    except DistStoreError:
        return False
    return True


class Session:
    """What one process of a run works with, as a context manager that turns errors into an exit code.

    A `UserError`, memory that ran out, a preemption and the loss of another process are logged in a line each, and any
    other error with its traceback. All end in `exit_code`.

    Args:
        cfg: the config of the run.
        world: this process and how many there are.

    Attributes:
        stop: whether this process was asked to stop.
        exit_code: of the process, once the block has ended.
        has_results: whether OUTPUT_DIR holds more than before, which a report at the end then shows (LOG.REPORT).
        testing: whether the run has come to its test.
        device, watchdog, metrics_log: after `start`.
    """

    device: torch.device
    watchdog: HangWatchdog
    metrics_log: MetricsLog

    def __init__(self, cfg: CfgNode, world: World) -> None:
        self.cfg, self.world = cfg, world
        self.stop, self.exit_code, self.has_results = StopRequest(), 0, False
        self.testing = not cfg.TRAIN.ENABLE
        self._store: Store | None = None
        self._connections, self._closing = ExitStack(), ExitStack()

    def start(self, init_method: str = "") -> None:
        """Set up logging, listen for signals, join the process group and start the hang watchdog.

        Args:
            init_method: tcp:// address at which the processes meet; "" where there is only one.
        """
        cfg, world = self.cfg, self.world
        setup_logging(world)
        if world.is_main:
            if cfg.TRAIN.ENABLE:  # a test may be run while training goes on
                self._closing.enter_context(owned(Path(cfg.OUTPUT_DIR)))
            with naming(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written"):
                self._closing.enter_context(logged_to_file(cfg.OUTPUT_DIR))
            where = f"{platform.node()} ({machine()})"
            logger.info(started(revision(), torch.__version__, where, cfg.TASK))
        # To the end of all: srun and others end the rest of a run once one of its processes has left, and whoever has
        # saved and is about to leave keeps its own exit code.
        self._closing.enter_context(self.stop.listening(world.is_main))
        self.device = choose_device(cfg.NUM_GPUS, world.local_rank)
        choose_kernels(cfg.TRAIN.TF32, cfg.TRAIN.CUDNN_BENCHMARK)
        # Collectives time out after the watchdog does, whose report says more than their error.
        timeout = timedelta(minutes=cfg.HANG_MINUTES + 5) if cfg.HANG_MINUTES else timedelta(days=1)
        self._store = init_process_group(world, cfg.DIST_BACKEND, self.device, init_method, timeout)
        check_same_config(cfg)
        self.watchdog = HangWatchdog(world, self._store, 60 * cfg.HANG_MINUTES, self.stop)
        self._closing.callback(self.watchdog.close)
        # Curves of several tasks in one OUTPUT_DIR are not those of one run.
        output = Path(cfg.OUTPUT_DIR)
        folder = (
            output / cfg.TENSORBOARD.LOG_DIR / cfg.TASK
            if cfg.TENSORBOARD.ENABLE or TENSORBOARD in cfg.LOG.TRACKERS
            else None
        )
        trackers = None
        if world.is_main and cfg.LOG.TRACKERS:  # whose packages the other ranks need not import
            beside = not cfg.TRAIN.ENABLE and bool(owner_of(output))
            trackers = Trackers(cfg.LOG.TRACKERS, About(output, cfg.TASK, flat(cfg), beside))
        self.metrics_log = MetricsLog(world, folder, trackers)
        self._connections.callback(self.metrics_log.close)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        close_lines()
        with self._closing:
            if error is None or isinstance(error, Preempted):
                self._connections.callback(destroy_process_group)
            self._connections.close()
            code = None
            if isinstance(error, Preempted):
                code = self._preempted(str(error))
            elif isinstance(error, Exception):
                code = self._explain(error)
            if self.has_results and self.world.is_main and self.cfg.LOG.REPORT:
                self._report()
            self.exit_code = code or 0
            return code is not None

    def _report(self) -> None:
        """Write the report of this run. Nothing that goes wrong there may change how the run ends."""
        try:
            write_report(self.cfg.OUTPUT_DIR)
        except UserError as error:
            logger.warning("no report was written: %s", error)
        except Exception:
            logger.warning("no report was written, because of a bug (LOG.REPORT)", exc_info=True)

    def _explain(self, error: Exception) -> int | None:
        """Log what ended the process; its exit code, or None where its traceback is to be printed."""
        world = self.world
        if isinstance(error, UserError):
            if self._is_to_say(str(error)):
                logger.error("error: %s", error)
            return 2
        memory = explain_oom(error, self.cfg, world.local_size, self.testing)
        if memory is not None:
            logger.error("error: %s", memory)
            return 2
        if self.stop and world.size > 1 and isinstance(error, RuntimeError | OSError | EOFError):
            # Most likely the others have left, in the middle of what needs no saving.
            if not is_collective_error(error):
                logger.warning("rank %d met this while the run was stopping:", world.rank, exc_info=error)
            return self._preempted(self.stop.reason)
        if not is_collective_error(error):
            logger.error("a bug, of this program or of a module in PLUGINS, on rank %d:", world.rank, exc_info=error)
            return 1
        watchdog = getattr(self, "watchdog", None)
        gone = watchdog.gone(1.0) if watchdog is not None else ""
        if not gone:
            return None
        logger.error("error: gone, or cut off from this process (rank %d): %s: %s", world.rank, gone, error)
        return 1

    def _is_to_say(self, text: str) -> bool:
        """Whether this rank logs an error: rank 0 if it meets it, too, for its lines are kept; else one of the others.

        The ranks ask the store. Where its host is frozen or gone, each logs for itself.
        """
        store, answers = self._store, queue.SimpleQueue[bool]()
        if store is None:
            return True
        key = f"error/{hashlib.sha256(text.encode()).hexdigest()}"

        def ask() -> None:
            with suppress(Exception):
                if self.world.is_main:
                    store.set(key, "")
                elif not _appears(store, key):
                    answers.put(store.add(f"{key}/others", 1) == 1)
                else:
                    answers.put(False)

        threading.Thread(target=ask, daemon=True).start()
        with suppress(queue.Empty):
            return answers.get(timeout=0.1 if self.world.is_main else 2 * ANSWER)
        return True

    def _preempted(self, reason: str) -> int:
        interrupted, anew = reason == signal.SIGINT.name, self.cfg.TRAIN.ENABLE and not self.cfg.TRAIN.AUTO_RESUME
        code = INTERRUPTED if interrupted else STOPPED if anew else PREEMPTED
        then = "the same command resumes from here"
        if anew:
            then = "TRAIN.AUTO_RESUME True resumes from here, the same command starts anew"
        elif self.testing:
            then = "the same command tests again"
        if self.world.is_main:
            how, requeue = "Ctrl-C" if interrupted else reason, ": requeue me" if code == PREEMPTED else ""
            logger.info("stopped on %s; %s (exit code %d%s)", how, then, code, requeue)
        return code
