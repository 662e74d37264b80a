"""A run as a job of submitit: it goes on in the job's next start when a signal has stopped it."""

import logging
import os
import subprocess
from typing import Any

from maskfeat.distributed.preemption import PREEMPTED

logger = logging.getLogger(__name__)


class Job:
    """What submitit keeps in a file and calls in every task; it ends the process with the run's exit code.

    The run heeds SIGUSR1 and SIGTERM itself, ends with PREEMPTED, and is queued again from here. As long as it has not
    begun to listen, submitit's own handler of SIGUSR1 (SUBMITIT_PREEMPT_SIGNAL) queues the job again by `checkpoint`.

    Args:
        folder: the working directory.
        argv: arguments of tools/run_net.py.
        restarts: how often the job may be queued again.
    """

    def __init__(self, folder: str, argv: list[str], restarts: int) -> None:
        self.folder, self.argv, self.restarts = folder, argv, restarts

    def __call__(self) -> None:
        from maskfeat.distributed.processes import end_now
        from maskfeat.engine.run import main

        os.chdir(self.folder)
        code = main(self.argv)
        if code == PREEMPTED and os.environ.get("SLURM_PROCID") == "0":
            self.requeue()
        if code:
            end_now(code)

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
