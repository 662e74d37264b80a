"""Whole recipes in training: samples a second, share of the peak, waits for the device, data and targets.

The steps are the program's own, on what a run builds; input comes from files through the recipe's workers, or is one
random batch on the device, which is what the model alone could do.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from benchmarks.cases import MVIT_L, MVIT_S, RESNET_50, VIT_B, VIT_L, Options, data_for, random_batch
from benchmarks.measure import in_turn, synchronise
from maskfeat.batch import Batch
from maskfeat.build import build_backbone, build_loader
from maskfeat.checkpoint.files import Position
from maskfeat.data.loader import BatchLoader
from maskfeat.engine.flops import multiply_adds
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.trainer import Trainer, build_trainer
from maskfeat.objectives.maskfeat import MaskFeat

PEAK = 989e12  # multiplications and additions a second of an H200 in bf16, dense, by the datasheet
FEWEST = 20  # steps that are timed, however long they take
WATCHED = 10  # steps in which stops for the device are counted

RECIPES = (
    # recipe, batch, what is asked for a second
    (VIT_B, 256, ">= 4000"),
    (VIT_L, 128, ">= 1300"),
    (MVIT_S, 32, ">= 500"),
    (MVIT_L, 16, ">= 130"),
    (RESNET_50, 256, ">= 3500"),
)


@dataclass(frozen=True)
class Training:
    """A line of the table of whole recipes.

    Attributes:
        input: "files" or "random".
        utilisation: multiply-adds of the model (three forward passes a step) over what the device could do; None
            where that is not known (the CPU), as below.
        peak_gib: the most memory that tensors took on the device.
        waits_per_step: how often the host stopped for the device in a step that logs nothing.
        waiting_for_data: share of the time beyond that of random input; None on the line of random input.
        target_share: time of the HOG targets over that of a step; None for other methods.
    """

    recipe: str
    input: str
    batch: int
    steps: int
    samples_per_second: float
    asked: str = ""
    utilisation: float | None = None
    peak_gib: float | None = None
    waits_per_step: float | None = None
    waiting_for_data: float | None = None
    target_share: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Pace(NamedTuple):
    """Seconds of a step, over how many."""

    seconds: float
    steps: int


def steady(step: Callable[[], object], device: torch.device, steps: int, limit: float = math.inf) -> Pace:
    """Time steps, after as many as it takes to warm up: a tenth of `steps`, or a quarter of `limit`.

    Args:
        steps: at most so many are timed.
        limit: seconds after which no further ones are begun, once there are `FEWEST`, or five of slow ones.
    """
    for _ in range(2):
        step()
    synchronise(device)
    began = time.perf_counter()
    step()
    synchronise(device)
    one = max(time.perf_counter() - began, 1e-9)
    for _ in range(min(steps // 10 - 3, int(min(limit / 4 / one, steps)))):
        step()
    synchronise(device)
    fewest = max(5, int(min(limit / one, FEWEST)))
    made, began = 0, time.perf_counter()
    while made < steps and (made < fewest or time.perf_counter() - began < limit):
        step()
        made += 1
    synchronise(device)
    return Pace((time.perf_counter() - began) / made, made)


class Steps:
    """Training steps of a recipe as the training loop makes them, without log lines and checkpoints."""

    def __init__(self, cfg: CfgNode, device: torch.device) -> None:
        seed_everything(cfg.RNG_SEED)
        self.device = device
        self.trainer = build_trainer(cfg, device)
        self.trainer.model.train()

    def step(self, batch: Batch) -> None:
        """Make one step, from a batch on any device."""
        trainer = self.trainer
        trainer.begin_step(steps_per_epoch=1_000_000)  # all of them are of the first epoch
        trainer.train_step(batch.to(self.device, non_blocking=True))
        trainer.position = Position(0, trainer.position.step + 1)

    def steady(self, batches: Iterator[Batch], options: Options) -> Pace:
        """Time steps on batches, as many as the options say."""
        return steady(lambda: self.step(next(batches)), self.device, options.steps, options.seconds)

    def waits_per_step(self, batches: Iterator[Batch]) -> float | None:
        """How often the host stops for the device in a step, by PyTorch's own watch; None on the CPU."""
        if self.device.type != "cuda":
            return None
        given = [next(batches) for _ in range(WATCHED)]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for batch in given:
                    self.step(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # The mode's own warning, that it is a prototype, has the word as well.
        return sum("called a synchronizing" in str(warning.message) for warning in seen) / WATCHED


def endless(loader: BatchLoader) -> Iterator[Batch]:
    """Batches of one epoch after another."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1


def _always(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def measure_training(options: Options) -> Iterator[Training]:
    """Each recipe (or the one given) on random input and on files."""
    for path, size, asked in RECIPES if options.cfg is None else ((options.cfg, 0, ""),):
        yield from measure_recipe(options, path, size, asked)


def measure_recipe(options: Options, path: str, size: int, asked: str = "") -> Iterator[Training]:
    """One recipe on random input, then on files; `size`: of a batch, unless the options say it."""
    precision = ("TRAIN.MIXED_PRECISION", "bf16") if options.device.type == "cuda" else ()
    plain = options.recipe(path, size or 8, *precision)
    images = max(2 * plain.TRAIN.BATCH_SIZE, 512 if options.device.type == "cuda" else 0)
    files = data_for(plain, options, images, max(2 * plain.TRAIN.BATCH_SIZE, 2))
    cfg = options.recipe(path, size or 8, *precision, *files)
    device = options.device
    training = Steps(cfg, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.device("meta"):
        operations = 3 * 2 * multiply_adds(build_backbone(cfg))
    batch = random_batch(cfg, device)

    def line(kind: str, pace: Pace, **more: Any) -> Training:
        speed = len(batch) / pace.seconds
        cuda = device.type == "cuda"
        return Training(
            recipe=cfg_name(options.cfg or path),
            input=kind,
            batch=len(batch),
            steps=pace.steps,
            samples_per_second=speed,
            asked=asked,
            utilisation=operations * speed / PEAK if cuda else None,
            peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None,
            **more,
        )

    alone = training.steady(_always(batch), options)
    share = _target_seconds(training.trainer, batch)
    waits = training.waits_per_step(_always(batch))
    yield line("random", alone, waits_per_step=waits, target_share=None if share is None else share / alone.seconds)
    batches = endless(build_loader(cfg, "train", device=device))
    fed = training.steady(batches, options)
    waits = training.waits_per_step(batches)
    yield line("files", fed, waits_per_step=waits, waiting_for_data=max(0.0, 1 - alone.seconds / fed.seconds))


def cfg_name(path: str) -> str:
    """A recipe's name from the path of its YAML."""
    return path.rsplit("/", 1)[-1].removesuffix(".yaml")


def _target_seconds(trainer: Trainer, batch: Batch) -> float | None:
    """Seconds for the HOG targets of a batch, by themselves."""
    objective = trainer.objective
    if not isinstance(objective, MaskFeat):
        return None
    with torch.no_grad():
        return in_turn({"target": lambda: objective.hidden_target(batch)}, 5, trainer.device)["target"].wall
