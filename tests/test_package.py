"""A wheel, made from the source archive and used in an empty folder: what it holds, its command, a run."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import maskfeat
from maskfeat.checkpoint.files import find_checkpoints
from tests.documents import REPO
from tests.worker import losses

pytestmark = pytest.mark.slow

# What is there in a checkout but belongs to no release.
LEFT = {".git", ".venv", "build", "dist", "runs", "data", "output", "quickstart"}
SMALL = [
    "NUM_GPUS", "0", "SOLVER.MAX_EPOCH", "1", "SOLVER.WARMUP_EPOCHS", "0", "TRAIN.BATCH_SIZE", "8", "TRAIN.EVAL_PERIOD",
    "0", "DATA_LOADER.NUM_WORKERS", "1", "TENSORBOARD.ENABLE", "False", "LOG_PERIOD", "1",
]  # fmt: skip


def call(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source archive of this checkout, of which a copy is used: building leaves folders behind."""
    root = tmp_path_factory.mktemp("build")
    source = root / "source"
    source.mkdir()
    for path in REPO.iterdir():
        if path.name not in LEFT and not path.name.endswith(".egg-info"):
            call(["cp", "-r", str(path), str(source)])
    call([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('..')"], cwd=source)
    (archive,) = root.glob("maskfeat-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(root, filter="data")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    unpacked = archive.with_name(archive.name.removesuffix(".tar.gz"))
    call([*pip, "--no-build-isolation", "--wheel-dir", str(root), str(unpacked)])
    (made,) = root.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its command, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    call([*pip, "--target", str(folder), str(wheel)])
    return folder


def run(installed: Path, folder: Path, *arguments: str, module: bool = False) -> subprocess.CompletedProcess[str]:
    """Call the command of the installed package in `folder`."""
    start = [sys.executable, "-m", "maskfeat"] if module else [str(installed / "bin" / "maskfeat")]
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return call([*start, *arguments], cwd=folder, env=env)


def test_contents(wheel: Path) -> None:
    """Every module and recipe, the marker of type hints and a command; no tests, scripts or benchmarks."""
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert file.read(entry_points).decode().split() == ["[console_scripts]", "maskfeat", "=", "maskfeat.cli:main"]
        metadata = file.read(entry_points.replace("entry_points.txt", "METADATA")).decode()
    assert f"\nVersion: {maskfeat.__version__}\n" in metadata and "Description-Content-Type: text/markdown" in metadata
    modules = {str(path.relative_to(REPO)) for path in (REPO / "maskfeat").rglob("*.py")}
    recipes = {f"maskfeat/{path.relative_to(REPO)}" for path in (REPO / "configs").rglob("*.yaml")}
    data = {"maskfeat/py.typed", "maskfeat/report/page.css", "maskfeat/report/page.js"}
    assert len(modules) > 60 and len(recipes) > 40
    assert {name for name in names if ".dist-info/" not in name} == modules | recipes | data


def test_command(installed: Path, tmp_path: Path) -> None:
    version = f"maskfeat {maskfeat.__version__}\n"
    assert run(installed, tmp_path, "--version").stdout == version
    assert run(installed, tmp_path, "--version", module=True).stdout == version
    assert "make-synthetic" in run(installed, tmp_path, "--help").stdout


def test_training_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """Data, a run, and the same run in two processes that the command spawns."""
    code = "import maskfeat.config.recipes as r; print(r.__file__, r.CONFIG_ROOT)"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    found = call([sys.executable, "-c", code], cwd=tmp_path, env=env).stdout.split()
    assert all(Path(path).is_relative_to(installed) for path in found), "the checkout is imported"
    made = run(installed, tmp_path, "make-synthetic", "--images", "data", "--per-class", "3", "--val-per-class", "1")
    assert made.stderr and len(list((tmp_path / "data" / "train").rglob("*.*"))) == 24
    train = ["train", "--cfg", "quickstart/images_pt", *SMALL, "DATA.PATH_TO_DATA_DIR", "data", "OUTPUT_DIR"]
    said = run(installed, tmp_path, *train, "one").stdout
    assert len(find_checkpoints(tmp_path / "one", "pt")) == 1
    assert len(losses(tmp_path / "one")) == 3 and "Traceback" not in said
    # `_BASE_` leads through the recipes of the wheel, and the saved config is that of the recipe.
    saved = (tmp_path / "one" / "config_given.yaml").read_text()
    assert saved.startswith((REPO / "configs" / "quickstart" / "images_pt.yaml").read_text())
    run(installed, tmp_path, *train, "two", "NUM_GPUS", "2", "DIST_BACKEND", "gloo", "DATA_LOADER.NUM_WORKERS", "0")
    assert len(find_checkpoints(tmp_path / "two", "pt")) == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_quickstart_shows_the_command(installed: Path) -> None:
    """What it would print from a wheel is what a user there can type."""
    code = "from maskfeat.demos.commands import train_command as c; print(c('quickstart/images_pt.yaml', ['A', 'b c']))"
    env = {**os.environ, "PYTHONPATH": str(installed)}
    shown = call([sys.executable, "-c", code], cwd=installed, env=env).stdout.strip()
    assert re.fullmatch(r"maskfeat train --cfg quickstart/images_pt A 'b c'", shown)
