"""One run of the program: train, validate, save, test. `maskfeat train` and tools/run_net.py call `main`."""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from maskfeat.build import build_loader
from maskfeat.checkpoint.reading import trained_classes
from maskfeat.config import load_config
from maskfeat.config.arguments import ConfigParser
from maskfeat.config.show import HOW, shown
from maskfeat.data.datasets.classes import check_numbering, check_same_classes, class_names
from maskfeat.data.loader import BatchLoader
from maskfeat.distributed.collectives import run_on_main
from maskfeat.distributed.launch import check_devices, launch, read_launch_environment
from maskfeat.distributed.preemption import INTERRUPTED
from maskfeat.distributed.world import World
from maskfeat.engine.agreement import check_same_samples
from maskfeat.engine.batch_arithmetic import load_recipe
from maskfeat.engine.confusion import Confusion, write_class_results
from maskfeat.engine.dry_run import STEPS, DryRun
from maskfeat.engine.evaluate import multi_view_test
from maskfeat.engine.loop import train
from maskfeat.engine.multi_label import write_class_precision
from maskfeat.engine.resume import find_tested, load_for_testing
from maskfeat.engine.session import Session
from maskfeat.engine.setup import CommandLine, announce_data, prepare_training
from maskfeat.engine.trackers import find_trackers
from maskfeat.engine.trainer import precision_of
from maskfeat.errors import UserError, UserFileError, naming
from maskfeat.file_io import replace_text
from maskfeat.objectives.base import Objective
from maskfeat.registry import dataset_spec

logger = logging.getLogger(__name__)


def _test_loaders(
    cfg: CfgNode,
    session: Session,
    tested: tuple[str, dict[str, Any]] | None = None,
    earlier: Mapping[str, BatchLoader] | None = None,
) -> Mapping[str, BatchLoader]:
    """A loader for each number of views that the data set is tested with, by its name: clips x crops.

    Args:
        tested: path and content of the checkpoint, whose classes number those of the data set; None = the run trains.
        earlier: what was returned before training; it serves again if it numbers the classes in the same way.
    """
    world, device = session.world, session.device
    classes = None if tested is None else trained_classes(tested[1])
    loaders = earlier or {}
    numbered = class_names(next(iter(loaders.values())).dataset) if loaders else None
    if not loaders or (classes is not None and numbered not in (None, classes)):
        loaders = {
            f"{clips}x{crops}": build_loader(cfg, "test", world, clips, device, classes=classes)
            for clips, crops in dataset_spec(cfg, "TEST").test_views(cfg)
        }
        check_same_samples("test", next(iter(loaders.values())))
        announce_data(cfg, True, {"test": next(iter(loaders.values()))})
    first = next(iter(loaders.values()))
    if tested is not None:
        check_same_classes(tested[0], classes, first.dataset)
        if classes is None:
            check_numbering("test", first.dataset, cfg.MODEL.NUM_CLASSES, tested[0])
    return loaders


def _results_path(cfg: CfgNode, what: str) -> Path:
    """TEST.SAVE_RESULTS_PATH, or test_results.json in OUTPUT_DIR; what was tested is put into the name.

    PySlowFast pickles its results to a name such as results.pkl; ours are JSON, and their file says so.
    """
    path = Path(cfg.OUTPUT_DIR) / (cfg.TEST.SAVE_RESULTS_PATH or "test_results.json")
    found = path.with_name(f"{path.stem}_{what}.json")
    if path.suffix not in ("", ".json"):
        logger.info("TEST.SAVE_RESULTS_PATH %s: results are JSON, written to %s", path, found)
    return found


def run_testing(
    cfg: CfgNode, session: Session, loaders: Mapping[str, BatchLoader], objective: Objective, name: str = ""
) -> list[UserFileError]:
    """Test with each of `loaders`, one per number of views.

    Args:
        name: "" for the weights, "ema" for their moving average.

    Returns:
        what kept results from being written; their scores are logged.
    """
    failed = []
    suffix = f"_{name}" if name else ""
    for number, (views, loader) in enumerate(loaders.items()):
        result, details = multi_view_test(
            objective,
            loader,
            loader.labels,
            session.device,
            precision_of(cfg.TEST),
            session.watchdog.proceed,
        )
        found = ", ".join(f"{key} {result[key]:.2f} %" for key in ("top1", "top5", "mAP") if key in result)
        line = (
            f"test{' of averaged weights' if name else ''}: {found} "
            f"of {len(loader.labels)} ({views} views), {result['unreadable']} unreadable"
        )
        stats = {"split": f"test_final{suffix}", "samples": len(loader.labels), "views": views, **result}
        stats |= {f"{key}_acc": f"{result[key]:.2f}" for key in ("top1", "top5") if key in result}
        session.metrics_log.write(f"test_final{suffix}", line, stats, number)
        try:
            run_on_main(partial(_write_results, cfg, views + suffix, details, loader.classes))
        except UserFileError as error:
            failed.append(error)
    return failed


def _write_results(cfg: CfgNode, what: str, details: str, classes: Sequence[str] | None) -> None:
    """Write the predictions of a test, and what they say of each class; `what`: views and weights, for the names."""
    path = _results_path(cfg, what)
    with naming(f"{path} cannot be written; the scores are in the log"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, details)
    if cfg.DATA.MULTI_LABEL:
        said = write_class_precision(cfg.OUTPUT_DIR, what, details, classes)
    else:
        said = write_class_results(cfg.OUTPUT_DIR, what, Confusion(details, cfg.MODEL.NUM_CLASSES, classes))
    logger.info(said)


def work(world: World, init_method: str, cfg: CfgNode, command_line: CommandLine) -> int:
    """Train and test in one process of a run; every process calls it.

    Returns:
        the exit code of the process. An error that all ranks meet is logged by one of them.
    """
    with Session(cfg, world) as session:
        session.start(init_method)
        tested = None if cfg.TRAIN.ENABLE else find_tested(cfg, session.watchdog.beat)
        # The test set is looked for before training, not after it.
        test_loaders = _test_loaders(cfg, session, tested) if cfg.TEST.ENABLE else {}
        objectives: dict[str, Objective] = {}
        if cfg.TRAIN.ENABLE:
            trainer, loader, saver, validator, pictures = prepare_training(cfg, command_line, session)
            session.has_results = True
            with saver:
                train(
                    trainer,
                    loader,
                    saver,
                    validator,
                    pictures,
                    session.metrics_log,
                    session.watchdog,
                    session.stop,
                    log_period=cfg.LOG_PERIOD,
                    max_skipped=cfg.TRAIN.MAX_SKIPPED_STEPS,
                )
            objectives = validator.objectives()
        session.testing = True
        if cfg.TEST.ENABLE:
            if cfg.TRAIN.ENABLE and cfg.TEST.CHECKPOINT_FILE_PATH:
                tested = find_tested(cfg, session.watchdog.beat)
                test_loaders = _test_loaders(cfg, session, tested, test_loaders)
            if tested is not None:
                objectives = load_for_testing(cfg, session.device, *tested)
                session.has_results = True
            failed = []
            for name, objective in objectives.items():
                failed += run_testing(cfg, session, test_loaders, objective, name)
            if failed:
                raise failed[0]
    return session.exit_code


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    """The command line: --cfg RECIPE and KEY VALUE overrides, and PySlowFast's cluster flags, in any order."""
    parser = ConfigParser(
        prog=prog,
        description="Pre-train, fine-tune and test as a YAML says.",
        epilog="example: %(prog)s --cfg masked_ssl/in1k_VIT_B_MaskFeat_PT "
        "DATA.PATH_TO_DATA_DIR /data/imagenet OUTPUT_DIR runs/pt NUM_GPUS 8 TRAIN.MIXED_PRECISION bf16",
    )
    parser.add_cfg(
        "path of a YAML file, or name of a recipe below configs/; several are run one after another", several=True
    )
    parser.add_argument("--num_shards", type=int, default=None, help="machines (default: NUM_SHARDS of the config)")
    parser.add_argument("--shard_id", type=int, default=None, help="this machine's number, from 0")
    parser.add_argument("--init_method", default="", help="tcp://HOST:PORT where several machines meet")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing, and say what the run would do and what it lacks; exit code 0 = it would start, 1 = not",
    )
    parser.add_argument(
        "--dry-steps", type=int, default=STEPS, metavar="N", help="of --dry-run, timed; 0 = none (default %(default)s)"
    )
    parser.add_argument(
        "--print-config",
        nargs="?",
        const=HOW[0],
        choices=HOW,
        help="print the config and exit: as YAML, as a line a key, or what differs from the defaults",
    )
    parser.add_overrides("overrides, such as SOLVER.BASE_LR 1e-4 or SOLVER.BASE_LR=1e-4")
    words = list(sys.argv[1:] if argv is None else argv)
    for place, word in enumerate(words[:-1]):
        if word == "--print-config" and words[place + 1] not in HOW:  # an override follows, not its value
            words[place] = f"{word}={HOW[0]}"
    return parser.parse_args(words)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the program and return its exit code. An error that the user can fix is reported in one line.

    Args:
        argv: the arguments; None = those of the process.
        prog: the name of the command in its help; None = the name of the script.
    """
    args = parse_args(argv, prog)
    opts = list(args.opts)
    for key, value in (("NUM_SHARDS", args.num_shards), ("SHARD_ID", args.shard_id)):
        if value is not None:
            opts += [key, str(value)]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    say = logging.getLogger("maskfeat").error
    try:
        started = read_launch_environment()
        runs = [(path, load_config(path, opts, started.numbers() if started else {})) for path in args.cfg]
        if args.print_config:
            return _print_configs(runs, args.print_config)
        if args.dry_run:
            if started and not started.world.is_main:
                return 0
            if args.dry_steps < 0:
                raise UserError(f"--dry-steps is {args.dry_steps}: give 0 or more")
            _check_runs([cfg for _, cfg in runs], several_at_once=started is not None, with_devices=False)
            return max(DryRun(cfg, CommandLine(path, tuple(opts)), args.dry_steps).run() for path, cfg in runs)
        _check_runs([cfg for _, cfg in runs], several_at_once=started is not None)
        for path, cfg in runs:
            _make_folder(cfg.OUTPUT_DIR)
            code = launch(
                work,
                (cfg, CommandLine(path, tuple(opts))),
                processes=cfg.NUM_GPUS,
                num_shards=cfg.NUM_SHARDS,
                shard_id=cfg.SHARD_ID,
                init_method=args.init_method,
            )
            if code:
                return code
        return 0
    except UserError as error:
        say("error: %s", error)
        return 2
    except KeyboardInterrupt:
        say("interrupted: nothing more was saved; the same command resumes from the newest checkpoint in OUTPUT_DIR")
        return INTERRUPTED


def _print_configs(runs: Sequence[tuple[str, CfgNode]], how: str) -> int:
    for path, cfg in runs:
        sys.stdout.write(shown(cfg, how, load_recipe(path) if how == "diff" else None))
    return 0


def _check_runs(runs: Sequence[CfgNode], several_at_once: bool, with_devices: bool = True) -> None:
    """Check what concerns the whole command; `several_at_once`: a launcher started this process among others."""
    for cfg in runs:
        if not (cfg.TRAIN.ENABLE or cfg.TEST.ENABLE):
            raise UserError("TRAIN.ENABLE and TEST.ENABLE are both False: there is nothing to do, set one of them")
        find_trackers(cfg.LOG.TRACKERS)
        if with_devices:
            check_devices(cfg.NUM_GPUS, cfg.DIST_BACKEND)
    if len(runs) > 1 and (several_at_once or any(cfg.NUM_SHARDS > 1 for cfg in runs)):
        raise UserError("--cfg takes one file where a launcher or NUM_SHARDS starts a run on several machines")


def _make_folder(folder: str) -> None:
    with naming(f"OUTPUT_DIR {folder} cannot be made"):
        Path(folder).mkdir(parents=True, exist_ok=True)
