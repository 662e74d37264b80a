"""One run of the program: train, validate, save, test. tools/run_net.py calls `main`."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from yacs.config import CfgNode

from maskfeat.build import build_backbone, build_loader, build_objective, build_optimizer
from maskfeat.config import load_config, save_config
from maskfeat.data.bad_samples import TooManyBadSamples
from maskfeat.data.loader import Loader
from maskfeat.distributed import World, barrier, check_devices, choose_device, join, launch, leave, seed_draws
from maskfeat.evaluate import multi_view_test, validate
from maskfeat.flops import multiply_adds
from maskfeat.logbook import Logbook, setup_logging
from maskfeat.memory import explain as out_of_memory
from maskfeat.objectives.base import Objective
from maskfeat.parallel import checkpoint_activations, compile_parts, distribute, share_buffers
from maskfeat.recipe import compare, describe, recipe_of, step_of
from maskfeat.resume import TrainingState, load_for_testing, save_training, start_training
from maskfeat.schedule import lr_at_epoch
from maskfeat.step_hooks import WeightAverage, protect_statistics
from maskfeat.train import Settings, train

logger = logging.getLogger(__name__)

# What a user can mend, or the machine has to: said in one line, without a traceback.
EXPECTED = (ValueError, TooManyBadSamples, FloatingPointError, OSError)


@dataclass(frozen=True)
class Given:
    """The command line of a run: the YAML's path and the overrides."""

    path: str
    opts: tuple[str, ...]


def precision_of(cfg: CfgNode) -> str:
    """TRAIN.MIXED_PRECISION as "off", "bf16" or "fp16" (True is fp16, as in PySlowFast)."""
    return {False: "off", True: "fp16"}.get(cfg.TRAIN.MIXED_PRECISION, cfg.TRAIN.MIXED_PRECISION)


def _is_due(cfg: CfgNode, objective: Objective, epoch: int) -> bool:
    """Whether to validate after `epoch`: every TRAIN.EVAL_PERIOD epochs, and after the last one (of pre-training only
    where the period is not longer than the run); 0 = never.
    """
    period, last = cfg.TRAIN.EVAL_PERIOD, cfg.SOLVER.MAX_EPOCH
    if period == 0:
        return False
    return (epoch + 1) % period == 0 or (epoch + 1 == last and (objective.classifies or period <= last))


def _announce(cfg: CfgNode, given: Given, objective: Objective, device: torch.device, world: World, steps: int) -> None:
    count = sum(p.numel() for p in objective.parameters())
    if cfg.LOG_MODEL_INFO:
        with torch.device("meta"):
            twin = build_backbone(cfg)
        logger.info("%.3g G multiply-adds a view in the backbone", multiply_adds(twin) / 1e9)
    logger.info(
        "%s, %.2f M parameters, on %d x %s, %s precision",
        type(objective).__name__,
        count / 1e6,
        world.size,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        {"off": "fp32"}.get(precision_of(cfg), precision_of(cfg)),
    )
    step, recipe = step_of(cfg, world.local_size), recipe_of(given.path)
    differences = () if recipe is None else compare(cfg, step, recipe, Path(given.path).name)
    for line in (describe(cfg, step, steps), *differences):
        logger.info(line)


def training_state(cfg: CfgNode, device: torch.device) -> TrainingState:
    """What a run trains, on its device, before anything is loaded."""
    objective = build_objective(cfg).to(device)
    optimizer = build_optimizer(cfg, objective)
    scaler = torch.amp.GradScaler(device.type, enabled=precision_of(cfg) == "fp16")
    protect_statistics(objective, optimizer)
    average = WeightAverage(objective, optimizer, cfg.TRAIN.EMA) if cfg.TRAIN.EMA else None
    if cfg.MODEL.ACT_CHECKPOINT:
        checkpoint_activations(objective, light=cfg.MODEL.ACT_CHECKPOINT == "light")
    if cfg.TRAIN.COMPILE:
        compile_parts(objective, device)
    return TrainingState(objective, optimizer, scaler, average)


def settings_of(cfg: CfgNode) -> Settings:
    """How the loop trains."""
    return Settings(
        max_epoch=cfg.SOLVER.MAX_EPOCH,
        lr=lambda epoch: lr_at_epoch(cfg, epoch),
        seed=cfg.RNG_SEED,
        clip_norm=cfg.SOLVER.CLIP_GRAD_L2NORM,
        clip_value=cfg.SOLVER.CLIP_GRAD_VAL,
        precision=precision_of(cfg),
        micro_batch=cfg.TRAIN.MICRO_BATCH_SIZE,
        log_period=cfg.LOG_PERIOD,
        max_skipped=cfg.TRAIN.MAX_SKIPPED_STEPS,
    )


def _trained(training: TrainingState) -> dict[str, Objective]:
    """What is evaluated, the same on every rank: "" = the weights, "ema" = their average, where there is one."""
    average = {} if training.average is None else {"ema": training.average.objective}
    objectives = {"": training.objective, **average}
    for objective in objectives.values():
        share_buffers(objective)
    return objectives


def run_training(
    cfg: CfgNode, given: Given, world: World, device: torch.device, logbook: Logbook
) -> dict[str, Objective]:
    """Train as configured; returns the trained objectives, on `device`, as `_trained` names them."""
    seed_draws(cfg.RNG_SEED)
    training = training_state(cfg, device)
    objective = training.objective
    loader = build_loader(cfg, "train", world, device=device)
    _announce(cfg, given, objective, device, world, len(loader))
    max_epoch = cfg.SOLVER.MAX_EPOCH
    evaluates = any(_is_due(cfg, objective, epoch) for epoch in range(max_epoch))
    val_loader = build_loader(cfg, "val", world, device=device) if evaluates else None
    start_epoch = start_training(cfg, training)
    if world.is_main:
        # Not earlier: a run that is refused leaves the folder of another one as it was.
        save_config(given.path, given.opts, cfg, cfg.OUTPUT_DIR)
    model = distribute(objective, world, static=not cfg.TRAIN.MICRO_BATCH_SIZE)
    settings = settings_of(cfg)

    def after_epoch(epoch: int) -> None:
        """Save and validate where that is due."""
        last = epoch + 1 == max_epoch
        if world.is_main and ((epoch + 1) % cfg.TRAIN.CHECKPOINT_PERIOD == 0 or last):
            save_training(cfg, training, epoch)
        barrier()
        if val_loader is not None and _is_due(cfg, objective, epoch):
            _validate(cfg, _trained(training), val_loader, device, logbook, epoch)

    if start_epoch >= max_epoch:
        logger.info("nothing left to train: SOLVER.MAX_EPOCH is %d", max_epoch)
    train(
        model,
        objective,
        training.optimizer,
        training.scaler,
        loader,
        settings,
        start_epoch=start_epoch,
        device=device,
        world=world,
        logbook=logbook,
        after_epoch=after_epoch,
    )
    return _trained(training)


def _validate(
    cfg: CfgNode, objectives: Mapping[str, Objective], loader: Any, device: torch.device, logbook: Logbook, epoch: int
) -> None:
    values = {}
    for name, objective in objectives.items():
        found = validate(objective, loader, device, precision_of(cfg))
        values.update({f"{name}_{key}" if name else key: value for key, value in found.items()})
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    stats = {"epoch": f"{epoch + 1}/{cfg.SOLVER.MAX_EPOCH}", **values}
    logbook.write("val_epoch", f"validation after epoch {epoch + 1}: {shown}", stats, epoch)


def _test_loaders(cfg: CfgNode, world: World, device: torch.device) -> dict[str, Loader]:
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
    loaders: Mapping[str, Loader],
    world: World,
    device: torch.device,
    logbook: Logbook,
    objective: Objective,
    name: str = "",
) -> None:
    """Multi-view testing with each of `loaders`; `name` as in `_trained`."""
    suffix = f"_{name}" if name else ""
    for number, (views, loader) in enumerate(loaders.items()):
        result = multi_view_test(
            objective,
            loader,
            loader.labels,
            device,
            precision_of(cfg),
            _results_path(cfg, views + suffix) if world.is_main else None,
        )
        line = (
            f"test{' of averaged weights' if name else ''}: top1 {result['top1']:.2f} %, top5 {result['top5']:.2f} % "
            f"of {len(loader.labels)} ({views} views), {result['unreadable']} unreadable"
        )
        stats = {"split": f"test_final{suffix}", "samples": len(loader.labels), "views": views, **result}
        stats["top1_acc"], stats["top5_acc"] = f"{result['top1']:.2f}", f"{result['top5']:.2f}"
        logbook.write(f"test_final{suffix}", line, stats, number)


def _work(world: World, init_method: str, cfg: CfgNode, given: Given) -> None:
    device = choose_device(cfg.NUM_GPUS, world.local_rank)
    join(world, cfg.DIST_BACKEND, device, init_method)
    folder = Path(cfg.OUTPUT_DIR) / cfg.TENSORBOARD.LOG_DIR if cfg.TENSORBOARD.ENABLE else None
    logbook = Logbook(world, folder)
    try:
        # The test's data is looked for before training, not after it.
        loaders = _test_loaders(cfg, world, device) if cfg.TEST.ENABLE else {}
        objectives = run_training(cfg, given, world, device, logbook) if cfg.TRAIN.ENABLE else {}
        if cfg.TEST.ENABLE:
            if not objectives or cfg.TEST.CHECKPOINT_FILE_PATH:
                objectives = load_for_testing(cfg, device)
            for name, objective in objectives.items():
                run_testing(cfg, loaders, world, device, logbook, objective, name)
    finally:
        logbook.close()
        leave()


def work(world: World, init_method: str, cfg: CfgNode, given: Given) -> int:
    """What every process does; its exit code. What all ranks meet alike is said once."""
    try:
        setup_logging(cfg.OUTPUT_DIR, world)
        _work(world, init_method, cfg, given)
    except (*EXPECTED, RuntimeError, MemoryError, EOFError) as error:
        memory = None if isinstance(error, TooManyBadSamples) else out_of_memory(error, cfg, world.local_size)
        if memory is None and not isinstance(error, EXPECTED):
            raise
        if world.is_main or memory or isinstance(error, TooManyBadSamples | OSError):
            logger.error("error: %s", memory or error)
        return 2
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line: --cfg FILE and KEY VALUE overrides; PySlowFast's cluster flags are taken as well."""
    parser = argparse.ArgumentParser(
        description="Pre-train, fine-tune and test as a YAML says.",
        epilog="example: run_net.py --cfg configs/masked_ssl/in1k_VIT_B_MaskFeat_PT.yaml "
        "DATA.PATH_TO_DATA_DIR /data/imagenet OUTPUT_DIR runs/pt NUM_GPUS 8 TRAIN.MIXED_PRECISION bf16",
    )
    parser.add_argument("--cfg", "--cfg_files", dest="cfg", required=True, metavar="FILE", help="the YAML of a recipe")
    parser.add_argument("--num_shards", type=int, default=None, help="machines (default: NUM_SHARDS of the config)")
    parser.add_argument("--shard_id", type=int, default=None, help="this machine's number, from 0")
    parser.add_argument("--init_method", default="", help="tcp://HOST:PORT where several machines meet")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides, such as SOLVER.BASE_LR 1e-4"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code. What a user can mend is said in one line, without a traceback."""
    args = parse_args(argv)
    opts = list(args.opts)
    for key, value in (("NUM_SHARDS", args.num_shards), ("SHARD_ID", args.shard_id)):
        if value is not None:
            opts += [key, str(value)]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    say = logging.getLogger("maskfeat").error
    try:
        cfg = load_config(args.cfg, opts)
        if not (cfg.TRAIN.ENABLE or cfg.TEST.ENABLE):
            raise ValueError("TRAIN.ENABLE and TEST.ENABLE are both False: there is nothing to do, set one of them")
        check_devices(cfg.NUM_GPUS, cfg.DIST_BACKEND)
        _make_folder(cfg.OUTPUT_DIR)
        return launch(
            work,
            (cfg, Given(args.cfg, tuple(opts))),
            processes=max(cfg.NUM_GPUS, 1),
            num_shards=cfg.NUM_SHARDS,
            shard_id=cfg.SHARD_ID,
            init_method=args.init_method,
        )
    except EXPECTED as error:
        say("error: %s", error)
        return 2
    except mp.ProcessRaisedException as error:
        say("error: %s", error)  # the traceback of the process that failed, ending with what it said
        return 1
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from the last checkpoint in OUTPUT_DIR")
        return 130


def _make_folder(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"OUTPUT_DIR {folder} cannot be made: {error.strerror}") from error
