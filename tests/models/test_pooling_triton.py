"""The Triton pooling kernels: under Triton's interpreter, compiled without a GPU, and on a GPU where there is one.

Triton decides when a kernel is defined whether it is interpreted, so the interpreted tests run in a process of their
own (`test_interpreted`), which collects this file once more with TRITON_INTERPRET set.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.torch_version import TorchVersion

from maskfeat.models import pooling as tokenwise

triton = pytest.importorskip("triton")
pooling = pytest.importorskip("maskfeat.models.pooling_triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="run by test_interpreted")
compiled = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted")

# (B, (T, H, W), heads, channels of a head, kernel, stride)
QUICK = {
    "stride_1": (2, (2, 4, 9), 2, 12, (3, 3, 3), (1, 1, 1)),
    "stride_8_odd": (2, (2, 11, 13), 2, 12, (3, 3, 3), (1, 8, 8)),
    "image": (2, (1, 7, 9), 2, 24, (1, 3, 3), (1, 1, 1)),
}
SLOW = {
    "stride_2_odd": (1, (3, 5, 11), 1, 24, (3, 3, 3), (1, 2, 2)),
    "image_stride_2": (2, (1, 8, 7), 4, 16, (1, 3, 3), (1, 2, 2)),
    "strips_end_evenly": (1, (2, 4, 14), 1, 24, (3, 3, 3), (1, 1, 1)),
    "stride_2_even": (1, (2, 6, 10), 2, 24, (3, 3, 3), (1, 2, 2)),
    "stride_2_in_time": (1, (5, 5, 5), 1, 12, (3, 3, 3), (2, 2, 2)),
    "stride_4": (2, (2, 9, 12), 2, 12, (3, 3, 3), (1, 4, 4)),
    "stride_8": (1, (2, 16, 24), 1, 96, (3, 3, 3), (1, 8, 8)),
    "wide_kernel": (1, (2, 6, 9), 1, 12, (1, 5, 5), (1, 4, 4)),
    "one_column": (1, (2, 3, 1), 1, 64, (3, 3, 3), (1, 1, 1)),
}
CASES = QUICK | SLOW
BOTH_TIERS = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
    """x as the queries of a fused projection behind a class token, weight float32, grad, stride and (T, H, W)."""
    batch, size, heads, channels, kernel, stride = CASES[case]
    width, out = heads * channels, pooling.pooled_size(size, kernel, stride)
    draw = torch.Generator().manual_seed(len(case))
    fused = torch.randn(batch, 1 + math.prod(size), 3 * width, generator=draw).to(dtype)
    x = fused[:, 1:, width : 2 * width].unflatten(1, size)
    weight = torch.randn(channels, 1, *kernel, generator=draw)
    grad = torch.randn(batch, 1 + math.prod(out), width, generator=draw).to(dtype)[:, 1:].unflatten(1, out)
    return x, weight, grad, stride, size


def reference(x: Tensor, weight: Tensor, grad: Tensor, stride: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dw by conv3d and its gradient in float64, from the values as they were rounded to x's dtype."""
    heads = x.shape[-1] // len(weight)
    padding, wide = [k // 2 for k in weight.shape[2:]], weight.double().repeat(heads, 1, 1, 1, 1)
    x, grad = x.double().movedim(-1, 1), grad.double().movedim(-1, 1)
    y = F.conv3d(x, wide, None, stride, padding, 1, len(wide))
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, x, wide, None, stride, padding, [1, 1, 1], False, [0, 0, 0], len(wide), [True, True, False]
    )
    return y.movedim(1, -1), dx.movedim(1, -1), dw.unflatten(0, (heads, -1)).sum(0)


def assert_rounded(actual: Tensor, expected: Tensor, size: float = 1.0) -> None:
    """Equal up to one rounding to the dtype and float32 sums of terms of `size`.

    One rounding is half a unit in the last place; Triton's interpreter cuts bfloat16 instead, a whole unit.
    """
    unit = torch.finfo(actual.dtype).eps * (1.0 if INTERPRETING and actual.dtype == torch.bfloat16 else 0.5)
    torch.testing.assert_close(actual.double(), expected, rtol=1.01 * unit, atol=2e-5 * size)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger programs: what the interpreter takes is by program, whatever its size."""
    monkeypatch.setattr(pooling, "_THREADS", 512)


@interpreted
@pytest.mark.parametrize("case", BOTH_TIERS)
def test_matches_conv3d(case: str, few_programs: None) -> None:
    x, weight, grad, stride, size = make(case, torch.float32)
    y, dx, dw = reference(x, weight, grad, stride)
    mine = pooling.forward(x, weight, stride)
    assert mine.is_contiguous() and mine.dtype == x.dtype
    assert_rounded(mine, y)
    assert_rounded(pooling.grad_input(grad, weight, stride, size), dx)
    assert_rounded(pooling.grad_weight(x, grad, weight.shape, stride), dw, size=5)


@interpreted
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("image", "bfloat16"),
        ("image_stride_2", "float16"),
        pytest.param("stride_1", "float16", marks=pytest.mark.slow),
        pytest.param("stride_2_odd", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_half_precision_rounds_once(case: str, dtype: str, few_programs: None) -> None:
    """Products and sums are float32, so that only the result is rounded; weights may be of either precision."""
    x, weight, grad, stride, size = make(case, DTYPES[dtype])
    weight = weight.to(x.dtype) if case == "image" else weight
    y, dx, dw = reference(x, weight, grad, stride)
    mine = pooling.forward(x, weight, stride)
    assert mine.dtype == x.dtype
    assert_rounded(mine, y)
    assert_rounded(pooling.grad_input(grad, weight, stride, size), dx)
    dw_mine = pooling.grad_weight(x, grad, weight.shape, stride)
    assert dw_mine.dtype == torch.float32
    assert_rounded(dw_mine, dw, size=5)


@interpreted
@pytest.mark.slow
def test_programs_of_the_default_size() -> None:
    """As on a device: several programs along the places and along the channels."""
    x, weight, grad, stride, size = make("image_stride_2", torch.float32)
    y, dx, _ = reference(x, weight, grad, stride)
    assert_rounded(pooling.forward(x, weight, stride), y)
    assert_rounded(pooling.grad_input(grad, weight, stride, size), dx)


@interpreted
@pytest.mark.parametrize("programs", [1, pytest.param(5, marks=pytest.mark.slow), 10**6])
def test_programs_share_the_weight(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of one program, of several where the last has less to do, of as many as can be; the same bits twice."""
    x, weight, grad, stride, _ = make("image", torch.float32)
    _, _, expected = reference(x, weight, grad, stride)
    monkeypatch.setattr(pooling, "_PROGRAMS", programs)
    first = pooling.grad_weight(x, grad, weight.shape, stride)
    assert_rounded(first, expected, size=5)
    assert torch.equal(first, pooling.grad_weight(x, grad, weight.shape, stride))


@interpreted
def test_offsets_past_int32(few_programs: None) -> None:
    """Two samples 2**31 elements apart: most of the memory is never touched."""
    size, width, elements = (1, 3, 5), 12, 2**31
    steps = (elements, 180, 60, 12, 1)
    x = torch.empty(elements + 3 * 5 * width, dtype=torch.float16).as_strided((2, *size, width), steps)
    x.copy_(torch.randn(x.shape))
    weight = torch.randn(width, 1, 1, 3, 3)
    y, dx, dw = reference(x, weight, x, (1, 1, 1))
    assert_rounded(pooling.forward(x, weight, (1, 1, 1)), y)
    assert_rounded(pooling.grad_input(x, weight, (1, 1, 1), size), dx)
    assert_rounded(pooling.grad_weight(x, x, weight.shape, (1, 1, 1)), dw, size=5)


@interpreted
@pytest.mark.parametrize("grid", [(2, 5, 6), (5, 6)])
def test_conv_pool_through_the_kernels(
    grid: tuple[int, ...], few_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model calls, with the kernels in place of PyTorch's convolutions."""
    strides = [(1,) * len(grid), *[(1, 2, 2)[-len(grid) :]] * 2]
    weights = [torch.randn(12, 1, *(3,) * len(grid), requires_grad=True) for _ in range(3)]
    tokens = torch.randn(2, 1 + math.prod(grid), 3 * 24, requires_grad=True)
    grads = []
    for kernels in (None, pooling):
        monkeypatch.setattr(tokenwise, "_kernels_for", lambda x, weight, kernels=kernels: kernels)
        outputs = [
            tokenwise.conv_pool(share, 1, grid, stride, weight)
            for share, stride, weight in zip(tokens.chunk(3, dim=-1), strides, weights, strict=True)
        ]
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in outputs)
        grads.append([*outputs, *torch.autograd.grad(loss, [tokens, *weights])])
    for theirs, mine in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@interpreted
def test_no_samples() -> None:
    x, weight = torch.empty(0, 2, 3, 3, 24), torch.ones(12, 1, 3, 3, 3)
    assert pooling.forward(x, weight, (1, 1, 1)).shape == x.shape
    assert pooling.grad_input(x, weight, (1, 1, 1), (2, 3, 3)).shape == x.shape
    assert torch.equal(pooling.grad_weight(x, x, weight.shape, (1, 1, 1)), torch.zeros_like(weight))


def test_layouts_that_are_refused() -> None:
    x, weight, *_ = make("stride_1", torch.float32)
    spread = torch.empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    for bad in (x.transpose(2, 3), x[:, :, :, ::2][:, :, ::2], spread, x.double()):
        with pytest.raises(AssertionError):
            pooling.forward(bad, weight, (1, 1, 1))


@compiled
@pytest.mark.slow
@pytest.mark.skipif(TorchVersion(torch.__version__) < (2, 12), reason="torch 2.11 takes no interpreted kernels")
@pytest.mark.parametrize("tier", ["not slow", "slow"])
def test_interpreted(tier: str) -> None:
    """The tests above, in a process with Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= len(QUICK if tier == "not slow" else SLOW)


class Compiler:
    """Takes the place of `wrap_triton`: compiles what would be launched, for compute capability 9.0 (H100, H200)."""

    def __init__(self) -> None:
        self.done: dict[str, tuple[Any, dict[str, int]]] = {}  # by kernel: what Triton made of it, and what it takes

    def __call__(self, kernel: Any) -> dict[Any, Any]:
        return defaultdict(lambda: partial(self.compile, kernel))

    def compile(self, kernel: Any, *args: Any) -> None:
        """As a launch would specialise: ints of 1 are constants, multiples of 16 are known as such."""
        signature, constants, hints = {}, {}, {}
        for i, (param, value) in enumerate(zip(kernel.params, args, strict=True)):
            if param.is_constexpr or (isinstance(value, int) and value == 1):
                signature[param.name], constants[param.name] = "constexpr", value
                continue
            names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
            signature[param.name] = names[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
        made = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
        self.done[kernel.__name__] = made, resources(made.asm["cubin"])


def resources(cubin: bytes) -> dict[str, int]:
    """REG (registers of a thread), STACK and LOCAL (bytes of a thread; spills are among them) of a compiled kernel."""
    from triton.backends import nvidia

    tool = Path(next(iter(nvidia.__path__)), "bin", "cuobjdump")
    if not tool.exists():
        pytest.skip(f"no {tool}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}


# B to compile for, (T, H, W), heads, kernel, stride: poolings of MViTv2-S at 16 x 224 x 224, and of an image
PUBLISHED = {
    "image": (16, (1, 56, 56), 1, (1, 3, 3), (1, 4, 4)),
    "q_of_stage_1": (16, (8, 56, 56), 1, (3, 3, 3), (1, 1, 1)),
    "kv_of_stage_1": (16, (8, 56, 56), 1, (3, 3, 3), (1, 8, 8)),
    "q_into_stage_2": (16, (8, 56, 56), 2, (3, 3, 3), (1, 2, 2)),
    "kv_of_stage_2": (16, (8, 28, 28), 2, (3, 3, 3), (1, 4, 4)),
    "q_of_stage_3": (16, (8, 14, 14), 4, (3, 3, 3), (1, 1, 1)),
    "kv_of_stage_3": (16, (8, 14, 14), 4, (3, 3, 3), (1, 2, 2)),
    "q_of_stage_4": (16, (8, 7, 7), 8, (3, 3, 3), (1, 1, 1)),
    "past_int32": (512, (8, 56, 56), 1, (3, 3, 3), (1, 1, 1)),
}


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "image" else pytest.mark.slow) for name in PUBLISHED]
)
def test_compiles_without_spills(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, size, heads, kernel, stride = PUBLISHED[name]
    width = 96 * heads
    fused = torch.empty(batch, 1 + math.prod(size), 3 * width, dtype=DTYPES[dtype], device="meta")
    x = fused[:, 1:, :width].unflatten(1, size)
    grad = torch.empty(batch, *pooling.pooled_size(size, kernel, stride), width, dtype=x.dtype, device="meta")
    weight = torch.empty(96, 1, *kernel, device="meta")
    compiler = Compiler()
    monkeypatch.setattr(pooling, "wrap_triton", compiler)
    pooling.forward(x, weight, stride)
    pooling.grad_input(grad, weight, stride, size)
    pooling.grad_weight(x, grad, weight.shape, stride)
    assert len(compiler.done) == 3
    for kernel_name, (made, takes) in compiler.done.items():
        assert takes["STACK"] == takes["LOCAL"] == 0, (kernel_name, takes)
        print(name, dtype, kernel_name, takes, f"SHARED:{made.metadata.shared}")  # shown with -s
        # Whole vectors are read, and threads exchange nothing but the last sums.
        assert ".b16" not in "".join(re.findall(r"ld\.global\S*", made.asm["ptx"])), kernel_name
        assert kernel_name == "grad_weight_kernel" or made.metadata.shared == 0, kernel_name


class Pool(torch.autograd.Function):
    """The least that trains through the kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return pooling.forward(x, weight, (1, 2, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx = pooling.grad_input(grad.contiguous(), weight, (1, 2, 2), x.shape[1:4])
        return dx, pooling.grad_weight(x, grad.contiguous(), weight.shape, (1, 2, 2))


@pytest.mark.slow
@compiled
def test_torch_compile_sees_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph each way, in which PyTorch knows what a kernel reads and what it writes: nothing else is copied."""
    graphs = []

    def record(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        outputs = [node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *_: [torch.empty(o.shape, dtype=o.dtype, device="meta") for o in outputs])

    class Driver:  # stands for a GPU where there is none
        @staticmethod
        def get_current_target() -> Any:
            return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    torch._dynamo.reset()
    fused = torch.empty(2, 1 + 4 * 6 * 6, 3 * 96, device="meta", requires_grad=True)
    weight = torch.empty(96, 1, 3, 3, 3, device="meta", requires_grad=True)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    step = torch.compile(
        lambda fused, weight: Pool.apply(fused[:, 1:, :96].unflatten(1, (4, 6, 6)), weight).square(),
        backend=backend,
        fullgraph=True,
    )
    step(fused, weight).sum().backward()
    written = [
        node.kwargs["tensors_to_clone"]
        for graph in graphs
        for node in graph.graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]
    assert sorted(written) == [["dx_ptr"], ["partial_ptr"], ["y_ptr"]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and pytest -m gpu")
@compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_on_a_gpu(name: str, dtype: str) -> None:
    _, size, heads, kernel, stride = PUBLISHED[name]
    width, out = 96 * heads, pooling.pooled_size(size, kernel, stride)
    fused = torch.randn(3, 1 + math.prod(size), 3 * width, device="cuda").to(DTYPES[dtype])
    x = fused[:, 1:, width : 2 * width].unflatten(1, size)
    grad = torch.randn(3, *out, width, device="cuda").to(x.dtype)
    weight = torch.randn(96, 1, *kernel, device="cuda")
    y, dx, dw = (t.cuda() for t in reference(x.cpu(), weight.cpu(), grad.cpu(), stride))
    assert_rounded(pooling.forward(x, weight, stride), y)
    assert_rounded(pooling.grad_input(grad, weight, stride, size), dx)
    mine = pooling.grad_weight(x, grad, weight.shape, stride)
    assert_rounded(mine, dw, size=50)  # sums over up to 75,000 places, of about sqrt(75,000)
    assert torch.equal(mine, pooling.grad_weight(x, grad, weight.shape, stride))
