"""A run as a job of submitit: it goes on in the job's next start when a signal has stopped it."""

import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from maskfeat.distributed.preemption import PREEMPTED
from maskfeat.distributed.processes import exit_now

logger = logging.getLogger(__name__)


class Job:
    """What submitit keeps in a file and calls in every task; it ends the process with the run's exit code.

    The run heeds SIGUSR1 and SIGTERM itself, ends with PREEMPTED, and is queued again from here. As long as it has not
    begun to listen, submitit's own handler of SIGUSR1 (SUBMITIT_PREEMPT_SIGNAL) queues the job again by `checkpoint`.

    Args:
        main: the program, `maskfeat.engine.run.main`; takes `argv`, returns an exit code.
        folder: the working directory.
        argv: its arguments.
        restarts: how often the job may be queued again.
    """

    def __init__(self, main: Callable[[Sequence[str]], int], folder: str, argv: list[str], restarts: int) -> None:
        self.main, self.folder, self.argv, self.restarts = main, folder, argv, restarts

    def __call__(self) -> None:
        os.chdir(self.folder)
        code = self.main(self.argv)
        if code == PREEMPTED and os.environ.get("SLURM_PROCID") == "0":
            self.requeue()
        if code:
            exit_now(code)

    def requeue(self) -> None:
        """Ask Slurm to start this job again, if it was not started too often."""
        done = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if done >= self.restarts:
            logger.warning("stopped by a signal, and not queued again after %d restarts", done)
            return
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)

    def checkpoint(self) -> Any:
        """What submitit is to run when it queues the job again by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
