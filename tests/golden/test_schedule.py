"""Learning rates against the published schedule."""

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from maskfeat.config import load_config
from maskfeat.optim.schedule import lr_at_epoch
from tests.golden.golden import REPO, load_golden, recipe

SCHEDULES = load_golden("lr_schedule")


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_published_schedule(name: str) -> None:
    cfg = recipe(name)
    for epoch, lr in SCHEDULES[name]:
        assert lr_at_epoch(cfg, epoch) == pytest.approx(lr, rel=1e-12)


def test_rates_scale_with_machines_once() -> None:
    one = recipe("in1k_VIT_B_MaskFeat_PT")
    four = recipe("in1k_VIT_B_MaskFeat_PT", ["NUM_SHARDS", "4"])
    for epoch in (0.0, 10.0, 150.0, 299.9):
        assert lr_at_epoch(four, epoch) == pytest.approx(4 * lr_at_epoch(one, epoch), rel=1e-12)
    assert four.SOLVER.BASE_LR == one.SOLVER.BASE_LR, "the config itself must not change"


def test_relative_steps() -> None:
    opts = ["SOLVER.LR_POLICY", "steps_with_relative_lrs", "SOLVER.STEPS", "[0,10,20]", "SOLVER.LRS", "[1,0.1,0.01]"]
    cfg = recipe("in1k_VIT_B_MaskFeat_PT", [*opts, "SOLVER.WARMUP_EPOCHS", "0", "SOLVER.BASE_LR", "0.5"])
    assert [lr_at_epoch(cfg, e) for e in (0, 9.99, 10, 25)] == pytest.approx([0.5, 0.5, 0.05, 0.005])


PAPER = {"in1k_VIT_B_MFM_PT": (300, 20), "in1k_R50_MFM_paper_PT": (300, 20), "in1k_VIT_B_MFM_FT": (100, 5)}


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("machines", [1, 4])
def test_rates_of_mfms_paper(name: str, machines: int) -> None:
    """timm's cosine, changed every iteration: a line from 2.5e-7 to the base, then a cosine counted from step 0."""
    cfg = load_config(REPO / "configs" / "mfm" / f"{name}.yaml", ["NUM_SHARDS", str(machines)])
    base, end = (2e-3, 2.5e-7) if name.endswith("FT") else (3e-4, 2.5e-6)
    epochs, warmup, steps = *PAPER[name], 25
    t = np.arange(epochs * steps) / steps
    published = np.where(
        t < warmup,
        2.5e-7 + (base - 2.5e-7) * t / warmup,
        end + (base - end) * (1 + np.cos(np.pi * t / epochs)) / 2,
    )
    ratio = np.array([lr_at_epoch(cfg, epoch) for epoch in t]) / (machines * published)
    assert ratio.min() == pytest.approx(1.0, rel=1e-9) and ratio.max() == pytest.approx(1.0, rel=1e-9)
    timms = CosineLRScheduler(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=machines * base),
        t_initial=epochs * steps,
        lr_min=machines * end,
        warmup_t=warmup * steps,
        warmup_lr_init=machines * 2.5e-7,
        t_in_epochs=False,
    )
    for step in range(0, epochs * steps, 97):
        timms.step_update(step)
        assert timms.optimizer.param_groups[0]["lr"] == pytest.approx(lr_at_epoch(cfg, step / steps), rel=1e-9)


@pytest.mark.parametrize("name", ["in1k_R50_MFM_PT", "in1k_R50_MFM_FT"])
def test_rate_of_whole_epochs(name: str) -> None:
    """As torchvision's scripts set it: from 1 % to the base in the warm-up, a cosine to 0, stepped once an epoch."""
    cfg = load_config(REPO / "configs" / "mfm" / f"{name}.yaml")
    solver, warmup = cfg.SOLVER, int(cfg.SOLVER.WARMUP_EPOCHS)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=solver.BASE_LR)
    parts = [LinearLR(optimizer, 0.01, total_iters=warmup), CosineAnnealingLR(optimizer, solver.MAX_EPOCH - warmup)]
    schedule = SequentialLR(optimizer, parts, [warmup])
    for epoch in range(solver.MAX_EPOCH):
        for within in (0.0, 0.4, 0.999):
            assert lr_at_epoch(cfg, epoch + within) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
