"""Fixtures that every test may use."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maskfeat.demos.scenes import MOTIONS, SHAPES
from maskfeat.demos.synthetic import make_clips, make_images

REPO = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs but from `pytest -m gpu`: two processes over gloo would find too few of them, or train there."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _heed_ctrl_c() -> None:
    """A shell has its background jobs ignore SIGINT, and the programs that tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


_LOGGER = logging.getLogger("maskfeat")
_LOGGING = (_LOGGER.handlers[:], _LOGGER.propagate, _LOGGER.level)


def _reset_logging() -> None:
    _LOGGER.handlers[:], _LOGGER.propagate = _LOGGING[0], _LOGGING[1]
    _LOGGER.setLevel(_LOGGING[2])  # which forgets what was enabled


@pytest.fixture(autouse=True)
def _logging_as_imported() -> Iterator[None]:
    """A run within a test, or within a fixture of several, sets up logging; every test finds it as after an import."""
    _reset_logging()
    yield
    _reset_logging()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Small tensors are slower on several threads, most of all where cores are shared; full-size models take all."""
    wide = request.node.get_closest_marker("full_size") is not None
    torch.set_num_threads((os.cpu_count() or 1) if wide else 1)


@pytest.fixture(scope="session")
def image_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled set of images in ImageNet's layout: 4 classes, 40 to train, 16 to validate."""
    root = tmp_path_factory.mktemp("images")
    return make_images(root / "set", SHAPES[:4], train_per_class=10, val_per_class=4, size=(48, 48))


@pytest.fixture(scope="session")
def clip_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled set of H.264 clips in Kinetics' layout: 3 classes, 12 to train, 6 to validate and test."""
    root = tmp_path_factory.mktemp("clips")
    return make_clips(
        root / "set",
        MOTIONS[:3],
        train_per_class=4,
        val_per_class=2,
        test_per_class=2,
        num_frames=20,
        size=(48, 64),
    )
