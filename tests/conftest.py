"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with real samples and the full golden values, named by MASKFEAT_SHARED or lying beside the checkout."""
    folder = Path(os.environ.get("MASKFEAT_SHARED", REPO.parent / "shared"))
    if not (folder / "goldens").is_dir():
        pytest.skip(f"no shared samples at {folder} (set MASKFEAT_SHARED)")
    return folder


@pytest.fixture(autouse=True)
def _fresh_torch_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Small tensors are slower on several threads, most of all where cores are shared; full-size models take all."""
    wide = request.node.get_closest_marker("full_size") is not None
    torch.set_num_threads((os.cpu_count() or 1) if wide else 1)
