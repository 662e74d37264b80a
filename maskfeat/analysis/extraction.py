"""Features of inputs, computed in parts: what is computed of a batch, how rows are divided, and the loop.

Shape legend: N inputs, B views of a batch, D token width, L tokens (the class token, if there is one, comes first).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskfeat.analysis.command import check_finite
from maskfeat.analysis.feature_files import write_part
from maskfeat.analysis.inputs import InputBatch, Inputs, input_loader
from maskfeat.analysis.model import Model
from maskfeat.batch import BadSample
from maskfeat.errors import UserError, naming
from maskfeat.progress import Progress

TOKENS = "tokens"
PART_ROWS, PART_BYTES = 512, 64 << 20
"""Of a part: about as many inputs, and at most about as many bytes. What is computed of an unfinished one is lost."""


def outputs(model: Model, clip: Tensor, pool: str, blocks: Sequence[int]) -> dict[str, Tensor]:
    """Return what is written of a batch, by name: "features" or "tokens", or "block_N" for each block.

    Args:
        clip: (B, 3, [T,] H, W).
        pool: "mean", "cls" or "tokens".
        blocks: numbers of blocks from 0, negative ones from the end; none = the output of the network.

    Returns:
        (B, D) float32 each, or with "tokens" (B, L, D).

    Raises:
        UserError: there is no such block, or no class token.
    """
    if not blocks:
        return {"features": model.features(clip, pool)} if pool != TOKENS else {TOKENS: model.tokens(clip).x}
    depth = len(model.backbone.repeated_blocks())
    found = {}
    for number, tokens in zip(blocks, model.blocks(clip, blocks), strict=True):
        if pool == "cls" and not tokens.has_class_token:
            raise UserError(f"{model.source} has no class token: --pool mean")
        pooled = {"mean": lambda t: t.patches.mean(dim=1), "cls": lambda t: t.x[:, 0], TOKENS: lambda t: t.x}[pool]
        found[f"block_{number % depth}"] = pooled(tokens)
    return found


class Plan(NamedTuple):
    """How the rows are divided.

    Attributes:
        pool, blocks: see `outputs`.
        views: (clips of an input, crops of a clip); the features of views are averaged.
        batch_size: views of a batch.
        rows: inputs of a part, whose views fill whole batches.
        shapes: of a row of each array.
    """

    pool: str
    blocks: Sequence[int]
    views: tuple[int, int]
    batch_size: int
    rows: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def num_views(self) -> int:
        """Of each input."""
        return math.prod(self.views)

    def parts(self, inputs: int) -> int:
        """How many parts there are."""
        return -(-inputs // self.rows)

    def batches(self, part: int, inputs: int) -> range:
        """The numbers of the batches of a part."""
        first, end = (-(-min(row * self.rows, inputs) * self.num_views // self.batch_size) for row in (part, part + 1))
        return range(first, end)


def make_plan(model: Model, views: tuple[int, int], batch_size: int, pool: str, blocks: Sequence[int]) -> Plan:
    """Try the network on one view of zeros, and divide the rows. Neither depends on how many processes there are.

    Raises:
        UserError: the options do not fit the network.
    """
    number = math.prod(views)
    if pool == TOKENS and number > 1:
        raise UserError(f"--pool tokens takes one view, for tokens of several cannot be averaged; given {number}")
    zeros = torch.zeros(1, 3, *model.clip_size, device=model.device)
    shapes = {name: tuple(out.shape[1:]) for name, out in outputs(model, zeros, pool, blocks).items()}
    unit = batch_size // math.gcd(batch_size, number)
    most = min(PART_ROWS, PART_BYTES // (4 * sum(map(math.prod, shapes.values()))))
    return Plan(pool, blocks, views, batch_size, unit * max(most // unit, 1), shapes)


class _Part:
    """The rows of a part while its batches are computed: views are summed, in their order."""

    def __init__(self, number: int, plan: Plan, inputs: int) -> None:
        self.number, self.plan, self.first = number, plan, number * plan.rows
        self.left = len(plan.batches(number, inputs))
        size = min(plan.rows, inputs - self.first)
        self.sums = {name: torch.zeros(size, *shape) for name, shape in plan.shapes.items()}
        self.bad: dict[int, BadSample] = {}

    def add(self, batch: InputBatch, outs: dict[str, Tensor]) -> None:
        for name, out in outs.items():
            self.sums[name].index_add_(0, batch.index - self.first, out.float().cpu())
        self.bad.update({sample.index: sample for sample in batch.unreadable})
        self.left -= 1

    def check(self, inputs: Inputs, precision: str) -> None:
        """Raise NotFinite where a row is NaN or infinite."""
        for name, sums in self.sums.items():
            for row in (~sums.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist():
                check_finite(sums[row], inputs.paths[self.first + row], name, precision)

    def write(self, folder: Path) -> None:
        size = len(next(iter(self.sums.values())))
        rows = np.asarray([row for row in range(self.first, self.first + size) if row not in self.bad], dtype=np.int64)
        arrays = {name: (sums / self.plan.num_views).numpy()[rows - self.first] for name, sums in self.sums.items()}
        with naming(f"{folder} cannot be written"):
            write_part(folder / part_name(self.number), rows, arrays, list(self.bad.values()))


def part_name(number: int) -> str:
    """Return the name of the file of a part."""
    return f"{number:07d}.safetensors"


@torch.no_grad()
def compute_parts(
    model: Model,
    inputs: Inputs,
    plan: Plan,
    folder: Path,
    parts: Sequence[int],
    workers: int | None = None,
) -> None:
    """Compute parts and write their files.

    The outputs of a batch are fetched from the device when the next batch has been sent to it, which need not wait.

    Args:
        plan: see `make_plan`.
        folder: of the files.
        parts: their numbers.
        workers: see `input_loader`.
    """
    batches = [number for part in parts for number in plan.batches(part, len(inputs))]
    progress = Progress(f"{model.media}s", sum(min(plan.rows, len(inputs) - part * plan.rows) for part in parts))
    loader = input_loader(model, inputs, plan.views, plan.batch_size, workers, batches)
    waiting: tuple[InputBatch, dict[str, Tensor]] | None = None
    part: _Part | None = None

    def store(batch: InputBatch, outs: dict[str, Tensor]) -> None:
        nonlocal part
        number = int(batch.index[0]) // plan.rows
        if part is None:
            part = _Part(number, plan, len(inputs))
        part.add(batch, outs)
        progress.step(int((batch.view == plan.num_views - 1).sum()))
        if not part.left:
            part.check(inputs, model.precision)
            part.write(folder)
            part = None

    for batch in loader:
        outs = outputs(model, batch.clip, plan.pool, plan.blocks)
        if waiting is not None:
            store(*waiting)
        waiting = batch, outs
    if waiting is not None:
        store(*waiting)
