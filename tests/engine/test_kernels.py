"""TRAIN.TF32 and TRAIN.CUDNN_BENCHMARK reach PyTorch in training and in testing, and are off by default."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maskfeat.engine.parallelize import choose_kernels
from maskfeat.engine.run import main
from tests.small import RECIPES, VIT_FT, images


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    choose_kernels(tf32=False, benchmark=False)


def _chosen() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark


@pytest.mark.parametrize("train", ["True", "False"])
def test_a_run_sets_them(train: str, image_data: Path, tmp_path: Path) -> None:
    opts = [
        *VIT_FT,
        *images(image_data),
        "SOLVER.MAX_EPOCH",
        "1",
        "TRAIN.EVAL_PERIOD",
        "0",
        "OUTPUT_DIR",
        str(tmp_path),
    ]
    config = ["--cfg", str(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"), *opts]
    assert main(config) == 0
    assert _chosen() == ("highest", False)
    faster = ["TRAIN.ENABLE", train, "TEST.ENABLE", "True", "TRAIN.TF32", "True", "TRAIN.CUDNN_BENCHMARK", "True"]
    assert main([*config, *faster]) == 0
    assert _chosen() == ("high", True)


def test_deterministic_algorithms_exclude_the_choice_by_speed() -> None:
    torch.use_deterministic_algorithms(True)
    choose_kernels(tf32=True, benchmark=True)
    assert _chosen() == ("high", False)
