"""A run as a job of a Slurm cluster, submitted with submitit. `maskfeat submit` and tools/submit.py call `main`."""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskfeat.config.arguments import ConfigParser
from maskfeat.config.merge import override_entries
from maskfeat.distributed.slurm import Job
from maskfeat.engine.log_handlers import screen_handler
from maskfeat.engine.run import main as run_net
from maskfeat.errors import UserError

logger = logging.getLogger(__name__)

GPUS = 8
"""Of a machine, where nothing else is said."""


def _parser(prog: str | None) -> ConfigParser:
    parser = ConfigParser(
        prog=prog,
        description="Submit a run to a Slurm cluster. The job trains the recipe on all its nodes. If a signal stops it "
        "(preemption, or the end of its time limit), it saves a checkpoint, is queued again and resumes from there.",
        epilog="example: %(prog)s --nodes 4 --time 48:00:00 --partition gpu --cfg masked_ssl/in1k_VIT_B_MaskFeat_PT "
        "DATA.PATH_TO_DATA_DIR /data/imagenet OUTPUT_DIR runs/vit_b_pt",
        allow_abbrev=False,
    )
    add_slurm_options(parser)
    parser.add_cfg("path of a YAML file, or name of a recipe below configs/")
    parser.add_overrides("overrides of the recipe")
    return parser


def add_slurm_options(parser: argparse._ActionsContainer, gpus: int = GPUS, name: str = "maskfeat") -> None:
    """Add what is asked of Slurm; `gpus`, see `agree_on_gpus`, and `name` are defaults."""
    parser.add_argument("--nodes", type=int, default=1, help="machines (default %(default)s)")
    parser.add_argument(
        "--gpus", type=int, help=f"of each; 0 = the CPU (default: NUM_GPUS of the overrides, else {gpus})"
    )
    parser.add_argument("--cpus", type=int, help="cores of each node (default: whole nodes)")
    parser.add_argument("--time", default="24:00:00", help="time limit, as sbatch takes it (default %(default)s)")
    parser.add_argument("--partition", help="as of sbatch")
    parser.add_argument("--name", default=name, help="of the job (default %(default)s)")
    parser.add_argument("--logs", default="slurm_logs", help="folder of the job's logs (default %(default)s)")
    parser.add_argument(
        "--restarts", type=int, default=100, help="how often it may be queued again (default %(default)s)"
    )


def agree_on_gpus(args: argparse.Namespace, gpus: int = GPUS) -> None:
    """Set --gpus as the override NUM_GPUS says, and the override as --gpus says, where only one of them is given.

    Raises:
        UserError: an override is none, or asks for more GPUs than --gpus.
    """
    given = override_entries(args.opts).get("NUM_GPUS")
    told = str(given.value) if given else ""
    if args.gpus is None:
        args.gpus = int(told) if told.isdecimal() else gpus
    elif told.isdecimal():
        check_gpus(args.gpus, int(told))
    if given is None:
        args.opts = [*args.opts, "NUM_GPUS", str(args.gpus)]


def check_gpus(asked: int, needed: int) -> None:
    """Check that --gpus are as many as NUM_GPUS needs of each machine; with 0, processes are on the CPU.

    Raises:
        UserError: they are fewer.
    """
    if 0 < asked < needed:
        raise UserError(f"--gpus {asked} of each machine are too few for NUM_GPUS {needed}: leave out one of them")


@contextmanager
def slurm_errors() -> Iterator[None]:
    """Turn what Slurm refuses within into an error of one line.

    Raises:
        UserError: it does.
    """
    from submitit.core.utils import FailedJobError

    try:
        yield
    except FailedJobError as error:
        raise UserError(f"Slurm takes no such job: {' '.join(str(error).split())}") from error


def slurm_executor(args: argparse.Namespace, **parameters: Any) -> Any:
    """Return submitit's executor of jobs as the options ask for.

    Args:
        args: with those of `add_slurm_options`.
        parameters: more of the executor's.

    Raises:
        UserError: submitit is not installed, or Slurm is not.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # read when submitit is imported, here and in the job
    try:
        import submitit
    except ImportError as error:
        instead = "pip install 'maskfeat[slurm]', or use tools/slurm/train.sbatch"
        raise UserError(f"submitit is not installed: {instead}") from error
    try:
        executor = submitit.SlurmExecutor(folder=Path(args.logs).resolve() / "%j", max_num_timeout=args.restarts)
    except RuntimeError as error:  # it has no other for this
        raise UserError("there is no Slurm on this machine (no srun): submit where the cluster takes jobs") from error
    wide = {"cpus_per_task": args.cpus} if args.cpus else {"exclusive": True, "mem": "0"}
    executor.update_parameters(
        job_name=args.name,
        nodes=args.nodes,
        ntasks_per_node=1,
        time=args.time,
        signal_delay_s=120,
        srun_args=["--kill-on-bad-exit=1", *([] if args.cpus else ["--cpu-bind=none"])],
        stderr_to_stdout=True,
        additional_parameters={"requeue": True},
        **({"partition": args.partition} if args.partition else {}),
        **({"gpus_per_node": args.gpus} if args.gpus else {}),
        **wide,
        **parameters,
    )
    return executor


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Submit the job and return the exit code; `prog` is the name of the command in its help."""
    parser = _parser(prog)
    args = parser.parse_args(argv)
    try:
        agree_on_gpus(args)
        executor = slurm_executor(args)
        with slurm_errors():
            job = executor.submit(Job(run_net, str(Path.cwd()), ["--cfg", args.cfg, *args.opts], args.restarts))
    except UserError as error:
        parser.error(str(error))
    logger.handlers, logger.propagate = [screen_handler()], False
    logger.setLevel(logging.INFO)
    logger.info("job %s, log %s", job.job_id, job.paths.stdout)
    return 0
