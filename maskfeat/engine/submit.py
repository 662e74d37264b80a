"""A run as a job of a Slurm cluster, submitted with submitit. `maskfeat submit` and tools/submit.py call `main`."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from maskfeat.config.arguments import ConfigParser
from maskfeat.config.merge import override_entries
from maskfeat.distributed.slurm import Job
from maskfeat.engine.log_handlers import screen_handler
from maskfeat.engine.run import main as run_net
from maskfeat.errors import UserError

logger = logging.getLogger(__name__)


def _parser(prog: str | None) -> ConfigParser:
    parser = ConfigParser(
        prog=prog,
        description="Submit a run to a Slurm cluster. The job trains the recipe on all its nodes. If a signal stops it "
        "(preemption, or the end of its time limit), it saves a checkpoint, is queued again and resumes from there.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (default %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="of each; 0 = the CPU (default %(default)s)")
    parser.add_argument("--cpus", type=int, help="cores of each node (default: whole nodes)")
    parser.add_argument("--time", default="24:00:00", help="time limit, as sbatch takes it (default %(default)s)")
    parser.add_argument("--partition", help="as of sbatch")
    parser.add_argument("--name", default="maskfeat", help="of the job (default %(default)s)")
    parser.add_argument("--logs", default="slurm_logs", help="folder of the job's logs (default %(default)s)")
    parser.add_argument(
        "--restarts", type=int, default=100, help="how often it may be queued again (default %(default)s)"
    )
    parser.add_cfg("path of a YAML file, or name of a recipe below configs/")
    parser.add_overrides("overrides of the recipe")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Submit the job and return the exit code; `prog` is the name of the command in its help."""
    parser = _parser(prog)
    args = parser.parse_args(argv)
    try:
        given = [] if "NUM_GPUS" in override_entries(args.opts) else ["NUM_GPUS", str(args.gpus)]
    except UserError as error:
        parser.error(str(error))
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # read when submitit is imported, here and in the job
    try:
        import submitit
    except ImportError:
        parser.error("submitit is not installed: pip install 'maskfeat[slurm]', or use tools/slurm/train.sbatch")
    logger.handlers, logger.propagate = [screen_handler()], False
    logger.setLevel(logging.INFO)
    executor = submitit.SlurmExecutor(folder=Path(args.logs).resolve() / "%j", max_num_timeout=args.restarts)
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
    )
    job = executor.submit(Job(run_net, str(Path.cwd()), ["--cfg", args.cfg, *args.opts, *given], args.restarts))
    logger.info("job %s, log %s", job.job_id, job.paths.stdout)
    return 0
