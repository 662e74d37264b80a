"""HOG on the GPU against the CPU, Triton's pooling against PyTorch's, and compiled blocks against plain ones."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion
from yacs.config import CfgNode

from benchmarks.cases import CONFIGS, MVIT_L, MVIT_S, VIT_B, random_batch
from benchmarks.compute import pictures_for_check, uncertain_cells
from benchmarks.gpu.checks import MFM_PT, MVIT_PT, VIT_PT, Check, exact, expect, relative, small_config
from benchmarks.gpu.parts import Context, Failed, Figures
from maskfeat.build import build_backbone
from maskfeat.config import load_config
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.trainer import build_trainer
from maskfeat.models import pooling
from maskfeat.objectives.hog import hog
from tests.golden.golden import REPO

_HOG_TOLERANCE = 5e-6
"""Devices add in other orders; eight numbers of a cell, added in another one on a CPU, are up to 1.1e-6 apart. A
gradient in another bin is 1e-2."""
_COMPILES = 15.0  # seconds that kernels of one shape may take to compile


def hog_bins(context: Context) -> Figures:
    """HOG of pictures full of gradients on the edge of a bin: the device's numbers are the CPU's.

    Cells whose bins hang on how float32 rounds are left out, except where sums have no rounding error.
    """
    cfg = load_config(CONFIGS / VIT_B, [])
    like = torch.empty(*((1, 3, 64, 64) if context.toy else (32, 3, 224, 224)))
    found: Figures = {}
    for name, picture in pictures_for_check(like, cfg).items():
        mine, expected = hog(picture.clip.to(context.device)).cpu(), hog(picture.clip)
        apart = (mine - expected).abs()
        beyond = int((apart > _HOG_TOLERANCE).sum())
        if not picture.exact:
            apart[uncertain_cells(picture.clip, 9, 8)] = 0.0
        found[name] = {"apart": apart.max().item(), "on ties": beyond, "of": apart.numel()}
        expect(f"HOG of {name}", found[name]["apart"], _HOG_TOLERANCE)
    golden = np.load(REPO / "tests" / "golden" / "hog.npz")
    for name in ("noise", "smooth", "edge"):
        mine = hog(torch.from_numpy(golden[name]).to(context.device)).cpu()
        found[f"golden {name}"] = expect(
            f"HOG of golden {name}", (mine - torch.from_numpy(golden[f"{name}_hog"])).abs().max().item(), _HOG_TOLERANCE
        )
    return found


class Pooling(NamedTuple):
    """A shape of pooling."""

    grid: tuple[int, ...]
    heads: int
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    prefix: int

    def __str__(self) -> str:
        sizes = ["x".join(map(str, size)) for size in (self.grid, self.kernel, self.stride)]
        return f"{sizes[0]}, {self.heads} x {self.channels} channels, kernel {sizes[1]}, stride {sizes[2]}"


def pooling_shapes(cfg: CfgNode) -> list[Pooling]:
    """Return each distinct shape among the poolings of queries, keys and values of a recipe."""
    with torch.device("meta"):
        backbone: Any = build_backbone(cfg)
    found: dict[Pooling, None] = {}
    for attention in backbone.modules():
        convs: list[Any] = [m for m in attention.children() if isinstance(m, tuple(pooling.POOL_CONV.values()))]
        for conv in convs:
            channels = len(conv.weight)
            heads = attention.num_heads
            shape = (conv.grid, heads, channels, tuple(conv.kernel_size), tuple(conv.stride), conv.prefix)
            found[Pooling(*shape)] = None
    return list(found)


TOY_POOLINGS = (
    Pooling((2, 3, 5), 1, 12, (3, 3, 3), (1, 1, 1), 1),
    Pooling((1, 5, 6), 2, 12, (1, 3, 3), (1, 2, 2), 1),
)


def triton_pooling(dtype: torch.dtype) -> Check:
    """Triton's pooling, forward and backward, against convolutions in float64: in bfloat16 at each shape of MViTv2-S,
    then L, as time allows; in float32 at one of each kernel and stride.

    On the CPU the kernels run in Triton's interpreter, where PyTorch allows it.
    """

    def check(context: Context) -> Figures:
        if not context.cuda and TorchVersion(torch.__version__) < "2.12":
            context.needs_cuda("Triton's kernels (torch before 2.12 takes no interpreted ones)")
            return {}
        kernels = pooling._triton_kernels()
        if kernels is None:
            raise Failed("MASKFEAT_TRITON=1 in the environment does not select the kernels")
        shapes = [TOY_POOLINGS[dtype == torch.bfloat16]]  # the interpreter is slow: one each
        if not context.toy:
            recipes = (load_config(CONFIGS / path, []) for path in (MVIT_S, MVIT_L))
            shapes = list(dict.fromkeys(shape for cfg in recipes for shape in pooling_shapes(cfg)))
            if dtype == torch.float32:
                shapes = list({(shape.kernel, shape.stride): shape for shape in shapes[::-1]}.values())
        found: Figures = {}
        for shape in shapes:
            if found and context.left() < _COMPILES:
                context.not_run.append(f"Triton's pooling of {shape} in {dtype}: no time left")
                continue
            found[str(shape)] = errors = _pool(shape, dtype, kernels, context)
            context.note(**{str(dtype).removeprefix("torch."): found})
            expect(f"the output of {shape}", errors["output"], 1.0)
            expect(f"the input's gradient of {shape}", errors["input gradient"], 1.0)
            expect(f"the weight's gradient of {shape}", errors["weight gradient"], 1e-5)
        return found

    return check


def _pool(shape: Pooling, dtype: torch.dtype, kernels: Any, context: Context) -> dict[str, float]:
    """How far a shape is off.

    Returns:
        for output and input gradient the largest difference over what one rounding to `dtype` and float32 sums allow;
        for the weight's gradient the largest difference over the largest number.
    """
    draw = torch.Generator().manual_seed(0)
    width = shape.heads * shape.channels
    tokens = shape.prefix + math.prod(shape.grid)
    fused = torch.randn(2, tokens, 3 * width, generator=draw).to(context.device, dtype)
    weight = torch.randn(shape.channels, 1, *shape.kernel, generator=draw).to(context.device)
    x = fused[..., width : 2 * width]
    if context.cuda:
        leaf, kernel = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = pooling.conv_pool(leaf, shape.prefix, shape.grid, shape.stride, kernel)
        grad = torch.randn(y.shape, generator=draw).to(y)
        dx, dw = torch.autograd.grad(y, [leaf, kernel], grad)
        y, dx = y.detach()[:, shape.prefix :], dx[:, shape.prefix :]
    else:  # the kernels themselves: `conv_pool` takes them on CUDA alone
        patches = x[:, shape.prefix :].unflatten(1, shape.grid)
        y = kernels.forward(patches, weight, shape.stride)
        grad = torch.randn(2, shape.prefix + math.prod(y.shape[1:4]), width, generator=draw).to(dtype)
        upstream = grad[:, shape.prefix :].unflatten(1, y.shape[1:4])
        dx = kernels.grad_input(upstream, weight, shape.stride, shape.grid).flatten(1, 3)
        dw = kernels.grad_weight(patches, upstream, weight.shape, shape.stride)
        y = y.flatten(1, 3)
    expected = _by_convolution(
        x[:, shape.prefix :].unflatten(1, shape.grid), weight, grad[:, shape.prefix :], shape.stride
    )
    # Triton's interpreter cuts bfloat16 where devices round it.
    unit = torch.finfo(dtype).eps * (0.51 if context.cuda or dtype != torch.bfloat16 else 1.01)
    return {
        "output": _off(y, expected[0], unit),
        "input gradient": _off(dx, expected[1], unit),
        "weight gradient": ((dw.double() - expected[2]).abs().max() / expected[2].abs().max()).item(),
    }


def _off(found: Tensor, expected: Tensor, unit: float) -> float:
    return ((found.double() - expected).abs() / (2e-5 + unit * expected.abs())).max().item()


def _by_convolution(x: Tensor, weight: Tensor, grad: Tensor, stride: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, N', D), dx (B, N, D) and dw by PyTorch's convolution of one group a channel, in float64."""
    heads = x.shape[-1] // len(weight)
    wide = weight.double().repeat(heads, 1, 1, 1, 1).requires_grad_()
    clip = x.double().movedim(-1, 1).contiguous().requires_grad_()
    y = F.conv3d(clip, wide, None, tuple(stride), [size // 2 for size in weight.shape[2:]], groups=len(wide))
    out = y.flatten(2).transpose(1, 2)
    dx, dw = torch.autograd.grad(out, [clip, wide], grad.double())
    return out.detach(), dx.flatten(2).transpose(1, 2), dw.unflatten(0, (heads, -1)).sum(0)


def compiled(context: Context) -> Figures:
    """Three steps with TRAIN.COMPILE against three without."""
    found: Figures = {}
    for recipe, precision in ((VIT_PT, "off"), (VIT_PT, "bf16"), (MVIT_PT, "off"), (MFM_PT, "bf16")):
        if context.toy and (recipe, precision) != (VIT_PT, "off"):
            continue
        seen: dict[str, dict[str, list[float]]] = {}
        for compile_it in ("False", "True"):
            torch.compiler.reset()
            opts = ("TRAIN.COMPILE", compile_it, "TRAIN.MIXED_PRECISION", {"off": "False"}.get(precision, precision))
            cfg = small_config(recipe, context, *opts)
            seed_everything(0)
            trainer = build_trainer(cfg, context.device)
            trainer.model.train()
            batch = random_batch(cfg, context.device)
            seen[compile_it] = {"loss": [], "grad_norm": []}
            for _ in range(2 if context.toy else 3):
                trainer.begin_step(1000)
                with exact():
                    trainer.train_step(batch)
                values = trainer.metrics.read()
                for key, kept in seen[compile_it].items():
                    kept.append(values[key])
        name = f"{Path(recipe[0]).stem} {precision}"
        found[name] = {
            key: max(relative(a, b) for a, b in zip(seen["True"][key], seen["False"][key], strict=True))
            for key in ("loss", "grad_norm")
        }
        for key, limit in (("loss", 1e-4), ("grad_norm", 1e-3)):
            expect(f"the {key} of {name}, compiled,", found[name][key], limit if precision == "off" else 0.02)
    return found
