"""One run of the program: train, validate, save, test. `maskfeat train` and tools/run_net.py call `main`."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from yacs.config import CfgNode

from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.data.bad_samples import TooManyBadSamples
from maskfeat.data.loader import BatchLoader
from maskfeat.distributed.collectives import destroy_process_group, init_process_group, is_collective_error
from maskfeat.distributed.hang_watchdog import HangWatchdog
from maskfeat.distributed.launch import check_devices, launch, read_launch_environment
from maskfeat.distributed.preemption import PREEMPTED, Preempted, StopRequest
from maskfeat.distributed.world import World, choose_device
from maskfeat.engine.evaluate import multi_view_test
from maskfeat.engine.metrics_log import MetricsLog, setup_logging
from maskfeat.engine.oom import explain_oom as out_of_memory
from maskfeat.engine.resume import load_for_testing
from maskfeat.engine.trainer import CommandLine, precision_of, run_training
from maskfeat.objectives.base import Objective

logger = logging.getLogger(__name__)

# What a user can mend, or the machine has to: said in one line, without a traceback.
EXPECTED = (ValueError, TooManyBadSamples, FloatingPointError, OSError)


def _test_loaders(cfg: CfgNode, world: World, device: torch.device) -> dict[str, BatchLoader]:
    """A loader for each number of views, by its name: TEST.NUM_TEMPORAL_CLIPS (or TEST.NUM_ENSEMBLE_VIEWS) x crops."""
    if cfg.TEST.DATASET.lower() == "imagenet":
        return {"1x1": build_loader(cfg, "test", world, device=device)}
    counts = cfg.TEST.NUM_TEMPORAL_CLIPS or [cfg.TEST.NUM_ENSEMBLE_VIEWS]
    crops = cfg.TEST.NUM_SPATIAL_CROPS
    return {f"{count}x{crops}": build_loader(cfg, "test", world, count, device) for count in counts}


def _results_path(cfg: CfgNode, what: str) -> Path:
    """TEST.SAVE_RESULTS_PATH, or test_results.json in OUTPUT_DIR; what was tested is put into the name."""
    path = Path(cfg.OUTPUT_DIR) / (cfg.TEST.SAVE_RESULTS_PATH or "test_results.json")
    return path.with_name(f"{path.stem}_{what}{path.suffix or '.json'}")


def run_testing(
    cfg: CfgNode,
    loaders: Mapping[str, BatchLoader],
    world: World,
    device: torch.device,
    logbook: MetricsLog,
    objective: Objective,
    watch: HangWatchdog,
    name: str = "",
) -> None:
    """Multi-view testing with each of `loaders`; `name` "ema" for averaged weights."""
    suffix = f"_{name}" if name else ""
    for number, (views, loader) in enumerate(loaders.items()):
        result = multi_view_test(
            objective,
            loader,
            loader.labels,
            device,
            precision_of(cfg),
            _results_path(cfg, views + suffix) if world.is_main else None,
            watch.proceed,
        )
        line = (
            f"test{' of averaged weights' if name else ''}: top1 {result['top1']:.2f} %, top5 {result['top5']:.2f} % "
            f"of {len(loader.labels)} ({views} views), {result['unreadable']} unreadable"
        )
        stats = {"split": f"test_final{suffix}", "samples": len(loader.labels), "views": views, **result}
        stats["top1_acc"], stats["top5_acc"] = f"{result['top1']:.2f}", f"{result['top5']:.2f}"
        logbook.write(f"test_final{suffix}", line, stats, number)


def _work(
    world: World, cfg: CfgNode, given: CommandLine, device: torch.device, watch: HangWatchdog, stop: StopRequest
) -> None:
    folder = Path(cfg.OUTPUT_DIR) / cfg.TENSORBOARD.LOG_DIR if cfg.TENSORBOARD.ENABLE else None
    logbook = MetricsLog(world, folder)
    try:
        # The test's data is looked for before training, not after it.
        loaders = _test_loaders(cfg, world, device) if cfg.TEST.ENABLE else {}
        objectives = run_training(cfg, given, world, device, logbook, watch, stop) if cfg.TRAIN.ENABLE else {}
        if cfg.TEST.ENABLE:
            if not objectives or cfg.TEST.CHECKPOINT_FILE_PATH:
                objectives = load_for_testing(cfg, device)
            for name, objective in objectives.items():
                run_testing(cfg, loaders, world, device, logbook, objective, watch, name)
    finally:
        logbook.close()


def _patience(cfg: CfgNode) -> timedelta:
    """How long collectives may take: longer than HANG_MINUTES, for the report of the watch says more than theirs."""
    return timedelta(minutes=cfg.HANG_MINUTES + 5) if cfg.HANG_MINUTES else timedelta(days=1)


def work(world: World, init_method: str, cfg: CfgNode, given: CommandLine) -> int:
    """What every process does; its exit code. What all ranks meet alike is said once."""
    stop, watch = StopRequest(), None
    try:
        setup_logging(cfg.OUTPUT_DIR, world)
        with stop.listening():
            device = choose_device(cfg.NUM_GPUS, world.local_rank)
            store = init_process_group(world, cfg.DIST_BACKEND, device, init_method, _patience(cfg))
            watch = HangWatchdog(world, store, 60 * cfg.HANG_MINUTES, stop)
            _work(world, cfg, given, device, watch, stop)
            destroy_process_group()
    except Preempted as asked:
        destroy_process_group()
        return _stopped(str(asked), world)
    except (*EXPECTED, RuntimeError, MemoryError, EOFError) as error:
        code = _explained(error, cfg, world, watch, stop)
        if code is None:
            raise
        return code
    finally:
        if watch is not None:
            watch.close()
    return 0


def _explained(
    error: Exception, cfg: CfgNode, world: World, watch: HangWatchdog | None, stop: StopRequest
) -> int | None:
    """Say in words what ended a process; the exit code, or None where its traceback says more."""
    memory = None if isinstance(error, TooManyBadSamples) else out_of_memory(error, cfg, world.local_size)
    if memory is not None or isinstance(error, EXPECTED):
        if world.is_main or memory or isinstance(error, TooManyBadSamples | OSError):
            logger.error("error: %s", memory or error)
        return 2
    if stop and world.size > 1:  # the others have left, in the middle of something that needs no saving
        return _stopped(stop.reason, world)
    gone = watch.gone(1.0) if watch is not None and is_collective_error(error) else ""
    if not gone:
        return None
    logger.error("error: gone, or cut off from this process (rank %d): %s: %s", world.rank, gone, error)
    return 1


def _stopped(reason: str, world: World) -> int:
    if world.is_main:
        logger.info("stopped on %s; the same command goes on from here (exit code %d: requeue me)", reason, PREEMPTED)
    return PREEMPTED


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    """The command line: --cfg RECIPE and KEY VALUE overrides; PySlowFast's cluster flags are taken as well."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pre-train, fine-tune and test as a YAML says.",
        epilog="example: %(prog)s --cfg masked_ssl/in1k_VIT_B_MaskFeat_PT "
        "DATA.PATH_TO_DATA_DIR /data/imagenet OUTPUT_DIR runs/pt NUM_GPUS 8 TRAIN.MIXED_PRECISION bf16",
    )
    parser.add_argument(
        "--cfg",
        "--cfg_files",
        dest="cfg",
        required=True,
        metavar="RECIPE",
        help="path of a YAML file, or name of a recipe below configs/",
    )
    parser.add_argument("--num_shards", type=int, default=None, help="machines (default: NUM_SHARDS of the config)")
    parser.add_argument("--shard_id", type=int, default=None, help="this machine's number, from 0")
    parser.add_argument("--init_method", default="", help="tcp://HOST:PORT where several machines meet")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides, such as SOLVER.BASE_LR 1e-4"
    )
    return parser.parse_args(argv)


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
        cfg = load_config(args.cfg, opts, started.numbers() if started else {})
        if not (cfg.TRAIN.ENABLE or cfg.TEST.ENABLE):
            raise ValueError("TRAIN.ENABLE and TEST.ENABLE are both False: there is nothing to do, set one of them")
        check_devices(cfg.NUM_GPUS, cfg.DIST_BACKEND)
        _make_folder(cfg.OUTPUT_DIR)
        return launch(
            work,
            (cfg, CommandLine(args.cfg, tuple(opts))),
            processes=cfg.NUM_GPUS,
            num_shards=cfg.NUM_SHARDS,
            shard_id=cfg.SHARD_ID,
            init_method=args.init_method,
        )
    except EXPECTED as error:
        say("error: %s", error)
        return 2
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from the last checkpoint in OUTPUT_DIR")
        return 130


def _make_folder(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"OUTPUT_DIR {folder} cannot be made: {error.strerror}") from error
