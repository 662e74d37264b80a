"""HOG targets, pooling attention and whole steps of pre-training, each against its plain formulation."""

import copy
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from benchmarks.cases import MVIT_S, VIT_B, Options, normalised, random_batch
from benchmarks.measure import NotTheSame, Row, check_same, compare, in_float32
from benchmarks.reference_step import frames_of, reference_target
from maskfeat.batch import Batch
from maskfeat.build import build_backbone, build_objective
from maskfeat.engine.parallelize import apply_compile
from maskfeat.errors import UserError
from maskfeat.models.attention import PoolingAttention
from maskfeat.models.layers import set_impl
from maskfeat.objectives.hog import sobel
from maskfeat.objectives.maskfeat import MaskFeat

HOG_TOLERANCE = 1e-6


def maskfeat_objective(cfg: CfgNode) -> MaskFeat:
    """The objective of a recipe. ValueError where that is not MaskFeat, the one with a reference form here."""
    objective = build_objective(cfg)
    if not isinstance(objective, MaskFeat):
        raise UserError(f"--cfg must be a recipe of MaskFeat pre-training (MODEL.MODEL_NAME MaskMViT), not {cfg.TASK}")
    return objective


class Picture(NamedTuple):
    """Clips (B, 3, ...) to check HOG on; `exact`: sums of their values have no rounding error in float32."""

    clip: Tensor
    exact: bool


def pictures_for_check(like: Tensor, cfg: CfgNode) -> dict[str, Picture]:
    """Noise, grey levels, and pictures full of gradients on the edge of a bin, of the shape of `like` (B, 3, ...)."""
    draw = torch.Generator().manual_seed(1)
    side = like.shape[-1]
    blocks = torch.randint(0, 8, (*like.shape[:-2], -(-side // 4), -(-side // 4)), generator=draw)
    blocks = blocks.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., :side, :side]
    levels = torch.randint(0, 256, like.shape, generator=draw)
    pictures = {
        "noise": Picture(torch.randn(like.shape, generator=draw), False),
        "grey levels": Picture(normalised(levels / 255, cfg), False),
        "few levels": Picture(torch.randint(0, 4, like.shape, generator=draw) / 8, True),
        "blocks": Picture(blocks / 8, True),
        "blocks of grey levels": Picture(normalised(blocks * 32 / 255, cfg), False),
    }
    return {name: Picture(picture.clip.to(like.device), picture.exact) for name, picture in pictures.items()}


def uncertain_cells(images: Tensor, bins: int, cell: int) -> Tensor:
    """(N, 3, bins, H / cell, W / cell) bool: cells with a pixel whose bin hangs on how float32 rounds.

    The sums of a gradient come out differently in every order of adding, by up to `slack`. Where that can carry it
    over the edge of a bin, or where hardly anything else is there, no formulation is more right than the other. Lines
    whose left and right pixels are equal, as all are at a mirrored border, cancel in every order that takes them in
    turn.
    """
    gx, gy = sobel(images.double())
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    level = padded[..., :-2] == padded[..., 2:]
    cancels = level[:, :, :-2] & level[:, :, 1:-1] & level[:, :, 2:]
    slack = 8 * torch.finfo(torch.float32).eps * images.abs().max().double()
    magnitude, place = torch.hypot(gx, gy), torch.atan2(gx, gy) / math.pi * bins
    edge = place.round() * math.pi / bins
    error = torch.where(cancels, 0.0, slack) * edge.cos().abs() + slack * edge.sin().abs()
    distance = (place * math.pi / bins - edge).abs() * magnitude
    near = F.max_pool2d(((distance <= error) & (error > 1e-3 * slack)).float(), cell) > 0
    nothing = slack * F.avg_pool2d((magnitude <= slack).double(), cell)  # what rounding leaves on flat ground
    near |= nothing > HOG_TOLERANCE / bins * F.avg_pool2d(magnitude, cell)
    return near[:, :, None].expand(-1, -1, bins, -1, -1)


def check_hog(objective: MaskFeat, batch: Batch, cfg: CfgNode) -> str:
    """Our targets against the reference's on every picture; in words what was found.

    Raises:
        NotTheSame: where a number differs by more than HOG_TOLERANCE, cells aside whose bins hang on rounding.
    """
    hidden = objective.hidden_tokens(batch)
    largest, beyond, numbers = 0.0, 0, 0
    for name, picture in pictures_for_check(batch.clip, cfg).items():
        given = Batch(clip=picture.clip, hidden=batch.hidden)
        apart = (objective.hidden_target(given) - reference_target(objective, given)).abs()
        numbers += apart.numel()
        beyond += int((apart > HOG_TOLERANCE).sum())
        if not picture.exact:
            frames = frames_of(objective, given)
            cells = uncertain_cells(frames, objective.bins, objective.cell)
            apart[tokens_of(cells, objective.cells)[hidden.flatten()]] = 0.0
        largest = max(largest, apart.max().item())
        if not largest <= HOG_TOLERANCE:
            raise NotTheSame(
                f"HOG of {name}: ours and the reference's are {largest:.1e} apart (at most {HOG_TOLERANCE:g})"
            )
    return f"{largest:.0e} apart; {beyond} of {numbers} numbers on rounding ties"


def tokens_of(cells: Tensor, side: int) -> Tensor:
    """(N, 3, bins, H, W) by cell -> (N tokens, F), in the order of the targets."""
    split = cells.flatten(1, 2).unfold(2, side, side).unfold(3, side, side)
    return split.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def measure_hog(options: Options) -> Iterator[Row]:
    """Targets of the hidden tokens of a batch of images (or of clips, with a video recipe)."""
    cfg = options.recipe(VIT_B, 16)
    objective = maskfeat_objective(cfg).to(options.device)
    batch = random_batch(cfg, options.device)
    if cfg.TRAIN.COMPILE:
        apply_compile(objective, options.device)
    note = check_hog(objective, batch, cfg)
    share = objective.hidden_tokens(batch).float().mean().item()
    sides = {
        "reference": lambda: reference_target(objective, batch),
        "ours": lambda: objective.hidden_target(batch),
    }
    with torch.no_grad():
        what = f"HOG targets, {size_of(batch)}, {share:.0%} hidden"
        yield compare(what, sides, options.repeats, options.device, asked=">= 20x", note=note)


def size_of(batch: Batch) -> str:
    """8 x 224 x 224."""
    return " x ".join(str(n) for n in (len(batch), *batch.clip.shape[2:]))


def distinct_attentions(cfg: CfgNode) -> list[tuple[str, PoolingAttention]]:
    """One module for each shape of attention among the blocks of a recipe, and which blocks have it."""
    backbone = build_backbone(cfg)
    assert isinstance(backbone, torch.nn.Module)
    found: dict[tuple[object, ...], list[tuple[int, PoolingAttention]]] = {}
    modules = [module for module in backbone.modules() if isinstance(module, PoolingAttention)]
    for number, module in enumerate(modules):
        shape = (module.grid, module.q_grid, module.kv_grid, module.num_heads, module.head_width)
        found.setdefault(shape, []).append((number, module))
    if not found:
        raise UserError("--cfg must be a recipe of an MViTv2 to measure its attention: this one pools nothing")
    return [(_block_name([number for number, _ in same]), same[0][1]) for same in found.values()]


def _block_name(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"block {numbers[0]}"
    return f"blocks {numbers[0]}-{numbers[-1]} ({len(numbers)})"


def measure_attention(options: Options) -> Iterator[Row]:
    """Forward and backward of each distinct shape of pooling attention in a recipe."""
    torch.manual_seed(0)
    cfg = options.recipe(MVIT_S, 1)
    for name, module in distinct_attentions(cfg):
        yield _attention(name, module.to(options.device), cfg.TRAIN.BATCH_SIZE, options)


def _attention(name: str, module: PoolingAttention, batch: int, options: Options) -> Row:
    shape = (batch, module.prefix + math.prod(module.grid), module.num_heads * module.head_width)
    x = torch.randn(shape, device=options.device, requires_grad=True)
    upstream = torch.randn_like(module(x))
    plain = copy.deepcopy(module)
    set_impl(plain, "reference")

    def passes(side: PoolingAttention) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = side(x)
        return out.detach(), torch.autograd.grad(out, [x, *side.parameters()], upstream)

    sides = {"reference": lambda: passes(plain), "ours": lambda: passes(module)}
    what = f"attention {name}: {_times(module.q_grid)} q, {_times(module.kv_grid)} kv, {module.num_heads} heads"
    if options.compile:
        module.compile()
    with in_float32():
        (out, gradients), (expected, theirs) = sides["ours"](), sides["reference"]()
    note = check_same(what, out, expected, gradients, theirs)
    del out, gradients, expected, theirs
    return compare(what, sides, options.repeats, options.device, note=note)


def _times(grid: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in grid)
