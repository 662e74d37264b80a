"""Small networks with random weights, in files as a run saves them."""

from pathlib import Path

import pytest
import torch

from maskfeat.build import build_objective
from maskfeat.config import load_config
from tests.small import MVIT_FT, RECIPES, VIT_FT, VIT_PT

IMAGES = (RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", VIT_FT)
PRETRAINED = (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", VIT_PT)
CLIPS = (RECIPES / "k400_MVITv2_S_16x4_FT.yaml", [*MVIT_FT, "TEST.NUM_TEMPORAL_CLIPS", "[]"])


def save_network(path: Path, network: tuple[Path, list[str]], *opts: str, classes: list[str] | None = None) -> Path:
    """Write a file with the weights of a network that is built from a recipe and overrides."""
    cfg = load_config(network[0], [*network[1], *opts])
    torch.manual_seed(0)
    content = {"model_state": build_objective(cfg).released_state(), "cfg": cfg.dump()}
    torch.save(content if classes is None else {**content, "classes": classes}, path)
    return path


def said_in(log: pytest.LogCaptureFixture) -> str:
    """What was logged since the last call."""
    text = "\n".join(record.getMessage() for record in log.records)
    log.clear()
    return text
