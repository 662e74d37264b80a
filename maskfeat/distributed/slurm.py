"""Run the program as a submitit job that is requeued after a preemption."""

import logging
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from maskfeat.distributed.preemption import PREEMPTED
from maskfeat.distributed.processes import exit_now

logger = logging.getLogger(__name__)


class Job:
    """The callable that submitit pickles and calls in every task; exits with the run's exit code.

    The run handles SIGUSR1 and SIGTERM itself and returns PREEMPTED, upon which the job is requeued here. Until the run
    has installed its handlers, submitit's handler of SIGUSR1 (SUBMITIT_PREEMPT_SIGNAL) requeues through `checkpoint`.

    Args:
        main: The program, `maskfeat.engine.run.main`; takes `argv`, returns an exit code.
        folder: Working directory.
        argv: Command-line arguments.
        restarts: Maximum number of times that the job may be requeued.
    """

    def __init__(self, main: Callable[[Sequence[str]], int], folder: str, argv: list[str], restarts: int) -> None:
        self.main, self.folder, self.argv, self.restarts = main, folder, argv, restarts

    def __call__(self) -> None:
        """Run the program in its folder, requeue the job after a preemption, and exit with the code unless it is 0."""
        os.chdir(self.folder)
        code = self.main(self.argv)
        if code == PREEMPTED and os.environ.get("SLURM_PROCID") == "0":
            self.requeue()
        if code:
            exit_now(code)

    def requeue(self) -> None:
        """Requeue this job in Slurm unless the maximum number of restarts is reached."""
        done = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if done >= self.restarts:
            logger.warning("stopped by a signal, and not queued again after %d restarts", done)
            return
        command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
        try:
            done_so = subprocess.run(command, check=False).returncode == 0
        except OSError as error:  # in a container that lacks Slurm's programs
            logger.error("%s: %s", command[0], error.strerror)
            done_so = False
        if not done_so:
            logger.error("the job could not be queued again: `%s` where Slurm is, and it resumes", shlex.join(command))

    def checkpoint(self) -> Any:
        """Return what submitit runs when it requeues the job itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
