"""Whole steps of pre-training against the plain formulation of the same step."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import MVIT_S, VIT_B, Options, random_batch
from benchmarks.compute import maskfeat_objective, size_of
from benchmarks.measure import GRADIENT_TOLERANCE, Row, check_same, in_float32, in_turn, peak_mib
from benchmarks.reference_step import reference_loss, reference_optimizer, reference_step
from maskfeat.batch import Batch
from maskfeat.engine.parallelize import autocast
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.trainer import build_trainer
from maskfeat.models.layers import set_impl
from maskfeat.objectives.maskfeat import MaskFeat

FLOAT32_TOLERANCE = 2e-4
"""Of the largest gradient, between two float32 computations of a whole model. Hidden tokens start out equal, and where
a max-pooling of MViTv2 meets values that rounding alone tells apart, it lets the gradient go one way or the other: the
reference's form in float32 is 5e-5 from itself in float64. In float64 the two forms have to agree to 1e-5."""


def measure_step(options: Options) -> Iterator[Row]:
    """Whole steps: MViTv2-S and ViT-B, or the recipe given."""
    yield _step(options, MVIT_S, 1, ">= 2x, memory <= 0.5x")
    if options.cfg is None:
        yield _step(options, VIT_B, 4, "")


class Side(NamedTuple):
    """A model and the loss that it is trained with."""

    model: nn.Module
    loss: Callable[[Batch], Tensor]

    def passes(self, batch: Batch, precision: str = "off") -> Tensor:
        """Forward and backward, from no gradients: the loss, a detached scalar."""
        self.model.zero_grad(set_to_none=True)
        with autocast(batch.clip.device, precision):
            loss = self.loss(batch)
        loss.backward()
        return loss.detach()


def ours_of(objective: MaskFeat, model: nn.Module | None = None) -> Side:
    """The package's own way; `model` where the objective is wrapped."""
    called = model or objective
    return Side(objective, lambda batch: called(batch).loss)


def reference_of(objective: MaskFeat) -> Side:
    """The reference's way on the weights of an objective, which is switched to the reference forms."""
    set_impl(objective, "reference")
    return Side(objective, lambda batch: reference_loss(objective, batch))


def check_sides(what: str, ours: Side, reference: Side, batch: Batch, tolerance: float) -> str:
    """Losses and gradients of two sides with the same weights; in words how far apart they are."""
    with in_float32():
        loss, expected = ours.passes(batch), reference.passes(batch)
    mine, theirs = ([p.grad for p in side.model.parameters()] for side in (ours, reference))
    note = check_same(what, loss, expected, mine, theirs, tolerance)
    for side in (ours, reference):
        side.model.zero_grad(set_to_none=True)
    return note


def _step(options: Options, default: str, batch_size: int, asked: str) -> Row:
    """One recipe. Ours is the program's own step on what a run builds; memory is that of forward and backward."""
    cfg = options.recipe(default, batch_size)
    device = options.device
    plain = maskfeat_objective(cfg).to(device)  # first: it says where a recipe has no reference form
    seed_everything(cfg.RNG_SEED)
    trainer = build_trainer(cfg, device)
    objective, optimizer = trainer.objective, trainer.optimizer
    assert isinstance(objective, MaskFeat)
    batch = random_batch(cfg, device)
    what = f"step of {Path(options.cfg or default).stem}, {size_of(batch)}"

    state = objective.state_dict()
    wide = [maskfeat_objective(cfg).to(device, torch.float64) for _ in range(2)]
    for twin in (plain, *wide):
        twin.load_state_dict(state)
    wide_batch = replace(batch, clip=batch.clip.double())
    note = f"float64: {check_sides(what, ours_of(wide[0]), reference_of(wide[1]), wide_batch, GRADIENT_TOLERANCE)}"
    del wide, wide_batch
    ours, reference = ours_of(objective, trainer.model), reference_of(plain)
    note += f"; float32: {check_sides(what, ours, reference, batch, FLOAT32_TOLERANCE)}"

    plain_optimizer = reference_optimizer(optimizer, plain, objective)
    sides = {
        "reference": lambda: reference_step(plain, plain_optimizer, batch, trainer.clip_norm, trainer.precision),
        "ours": lambda: trainer.train_step(batch),
    }
    seconds = in_turn(sides, options.repeats, device)
    for side in (ours, reference):
        side.model.zero_grad(set_to_none=True)
    plain_mib = peak_mib(lambda: reference.passes(batch, trainer.precision), device)
    ours_mib = peak_mib(lambda: ours.passes(batch, trainer.precision), device)
    note += f"; timed in {trainer.precision.replace('off', 'fp32')}"
    return Row(what, seconds["reference"], seconds["ours"], plain_mib, ours_mib, asked, note)
