"""The same recipe with several values of some keys: `maskfeat sweep` and tools/sweep.py call `main`."""

import argparse
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from maskfeat.config.arguments import ConfigParser
from maskfeat.distributed.launch import check_devices
from maskfeat.distributed.preemption import INTERRUPTED, STOP_SIGNALS
from maskfeat.distributed.processes import signal_handler
from maskfeat.distributed.slurm import Job
from maskfeat.engine.log_handlers import screen_handler
from maskfeat.engine.run import main as run_net
from maskfeat.engine.submit import add_slurm_options, agree_on_gpus, check_gpus, slurm_errors, slurm_executor
from maskfeat.engine.sweep_plan import DONE, Run, plan
from maskfeat.errors import UserError, naming
from maskfeat.file_io import expand_path, replace_text
from maskfeat.progress import LiveLine, close_lines
from maskfeat.report.command import REPORT
from maskfeat.report.page import write_page
from maskfeat.report.run_log import LOG
from maskfeat.report.runs import KINDS, read_runs, summary

logger = logging.getLogger(__name__)

OUTPUT = "sweep_output.txt"
"""In OUTPUT_DIR of a run on this machine: what it wrote to the terminal."""
TRAIN = [sys.executable, "-m", "maskfeat", "train"]
_GPUS = 1
"""Of a job, where nothing else is said."""


def run_one(argv: Sequence[str]) -> int:
    """Make one run in this process, as a job does, and return its exit code."""
    code = run_net(argv)
    if code == 0 and os.environ.get("SLURM_PROCID", "0") == "0":
        _note_done(argv)
    return code


def _note_done(argv: Sequence[str]) -> None:
    path = Path(expand_path(argv[-1].partition("=")[2])) / DONE
    with naming(f"{path} cannot be written"):
        replace_text(path, json.dumps(list(argv)) + "\n")


class Local:
    """Runs on this machine, some at a time, each a process of its own.

    Args:
        runs: to make.
        at_once: how many at a time.

    Attributes:
        failed: what became of those that did not end well, by name.

    Raises:
        UserError: there are too few GPUs.
    """

    def __init__(self, runs: Sequence[Run], at_once: int) -> None:
        self.runs, self.at_once, self.failed = runs, at_once, dict[str, str]()
        gpus = max(run.gpus for run in runs)
        try:
            check_devices(gpus * at_once, runs[0].backend)
        except UserError as error:
            raise UserError(f"--local {at_once} with NUM_GPUS {gpus} needs {gpus * at_once}: {error}") from error
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        every = named.split(",") if named else [str(number) for number in range(gpus * at_once)]
        self._devices = [",".join(every[slot * gpus : (slot + 1) * gpus]) for slot in range(at_once)]
        self._over = 0
        self._busy: dict[int, tuple[Run, subprocess.Popen[bytes], IO[bytes], float]] = {}

    def __call__(self) -> None:
        """Make them. A stop reaches them, too: each saves a checkpoint, and is waited for.

        Raises:
            KeyboardInterrupt: Ctrl-C, SIGTERM or SIGUSR1 came, and the runs have ended.
            UserError: a file of a run cannot be written; those at work were stopped in the same way.
        """
        waiting = iter(enumerate(self.runs, 1))
        line, stopped = LiveLine("runs", len(self.runs)), False
        asked: list[int] = []
        with signal_handler(STOP_SIGNALS, lambda number, _: asked.append(number)):
            try:
                while True:
                    try:
                        while asked:  # a scheduler signals this process alone, and a terminal all of them
                            stopped = True
                            self._pass_on(asked.pop())
                        for slot in range(self.at_once):
                            if not stopped and slot not in self._busy and (following := next(waiting, None)):
                                self._start(slot, *following)
                        if not self._busy:
                            break
                        time.sleep(0.1)
                        self._look()
                        line.show(self._over, lambda: f"{self._over} of {len(self.runs)}, {len(self._busy)} at work")
                    except KeyboardInterrupt:
                        stopped = True
            finally:
                line.close()
                self._pass_on(signal.SIGTERM)  # after an error, some are still at work
                for _, process, output, _ in self._busy.values():
                    process.wait()
                    output.close()
        if stopped:
            raise KeyboardInterrupt

    def _pass_on(self, number: int) -> None:
        for _, process, _, _ in self._busy.values():
            process.send_signal(number)

    def _start(self, slot: int, number: int, run: Run) -> None:
        with naming(f"{run.folder} cannot be written"):
            run.folder.mkdir(parents=True, exist_ok=True)
            output = (run.folder / OUTPUT).open("ab")
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if run.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self._devices[slot]
        elif self.at_once > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.at_once)))
        logger.info("run %d of %d: %s", number, len(self.runs), run.name)
        command = [*TRAIN, *run.argv]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env)
        self._busy[slot] = (run, process, output, time.monotonic())

    def _look(self) -> None:
        for slot, (run, process, output, began) in list(self._busy.items()):
            code = process.poll()
            if code is None:
                continue
            del self._busy[slot]
            output.close()
            self._over += 1
            if code == 0:
                _note_done(run.argv)
                logger.info("done in %.0f s: %s", time.monotonic() - began, run.name)
                continue
            last = (run.folder / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            self.failed[run.name] = f"exit code {code}: {last[-300:]}"
            logger.error("FAILED, %s: %s", run.name, self.failed[run.name])


def _submit(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Submit a Slurm array, a task for each run."""
    executor = slurm_executor(args, array_parallelism=args.parallel)
    with slurm_errors(), executor.batch():
        jobs = [executor.submit(Job(run_one, str(Path.cwd()), run.argv, args.restarts)) for run in runs]
    for run, job in zip(runs, jobs, strict=True):
        logger.info("job %s, log %s: %s", job.job_id, job.paths.stdout, run.name)
    logger.info("When they are done: the same command with --report instead of --submit")


def _table(runs: Sequence[Run]) -> Iterator[str]:
    """The report's table, of the runs that have a log: a line for each run, and what differs in its name."""
    found = read_runs([run.folder for run in runs if (run.folder / LOG).is_file()])
    rows = {name: values for name, values in summary(found).items() if name.split()[0] in KINDS}
    columns = [["run", *(run.folder.name for run in found)], *([name, *values] for name, values in rows.items())]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _report(runs: Sequence[Run]) -> None:
    there = [run.folder for run in runs if (run.folder / LOG).is_file()]
    if not there:
        return
    path = runs[0].folder.parent / REPORT
    with naming(f"{path} cannot be written"):
        replace_text(path, write_page(read_runs(there)))
    logger.info("\n%s\n\n%s", "\n".join(_table(runs)), path)


def _parser(prog: str | None) -> ConfigParser:
    parser = ConfigParser(
        prog=prog,
        description="Run a recipe with several values of some keys, each run in a folder of OUTPUT_DIR that is named "
        "by what differs. The same command again leaves out what is done, and resumes what was interrupted.",
        epilog="example: %(prog)s --cfg masked_ssl/in1k_VIT_B_MaskFeat_PT DATA.PATH_TO_DATA_DIR /data/imagenet "
        "OUTPUT_DIR runs/lr NUM_GPUS 1 SOLVER.BASE_LR=1e-4,2e-4 AUG.MASK_RATIO=0.4,0.6 --local 2",
        allow_abbrev=False,
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--local", type=int, default=1, metavar="N", help="so many at a time here (default %(default)s)")
    how.add_argument("--submit", action="store_true", help="as an array of jobs of a Slurm cluster")
    how.add_argument("--report", action="store_true", help="start nothing: the table and report.html of what is there")
    how.add_argument("--print", action="store_true", help="start nothing: print the command of each run")
    parser.add_argument("--random", type=int, metavar="N", help="so many runs, drawn from the grid")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default %(default)s)")
    slurm = parser.add_argument_group("with --submit")
    slurm.add_argument("--parallel", type=int, default=8, help="jobs at a time (default %(default)s)")
    add_slurm_options(slurm, _GPUS, name="maskfeat-sweep")
    parser.add_cfg("path of a YAML file, or name of a recipe below configs/")
    parser.add_overrides("overrides; KEY=VALUE,VALUE is a key that varies. A value with a comma: KEY VALUE")
    return parser


def _sweep(args: argparse.Namespace) -> int:
    for option in ("local", "parallel", "random"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}: give 1 or more")
    gpus = args.gpus
    if args.submit:
        agree_on_gpus(args, _GPUS)
    runs = plan(args.cfg, args.opts, args.random, args.seed)
    if args.submit:  # the jobs of an array are alike, and NUM_GPUS may vary
        needed = max(run.gpus for run in runs)
        args.gpus = needed if gpus is None else gpus
        check_gpus(args.gpus, needed)
    if args.print:
        for run in runs:
            sys.stdout.write(f"maskfeat train {shlex.join(run.argv)}\n")
        return 0
    todo = [run for run in runs if not run.is_done]
    logger.info("%d runs in %s, %d of them done", len(runs), runs[0].folder.parent, len(runs) - len(todo))
    if args.submit:
        if todo:
            _submit(todo, args)
        return 0
    failed = {run.name: "not done" for run in todo}
    if todo and not args.report:
        local = Local(todo, args.local)
        local()
        failed = local.failed
    _report(runs)
    if failed:
        listed = "\n".join(f"  {name}: {cause}" for name, cause in failed.items())
        logger.error("\n%d of %d runs %s:\n%s", len(failed), len(runs), "wait" if args.report else "failed", listed)
    return int(bool(failed))


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Make a sweep and return the exit code: 0 = all is done or submitted, 1 = a run failed, 2 = bad input.

    Args:
        argv: the arguments; None = those of the process.
        prog: the name of the command in its help; None = the name of the script.
    """
    args = _parser(prog).parse_args(argv)
    package = logging.getLogger("maskfeat")
    package.handlers, package.propagate = [screen_handler()], False
    package.setLevel(logging.INFO)
    try:
        return _sweep(args)
    except UserError as error:
        package.error("error: %s", error)
        return 2
    except KeyboardInterrupt:
        package.error("interrupted: the same command goes on from here")
        return INTERRUPTED
    finally:
        close_lines()
