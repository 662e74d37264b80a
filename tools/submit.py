"""Queue a run on a Slurm cluster with submitit: `python tools/submit.py --nodes 4 --gpus 8 --cfg FILE KEY VALUE ...`.

The job runs `python tools/run_net.py --cfg FILE KEY VALUE ...` on every node. Stopped by a signal (preempted, or at
the end of its time) it saves a checkpoint, is queued again, and goes on from there.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # read when submitit is imported, here and in the job
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed, too

from maskfeat.distributed.slurm import Job  # noqa: E402
from maskfeat.engine.run import main as run_net  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (default %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="of each; 0 = the CPU (default %(default)s)")
    parser.add_argument("--cpus", type=int, help="cores of each node (default: whole nodes)")
    parser.add_argument("--time", default="24:00:00", help="limit, as sbatch takes it (default %(default)s)")
    parser.add_argument("--partition", help="as of sbatch")
    parser.add_argument("--name", default="maskfeat", help="of the job (default %(default)s)")
    parser.add_argument("--logs", default="slurm_logs", help="folder of the job's logs (default %(default)s)")
    parser.add_argument("--restarts", type=int, default=100, help="at most so many (default %(default)s)")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="the YAML of a recipe")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides, as of run_net.py")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        import submitit
    except ImportError:
        print("submit.py: error: submitit is not installed: pip install '.[slurm]', or tools/slurm/train.sbatch")
        return 2
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
    given = [] if "NUM_GPUS" in args.opts else ["NUM_GPUS", str(args.gpus)]
    job = executor.submit(Job(run_net, str(Path.cwd()), ["--cfg", args.cfg, *args.opts, *given], args.restarts))
    print(f"job {job.job_id}, log {job.paths.stdout}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
