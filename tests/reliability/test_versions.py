"""Numbers hold: the losses of 100 steps, to the bit on one version of torch, within 1e-5 on any."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskfeat.batch import Batch
from maskfeat.models.mvit import MViT
from maskfeat.models.vit import ViT
from maskfeat.objectives.base import Objective
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.objectives.mfm import MFM
from maskfeat.optim.optimizers import make_optimizer
from maskfeat.optim.param_groups import parameter_groups
from tests.reliability.scale import note
from tests.small import REPO

GOLDEN = Path(__file__).with_name("versions.json")
STORED: dict[str, list[float]] = json.loads(GOLDEN.read_text())["losses"]
STEPS = 100
BATCHES = 4  # that are shown in turn
RATES = {"MaskFeat-ViT": 1e-3, "MaskFeat-MViTv2": 1e-3, "MFM-ViT": 1e-3}


def numbers(count: int, salt: int) -> Tensor:
    """`count` float32 numbers in [-1, 1), of a counter in whole numbers: no version of torch can draw others."""
    x = torch.arange(count, dtype=torch.int64) + salt * 1_000_003
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B), (16, 1)):
        x = ((x >> shift) ^ x) * factor & 0xFFFFFFFF
    return (x & 0xFFFFFF).float() / 2**23 - 1.0


def maskfeat_vit() -> tuple[Objective, tuple[int, ...], tuple[int, ...]]:
    backbone = ViT(image_size=(32, 32), patch=(8, 8), width=32, depth=3, num_heads=4, class_token=True, maskable=True)
    return MaskFeat(backbone, cell=4), (4, 3, 32, 32), (4, 4)


def maskfeat_mvit() -> tuple[Objective, tuple[int, ...], tuple[int, ...]]:
    backbone = MViT(
        clip_size=(4, 32, 32), kernel=(3, 7, 7), stride=(2, 4, 4), padding=(1, 3, 3), width=16, depth=3, num_heads=1,
        width_mul={1: 2.0}, head_mul={1: 2.0}, stride_q={0: [1, 1, 1], 1: [1, 2, 2], 2: [1, 1, 1]},
        stride_kv_adaptive=[1, 4, 4], pool_kernel=[3, 3, 3], position="none", relative_space=True, relative_time=True,
        residual_pooling=True, maskable=True,
    )  # fmt: skip
    return MaskFeat(backbone, cell=4), (2, 3, 4, 32, 32), (2, 4, 4)


def mfm_vit() -> tuple[Objective, tuple[int, ...], tuple[int, ...]]:
    """No ResNet: batch norms over few numbers make a problem that turns 1e-7 into 1e-3 within these steps."""
    backbone = ViT(image_size=(32, 32), patch=(8, 8), width=32, depth=3, num_heads=4, class_token=True)
    return MFM(backbone, mean=(0.4,) * 3, std=(0.2,) * 3, radius=6.0, eps=1e-3), (4, 3, 32, 32), (1, 1)


MODELS: dict[str, Callable[[], tuple[Objective, tuple[int, ...], tuple[int, ...]]]] = {
    "MaskFeat-ViT": maskfeat_vit,
    "MaskFeat-MViTv2": maskfeat_mvit,
    "MFM-ViT": mfm_vit,
}


def made_batch(shape: tuple[int, ...], grid: tuple[int, ...], number: int) -> Batch:
    """Smooth made pictures (histograms of noise would say little), and masks of which nobody draws."""
    size, count = shape[0], int(torch.tensor(shape).prod())
    noise = numbers(count, 10 + number).reshape(shape)
    for axis in (-1, -2):
        noise = sum(noise.roll(shift, axis) for shift in range(5)) / 2.5  # type: ignore[assignment]
    cells = int(torch.tensor(grid).prod())
    hidden = (numbers(size * cells, 50 + number) < 0.0).reshape(size, *grid)
    hidden.view(size, -1)[:, 0] = True
    return Batch(noise, hidden=hidden, max_hidden=int(hidden.flatten(1).sum(1).max()))


def losses(name: str, shift: float = 0.0) -> list[float]:
    """The losses of 100 steps of AdamW in float32 on one thread; `shift` is added to one weight before."""
    torch.set_num_threads(1)
    objective, shape, grid = MODELS[name]()
    with torch.no_grad():
        for salt, (key, parameter) in enumerate(sorted(objective.named_parameters())):
            if parameter.dim() > 1:
                fan = parameter[0].numel()
                parameter.copy_(numbers(parameter.numel(), 100 + salt).reshape(parameter.shape) / fan**0.5)
            else:  # also biases, which some layers draw
                parameter.fill_(1.0 if key.endswith("weight") else 0.0)
        next(p for p in objective.parameters() if p.dim() > 1).view(-1)[0] += shift
    groups = parameter_groups(
        ((objective.released_name(n), p) for n, p in objective.named_parameters()),
        layer_id=objective.layer_id,
        last_layer=objective.backbone.num_blocks + 1,
        weight_decay=0.05,
    )
    optimizer = make_optimizer(groups, "adamw", lr=RATES[name])
    objective.train()
    batches = [made_batch(shape, grid, number) for number in range(BATCHES)]
    found = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATES[name] * min(step / 20, 1.0)
        optimizer.zero_grad()
        loss = objective(batches[step % BATCHES]).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def elsewhere() -> dict[str, list[str]]:
    """The same in a process of its own, every bit of each loss."""
    command = [sys.executable, "-m", "tests.reliability.test_versions"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def furthest(a: list[float], b: list[float]) -> float:
    """The largest relative difference."""
    assert len(a) == len(b) == STEPS
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_two_processes_agree_to_the_bit() -> None:
    one, two = elsewhere(), elsewhere()
    assert one == two and one.keys() == MODELS.keys()
    note(
        12, f"torch {torch.__version__}: {STEPS} losses of each of {len(one)} models equal to the bit in two processes"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_any_version_gives_the_stored_losses(name: str) -> None:
    found = losses(name)
    apart = furthest(found, STORED[name])
    assert apart < 1e-5, f"torch {torch.__version__}: {apart:.2g} apart"
    assert found[-1] < 0.95 * found[0], "it has learned something"
    note(12, f"torch {torch.__version__}, {name}: {apart:.1e} from the stored losses of {STEPS} steps, relative")


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_the_problem_is_not_chaotic(name: str) -> None:
    """A change of 1e-7 in one weight stays small, a change of 1e-3 is seen: the figure above means something."""
    whole = losses(name)
    assert furthest(losses(name, 1e-7), whole) < 1e-5
    assert furthest(losses(name, 1e-2), whole) > 1e-5


if __name__ == "__main__":
    print(json.dumps({name: [value.hex() for value in losses(name)] for name in MODELS}))
