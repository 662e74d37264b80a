"""Seconds of single computations: the poolings of MViTv2 in three forms, and a ResNet in two layouts."""

import math
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor

from benchmarks.cases import CONFIGS, MVIT_L, MVIT_S, RESNET_50
from benchmarks.gpu.checks import MFM_PT, small_config
from benchmarks.gpu.kernels import TOY_POOLINGS, Pooling, pooling_shapes
from benchmarks.gpu.parts import Context, Figures
from benchmarks.measure import Run, busy_seconds, in_turn
from maskfeat.build import build_backbone
from maskfeat.config import load_config
from maskfeat.engine.parallelize import autocast
from maskfeat.models import pooling

WITHIN = 1.05  # where compiled code takes at most so many times as long, it replaces the Triton kernels
_CLIPS = 8
_CALLS = 20  # of which the mean counts
_LONGEST = 10.0  # seconds for one shape, compilation included

Form = Callable[[Tensor, Tensor], Tensor]


def pooling_against_compile(context: Context) -> Figures:
    """Pooling of tokens at each shape of MViTv2-S, then L, in bf16: Triton's kernels, PyTorch's convolutions in the
    layout of the tokens, and the compiled reference form (a plain conv3d).

    `verdict` follows from the seconds of all shapes together: the kernels stay where compiled code is more than 5 %
    slower.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(context.data / "inductor"))
    shapes = list(TOY_POOLINGS[1:])
    if not context.toy:
        recipes = (load_config(CONFIGS / path, []) for path in (MVIT_S, MVIT_L))
        shapes = list(dict.fromkeys(shape for cfg in recipes for shape in pooling_shapes(cfg)))
    has_kernels = context.needs_cuda("Triton's pooling kernels")
    rows: list[Figures] = []
    for shape in shapes:
        if rows and context.left() < _LONGEST:
            context.not_run.append(f"pooling {shape}: no time left")
            continue
        rows.append(_row(shape, context, has_kernels))
        context.note(shapes=rows)
    if not has_kernels:
        return {}
    ratio = sum(_total(row["compiled"]) for row in rows) / sum(_total(row["triton"]) for row in rows)
    return {"ratio": ratio, "verdict": verdict(ratio)}


def verdict(ratio: float) -> str:
    """What follows from the time of compiled code over that of the Triton kernels."""
    return "the Triton kernels stay" if ratio > WITHIN else "the Triton kernels go"


def _total(seconds: dict[str, float]) -> float:
    return seconds["forward"] + seconds["backward"]


def _row(shape: Pooling, context: Context, has_kernels: bool) -> Figures:
    """Seconds of one shape, forward and backward, by form; `ratio`: compiled over Triton."""
    width = shape.heads * shape.channels
    tokens = shape.prefix + math.prod(shape.grid)
    dtype = torch.bfloat16
    fused = torch.randn(2 if context.toy else _CLIPS, tokens, 3 * width, device=context.device, dtype=dtype)
    x = fused[..., width : 2 * width].detach().requires_grad_()
    weight = torch.randn(shape.channels, 1, *shape.kernel, device=context.device, requires_grad=True)
    torch._dynamo.reset()
    # Generating code takes longer than all else of a toy run.
    backend = "aot_eager" if context.toy else "inductor"
    compiled = torch.compile(pooling.reference_pool, dynamic=False, backend=backend)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return pooling.conv_pool(x, shape.prefix, shape.grid, shape.stride, weight)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return compiled(x, shape.prefix, shape.grid, shape.stride, weight)

    forms: dict[str, Form] = {"convolutions": ours, "compiled": plain}
    if has_kernels:
        forms = {"triton": ours, **forms}
    found: Figures = {"shape": str(shape)}
    for name, form in forms.items():
        with mock.patch.object(pooling, "_ASKED", name == "triton"):  # the backward pass chooses, too
            found[name] = _seconds(form, x, weight, context)
    if has_kernels:
        found["ratio"] = _total(found["compiled"]) / _total(found["triton"])
        found["verdict"] = verdict(found["ratio"])
    return found


def _seconds(form: Form, x: Tensor, weight: Tensor, context: Context) -> dict[str, float]:
    """Seconds that kernels of a forward pass take, and of a backward pass (both passes less the forward one).

    Not by the clock: of small shapes that would be the time of Python, which compiled blocks do not spend.
    """
    calls = 1 if context.toy else _CALLS
    with autocast(context.device, "bf16"):
        grad = torch.ones_like(form(x, weight))

        def forward() -> None:
            with torch.no_grad():
                for _ in range(calls):
                    form(x, weight)

        def both() -> None:
            for _ in range(calls):
                torch.autograd.grad(form(x, weight), [x, weight], grad)

        sides: dict[str, Run] = {"forward": forward, "both": both}
        for run in sides.values():
            run()
        busy = {name: min(busy_seconds(run, context.device) for _ in range(3)) / calls for name, run in sides.items()}
    return {"forward": busy["forward"], "backward": max(busy["both"] - busy["forward"], 0.0)}


def layouts(context: Context) -> Figures:
    """Forward and backward pass of ResNet-50 in bf16 with channels last, as the package has them, and first."""
    cfg = small_config(MFM_PT, context) if context.toy else load_config(CONFIGS / RESNET_50, [])
    backbone: Any = build_backbone(cfg)
    backbone.to(context.device)
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    encoder = torch.nn.Sequential(*(getattr(backbone, name) for name in names)).train()
    size = 4 if context.toy else 128
    clip = torch.randn(size, 3, *backbone.clip_size, device=context.device)

    def passes(layout: torch.memory_format) -> Run:
        images = clip.contiguous(memory_format=layout)

        def run() -> None:
            encoder.zero_grad(set_to_none=True)
            with autocast(context.device, "bf16"):
                out = encoder(images)
            out.float().square().mean().backward()

        return run

    sides = {"channels_last": passes(torch.channels_last), "channels_first": passes(torch.contiguous_format)}
    seconds = in_turn(sides, 2 if context.toy else 10, context.device)
    speeds = {name: size / found.wall for name, found in seconds.items()}
    return {"images_per_second": speeds, "ratio": speeds["channels_last"] / speeds["channels_first"], "batch": size}
