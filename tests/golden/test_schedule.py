"""Learning rates against the published schedule."""

import pytest

from maskfeat.schedule import lr_at_epoch
from tests.golden.golden import load_golden, recipe

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
