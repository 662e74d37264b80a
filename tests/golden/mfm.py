"""Rebuilds the inputs and weights behind the golden values of MFM."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskfeat.build import build_objective
from maskfeat.config import load_config
from maskfeat.objectives.mfm import MFM
from tests.golden.golden import REPO, load_golden, salted_draw

GOLDEN = load_golden("mfm")
SMALL = np.load(Path(__file__).with_name("mfm_frequency_small.npz"))
TINY = ["DATA.TRAIN_CROP_SIZE", "64", "DATA.TEST_CROP_SIZE", "64"]


def seed_recipe(*opts: str) -> MFM:
    """The objective of the ResNet-50 recipe at 64 x 64 pixels."""
    objective = build_objective(load_config(REPO / "configs" / "mfm" / "in1k_R50_MFM_PT.yaml", [*TINY, *opts]))
    assert isinstance(objective, MFM)
    return objective


def draws() -> tuple[Tensor, Tensor, Tensor]:
    """Images and a prediction of mfm_frequency.npz, and the input of the ResNet-50."""
    draw = np.random.RandomState(GOLDEN["seed"])
    shapes = ((4, 3, 64, 64), (4, 1, 64, 64), (4, 3, 64, 64))
    images, prediction, clip = (torch.from_numpy(draw.standard_normal(s).astype(np.float32)) for s in shapes)
    return images, prediction, clip


def hidden(form: str) -> Tensor:
    """The golden's masks: whole, or as the loader draws them."""
    low_visible = torch.from_numpy(SMALL["low_visible"]).bool().reshape(4, 1, 1)
    if form == "code":
        return ~low_visible
    visible = np.unpackbits(SMALL["visible_rows"]).reshape(4, 64, 64).astype(bool)
    return ~torch.from_numpy(visible)


def resnet50_state(objective: MFM) -> dict[str, Tensor]:
    """Salted weights; scales and variances are |a| + 1, and nothing was counted yet."""
    state = {}
    for name, value in objective.released_state().items():
        drawn = torch.from_numpy(salted_draw(name, tuple(value.shape), GOLDEN["seed"]))
        if name.endswith("num_batches_tracked"):
            drawn = torch.zeros((), dtype=torch.int64)
        elif name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            drawn = drawn.abs() + 1
        state[name] = drawn
    return state
