"""setup.py requires what the package imports, nothing more and nothing less, each with a lower bound."""

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

REPO = Path(__file__).resolve().parents[2]

# Modules whose distribution has another name.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "mlflow": "mlflow-skinny"}
# Comes with PyTorch where it can run; the code asks whether it is there.
WITH_TORCH = {"triton"}
# PyTorch imports it in turn.
INDIRECT = {"torch.utils.tensorboard": "tensorboard"}


def imports(source: str) -> set[str]:
    """Distributions that a source imports, wherever in it; the standard library and the package itself left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module))
    found = {INDIRECT[name] for name in names if name in INDIRECT}
    for top in {name.split(".")[0] for name in names}:
        if top not in sys.stdlib_module_names and top not in WITH_TORCH | {"maskfeat"}:
            found.add(DISTRIBUTIONS.get(top, top))
    return found


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return found[0].lower()


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    """What setup.py gives to setuptools."""
    given: dict[str, Any] = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
    patch.chdir(REPO)
    try:
        names = {"__name__": "setup", "__file__": str(REPO / "setup.py")}
        exec(compile((REPO / "setup.py").read_text(), "setup.py", "exec"), names)
    finally:
        patch.undo()
    return given


def test_the_reading_of_imports() -> None:
    source = "import os, av.codec\nfrom PIL import Image\nfrom . import x\ndef f():\n    import yaml as y, maskfeat.a"
    assert imports(source) == {"av", "pillow", "pyyaml"}
    assert imports("from torch.utils.tensorboard import SummaryWriter\nimport triton") == {"torch", "tensorboard"}


def test_the_package_imports_what_is_required(setup: dict[str, Any]) -> None:
    required = {name_of(line) for line in setup["install_requires"]}
    extras = {name_of(line) for extra, lines in setup["extras_require"].items() if extra != "dev" for line in lines}
    assert not required & extras
    used = set().union(*(imports(path.read_text()) for path in (REPO / "maskfeat").rglob("*.py")))
    assert used - required == {name for name in extras if name in used}, "imported and not named in setup.py"
    assert required <= used, "named in setup.py and not imported"


def optional(setup: dict[str, Any]) -> dict[str, str]:
    """Distributions of the extras that the package imports -> the extra."""
    lines = setup["extras_require"].items()
    return {name_of(line): extra for extra, given in lines if extra not in ("dev", "docs") for line in given}


def test_every_extra_is_imported_and_never_at_the_top_of_a_module(setup: dict[str, Any]) -> None:
    """`import maskfeat.anything` must work without the extras."""
    named = optional(setup)
    used: set[str] = set()
    for path in (REPO / "maskfeat").rglob("*.py"):
        used |= imports(path.read_text())
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not imports("\n".join(map(ast.unparse, top))) & set(named), path
    assert set(named) <= used


def test_every_requirement_has_a_lower_bound(setup: dict[str, Any]) -> None:
    for line in [
        *setup["install_requires"],
        *(line for extra in ("plots", "slurm") for line in setup["extras_require"][extra]),
    ]:
        assert re.fullmatch(r"[\w.-]+>=\d+(\.\d+)*(\.post\d+)?", line), line


def test_dev_has_the_extras_that_tests_need(setup: dict[str, Any]) -> None:
    extras = setup["extras_require"]
    for extra, lines in extras.items():
        # torchcodec needs FFmpeg libraries of the system; tools/test.sh installs trackers, and test_lowest.sh cannot
        if extra not in ("dev", "docs", "torchcodec", "trackers"):
            assert set(lines) <= set(extras["dev"]), extra
