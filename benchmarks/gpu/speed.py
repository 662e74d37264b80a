"""Parts that measure speed: whole recipes beside their plain form, reading, kernels, layouts, and where time goes."""

import gc
import importlib.util
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import (
    CLIP_FRAMES,
    CLIP_SIZE,
    IMAGE_SIZE,
    MVIT_L,
    MVIT_S,
    RESNET_50,
    VIT_B,
    VIT_L,
    Options,
    data_for,
    random_batch,
)
from benchmarks.compute import maskfeat_objective
from benchmarks.gpu.parts import SPEED, Context, Figures, Part
from benchmarks.gpu.speed_kernels import layouts, pooling_against_compile
from benchmarks.measure import kernels_of, synchronise
from benchmarks.reference_step import reference_optimizer, reference_step
from benchmarks.training import PEAK, RECIPES, Steps, Training, cfg_name, endless, measure_recipe, steady
from maskfeat.batch import Batch
from maskfeat.build import build_loader, build_optimizer
from maskfeat.demos.scenes import MOTIONS, SHAPES
from maskfeat.demos.synthetic import make_clips, make_images
from maskfeat.distributed.world import available_cores
from maskfeat.models.layers import set_impl
from maskfeat.registry import dataset_spec
from tests import small

logger = logging.getLogger(__name__)

MEASURED_PEAK = 790e12  # multiplications and additions a second of an H200 in bf16 that a large product reaches
_LISTED = 1024  # clips of an epoch
_LINKED = 8192  # images of a class in an epoch: a worker takes whole batches, and there are two classes
SMALL = {
    VIT_B: small.VIT_PT, VIT_L: small.VIT_PT, MVIT_S: small.MVIT_PT, MVIT_L: small.MVIT_PT, RESNET_50: small.MFM_PT,
}  # fmt: skip
BATCH = {path: (size, asked) for path, size, asked in RECIPES}


def options_for(context: Context, path: str) -> Options:
    """How a recipe is measured: in bf16, compiled, from files that are made here; in a toy run small and few."""
    cores = available_cores()
    opts = ["TRAIN.MIXED_PRECISION", "bf16", "NUM_GPUS", str(int(context.cuda))]
    opts += ["DATA_LOADER.NUM_WORKERS", str(1 if context.toy else cores)]
    if context.toy:
        opts = [*SMALL[path], *opts]
    return Options(
        device=context.device,
        steps=2 if context.toy else 200,
        seconds=8.0,
        compile=not context.toy,
        opts=tuple(opts),
        folder=str(context.folder),
    )


def images(context: Context) -> Path:
    """JPEG files in the size of ImageNet's, shared by the parts: the folder, where each has many names."""
    size, number, names = ((48, 64), 16, 32) if context.toy else (IMAGE_SIZE, 64, _LINKED)
    made = make_images(context.data / "speed_images", SHAPES[:2], number, val_per_class=1, size=size)
    root = context.data / "speed_images_linked"
    if not root.exists():
        draft = context.folder / "linked"
        shutil.copytree(made / "val", draft / "val", copy_function=os.link)
        for folder in sorted((made / "train").iterdir()):
            (draft / "train" / folder.name).mkdir(parents=True)
            files = sorted(folder.iterdir())
            for n in range(names):
                os.link(files[n % len(files)], draft / "train" / folder.name / f"{n:05d}.jpg")
        draft.rename(root)
    return root


def clips(context: Context) -> Path:
    """H.264 files in the size of Kinetics', shared by the parts: the folder, whose list has each of them many times."""
    size, frames = ((48, 64), 20) if context.toy else (CLIP_SIZE, CLIP_FRAMES)
    counts: dict[str, Any] = {"train_per_class": 4, "val_per_class": 1, "test_per_class": 1}
    root = make_clips(context.data / "speed_clips", MOTIONS[:1], num_frames=frames, size=size, **counts)
    lines = (root / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (context.folder / "train.csv").write_text("".join(lines * (_LISTED // len(lines))), encoding="utf-8")
    return root


def with_files(options: Options, context: Context, path: str) -> Options:
    """The options with the files that a recipe reads."""
    if dataset_spec(options.recipe(path, 8), "TRAIN").media == "image":
        return replace(options, data=str(images(context)))
    prefix = ("DATA.PATH_PREFIX", str(clips(context)))
    return replace(options, data=str(context.folder), opts=(*options.opts, *prefix))


def fitting(size: int, measure: Callable[[int], None]) -> int:
    """Measure with batches of `size`, or of half as many until they fit into memory; return how many did."""
    while True:
        try:
            measure(size)
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        gc.collect()
        torch.cuda.empty_cache()
        logger.info("out of memory: %d samples next", size)


def row(line: Training) -> Figures:
    """A line of the table of whole recipes, with the share of both peaks."""
    share = line.utilisation
    return {**line.as_dict(), "of_peak": share, "of_measured_peak": share and share * PEAK / MEASURED_PEAK}


def recipe(path: str) -> Callable[[Context], Figures]:
    """Whole steps of a recipe on random input and on files; then of its plain form with autocast and without, and of
    ViT-B not compiled. Of ResNet-50, which has no plain form, the encoder in two layouts.
    """

    def run(context: Context) -> Figures:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(context.data / "inductor"))
        first, asked = BATCH[path]
        options = with_files(options_for(context, path), context, path)

        def ours(size: int) -> None:
            for line in measure_recipe(options, path, size, asked):
                context.note(**{line.input: row(line)})

        size = fitting(4 if context.toy else first, ours)
        if path == RESNET_50:  # MFM has no plain form here
            return {"layouts": layouts(context)} if _time_for(context, "layouts", 8) else {}
        for precision in ("bf16", "off"):
            _plain(context, options, path, size, precision)
        if path == VIT_B:
            _eager(context, options, path, size)
        return {}

    return run


def _time_for(context: Context, what: str, seconds: float) -> bool:
    """Whether so many are left; otherwise `what` is listed as not run."""
    if context.left() > seconds:
        return True
    context.not_run.append(f"{what}: no time left")
    context.note()
    return False


def _plain(context: Context, options: Options, path: str, size: int, precision: str) -> None:
    """Steps of the plain form, not compiled, with autocast ("bf16") or without ("off")."""
    name = f"plain_{'autocast' if precision == 'bf16' else 'float32'}"
    if not _time_for(context, name, 12):
        return

    def measure(size: int) -> None:
        cfg = options.recipe(path, size)
        objective = maskfeat_objective(cfg).to(context.device).train()
        set_impl(objective, "reference")
        optimizer = reference_optimizer(build_optimizer(cfg, objective), objective, objective)
        batch = random_batch(cfg, context.device)
        pace = steady(
            lambda: reference_step(objective, optimizer, batch, cfg.SOLVER.CLIP_GRAD_L2NORM, precision),
            context.device,
            options.steps,
            options.seconds / 2,
        )
        context.note(
            **{name: {"batch": len(batch), "steps": pace.steps, "samples_per_second": len(batch) / pace.seconds}}
        )

    fitting(size, measure)


def _eager(context: Context, options: Options, path: str, size: int) -> None:
    """Our own steps on random input without compilation."""
    if not _time_for(context, "not_compiled", 8):
        return

    def measure(size: int) -> None:
        cfg = replace(options, compile=False).recipe(path, size)
        training, batch = Steps(cfg, context.device), random_batch(cfg, context.device)
        pace = steady(lambda: training.step(batch), context.device, options.steps, options.seconds / 2)
        found = {"batch": len(batch), "steps": pace.steps, "samples_per_second": len(batch) / pace.seconds}
        context.note(not_compiled=found)

    fitting(size, measure)


_READ: Sequence[tuple[str, str, tuple[str, ...]]] = (
    # what, recipe, overrides
    ("images, pil", VIT_B, ("DATA_LOADER.IMAGE_BACKEND", "pil")),
    ("images, simplejpeg", VIT_B, ("DATA_LOADER.IMAGE_BACKEND", "simplejpeg")),
    ("clips", MVIT_S, ()),
)


def reading(context: Context) -> Figures:
    """Samples a second that the loader hands out, by the number of workers."""
    cores = available_cores()
    numbers = (1,) if context.toy else tuple(n for n in (1, 2, 4, 8, 16, 32) if n <= cores)
    found: dict[str, Figures] = {}
    for name, path, opts in _READ:
        if "simplejpeg" in opts and importlib.util.find_spec("simplejpeg") is None:
            context.not_run.append(f"{name}: needs the package simplejpeg")
            continue
        options = with_files(options_for(context, path), context, path)
        for workers in numbers[::-1]:
            if not _time_for(context, f"{name} with {workers} workers", 6):
                continue
            more = (*options.opts, *opts, "DATA_LOADER.NUM_WORKERS", str(workers))
            asked = replace(options, opts=more)
            cfg = asked.recipe(path, 32, *data_for(asked.recipe(path, 32), asked, 0, 0))
            speed = _read(endless(build_loader(cfg, "train", device=context.device)), 0.2 if context.toy else 3.0)
            found.setdefault(name, {})[str(workers)] = speed
            context.note(samples_per_second_by_workers=found, cores=cores)
    return {}


def _read(batches: Iterator[Batch], seconds: float) -> float:
    """Samples a second over so many seconds, from the second batch on."""
    next(batches)
    samples, began = 0, time.perf_counter()
    while samples == 0 or time.perf_counter() - began < seconds:
        samples += len(next(batches))
    return samples / (time.perf_counter() - began)


def slowest_recipe(context: Context) -> Figures:
    """Where the time of a step goes: the kernels of the recipe that other parts found furthest from the peak.

    The whole trace is left in DIR/data/trace.json.gz (for chrome://tracing or Perfetto).
    """
    path, size = _furthest_from_peak(context)
    options = options_for(context, path)
    context.note(recipe=cfg_name(path))
    found: list[profile] = []

    def warm_up(size: int) -> None:
        cfg = options.recipe(path, size)
        batch = random_batch(cfg, context.device)
        training = Steps(cfg, context.device)
        steady(lambda: training.step(batch), context.device, 3)
        with profile(activities=_ACTIVITIES[context.cuda]) as profiled:
            for _ in range(_TRACED):
                training.step(batch)
            synchronise(context.device)
        found.append(profiled)

    fitting(size, warm_up)
    kernels = _kernels(found[0], context.cuda)
    total = sum(seconds for _, _, seconds in kernels)
    top = [
        {"kernel": name[:160], "calls": calls // _TRACED, "ms": 1e3 * seconds / _TRACED, "share": seconds / total}
        for name, calls, seconds in sorted(kernels, key=lambda kernel: -kernel[2])[:_TOP]
    ]
    found[0].export_chrome_trace(str(context.data / "trace.json.gz"))
    return {"ms_per_step": 1e3 * total / _TRACED, "top": top}


_TRACED = 3  # steps
_TOP = 15
_ACTIVITIES = {False: [ProfilerActivity.CPU], True: [ProfilerActivity.CPU, ProfilerActivity.CUDA]}


def _furthest_from_peak(context: Context) -> tuple[str, int]:
    """A recipe and its batch; MViTv2-S where nothing was measured."""
    shares = []
    for name, path in RECIPE_PARTS.items():
        outcome = context.partial.with_name(f"{name}.json")
        figures = json.loads(outcome.read_text(encoding="utf-8"))["figures"] if outcome.exists() else {}
        share = figures.get("random", {}).get("of_peak")
        if share:
            shares.append((share, path, figures["random"]["batch"]))
    return min(shares)[1:] if shares else (MVIT_S, 4 if context.toy else BATCH[MVIT_S][0])


def _kernels(profiled: profile, cuda: bool) -> list[tuple[str, int, float]]:
    """(name, calls, seconds) of each kernel, or on the CPU of each operator without those that it calls."""
    if cuda:
        return kernels_of(profiled)
    return [(event.key, event.count, event.self_cpu_time_total / 1e6) for event in profiled.key_averages()]


RECIPE_PARTS = {
    "speed ViT-B": VIT_B,
    "speed MViTv2-S": MVIT_S,
    "speed ResNet-50": RESNET_50,
    "speed ViT-L": VIT_L,
    "speed MViTv2-L": MVIT_L,
}
_SECONDS = {VIT_B: 75, MVIT_S: 120, RESNET_50: 60, VIT_L: 60, MVIT_L: 120}
_RECIPES = [
    # The large ones differ from the small ones in size alone: for toys there is nothing to run.
    Part(name, SPEED, _SECONDS[path], recipe(path), cuda=path in (VIT_L, MVIT_L))
    for name, path in RECIPE_PARTS.items()
]

FIRST: tuple[Part, ...] = tuple(_RECIPES[:3])
PARTS: tuple[Part, ...] = (
    Part("pooling against compile", SPEED, 90, pooling_against_compile, environment={"MASKFEAT_TRITON": "1"}),
    *_RECIPES[3:],
    Part("trace of the slowest recipe", SPEED, 60, slowest_recipe),
    Part("reading", SPEED, 60, reading),
)
"""Most valuable first, after those of `FIRST`."""
