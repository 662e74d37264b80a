"""The shape of the code: which module imports which, and how long files and functions grow."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "maskfeat"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each package may import of the others: imports point one way. A package may import itself.
GROUND = {"batch", "masking", "file_io", "pictures", "registry", "distributed", "__init__"}
ANYWHERE = {"errors", "progress", "text"}
ALLOWED = {
    "config": {"file_io", "registry"},
    "optim": {"distributed"},
    "report": {"config", "file_io"},
    "data": {"batch", "masking", "file_io", "registry", "distributed"},
    "models": {"masking", "registry"},
    "checkpoint": {"config", "file_io", "distributed"},
    "objectives": {"batch", "masking", "pictures", "registry", "distributed", "models", "checkpoint"},
    "build": {"masking", "registry", "distributed", "data", "models", "objectives", "optim"},
    "engine": {
        "file_io",
        "batch",
        "pictures",
        "config",
        "registry",
        "distributed",
        "data",
        "models",
        "checkpoint",
        "objectives",
        "optim",
        "build",
        "report",
    },
    "analysis": {
        "batch",
        "masking",
        "pictures",
        "file_io",
        "registry",
        "config",
        "distributed",
        "data",
        "models",
        "checkpoint",
        "objectives",
        "build",
        "engine",
    },
    "demos": {
        "file_io",
        "pictures",
        "config",
        "distributed",
        "data",
        "models",
        "checkpoint",
        "objectives",
        "build",
        "engine",
        "report",
        "analysis",
    },
    **{name: set() for name in GROUND | ANYWHERE},
    "__main__": {"cli"},
}
ALLOWED["cli"] = set(ALLOWED) - {"__main__", "__init__"}  # nothing but __main__ imports it


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
    assert imported_parts(path) - {part} - ANYWHERE <= ALLOWED[part]


def test_the_table_itself_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part in ALLOWED if part not in done and ALLOWED[part] - {part} <= done}
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Every module of the package that a file imports when it runs, wherever in the file the import stands."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found & known - {name_of(path)}


def test_no_module_imports_in_a_circle() -> None:
    """Also not inside of functions, where a circle would hide."""
    names = {name_of(path): path for path in MODULES}
    left = {name: imported_modules(path, set(names)) for name, path in names.items()}
    while ready := [name for name, imported in left.items() if not imported & set(left)]:
        left = {name: imported for name, imported in left.items() if name not in ready}
    assert not left, {name: imported & set(left) for name, imported in left.items()}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    assert path.read_text().count("\n") < 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length < 75, f"{node.name} has {length} lines"


def test_the_loop_is_short_and_knows_no_method() -> None:
    texts = [(PACKAGE / "engine" / f"{name}.py").read_text() for name in ("loop", "trainer")]
    functions = {n.name: n for text in texts for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)}
    loop = sum((functions[name].end_lineno or 0) - functions[name].lineno for name in ("train", "train_step"))
    assert loop < 120
    for text in texts:
        for word in ("maskfeat_", "hog", "hidden", "classif", "mixup", "video", "MaskMViT", "MFM"):
            assert word not in text.replace("from maskfeat.", ""), word


def test_entry_points_are_thin() -> None:
    for path in (REPO / "tools").glob("*.py"):
        assert path.read_text().count("\n") < 80, path


def test_names_are_compared_in_the_registry_alone() -> None:
    """Which objective, backbone or data set is chosen is asked of its spec."""
    chosen = {"MODEL_NAME", "ARCH", "DATASET"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and any(
                isinstance(part, ast.Attribute) and part.attr in chosen for part in ast.walk(node)
            ):
                constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                assert not any(isinstance(value, str) for value in constants), f"{path}, line {node.lineno}"
