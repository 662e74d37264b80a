"""The shape of the code: which module imports which, and how long files and functions grow."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "maskfeat"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each package may import of the others: imports point one way. A package may import itself.
GROUND = {"batch", "masking", "file_io", "config", "distributed", "__init__"}
ALLOWED = {
    "optim": {"distributed"},
    "data": {"batch", "masking", "file_io", "distributed"},
    "models": {"masking"},
    "checkpoint": {"config", "file_io", "distributed"},
    "objectives": {"batch", "masking", "distributed", "models", "checkpoint"},
    "build": {"batch", "masking", "config", "distributed", "data", "models", "objectives", "optim"},
    "engine": {"batch", "config", "distributed", "data", "models", "checkpoint", "objectives", "optim", "build"},
    "analysis": {"batch", "config", "distributed", "data", "models", "checkpoint", "objectives", "build", "engine"},
    "demos": {"config", "distributed", "data", "models", "checkpoint", "objectives", "build", "engine", "analysis"},
    **{name: set() for name in GROUND - {"config"}},
    "config": {"file_io"},
}


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Every part of the package that a file imports, wherever in the file the import stands."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("maskfeat.")}
    return parts


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"say in this test what {part} may import"
    assert imported_parts(path) - {part} <= ALLOWED[part]


def test_the_table_itself_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part in ALLOWED if part not in done and ALLOWED[part] - {part} <= done}
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    assert path.read_text().count("\n") < 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length < 75, f"{node.name} has {length} lines"


def test_the_loop_is_short_and_knows_no_method() -> None:
    text = (PACKAGE / "engine" / "loop.py").read_text()
    functions = {n.name: n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)}
    loop = sum((functions[name].end_lineno or 0) - functions[name].lineno for name in ("train", "optimisation_step"))
    assert loop < 120
    for word in ("maskfeat_", "hog", "hidden", "classif", "mixup", "video", "MaskMViT"):
        assert word not in text.replace("from maskfeat.", "").lower(), word


def test_entry_points_are_thin() -> None:
    for path in (REPO / "tools").glob("*.py"):
        assert path.read_text().count("\n") < 80, path
