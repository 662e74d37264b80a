"""The shape of the code: which module imports which, and how long files and functions grow."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "maskfeat"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of the package (ARCHITECTURE: imports point one way). A part may import itself.
ALLOWED = {
    "run": {"build", "training", "evaluate", "resume", "config", "distributed", "logbook", "objectives", "data",
            "preemption", "watch", "launch", "memory"},
    "training": {"build", "checkpoint", "flops", "parallel", "train", "evaluate", "resume", "saver", "config",
                 "distributed", "logbook", "objectives", "schedule", "step_hooks", "data", "preemption", "recipe",
                 "sharding", "watch"},
    "saver": {"checkpoint", "config", "distributed", "resume", "sharded_checkpoint", "sharding"},
    "resume": {"build", "checkpoint", "config", "distributed", "objectives", "optim", "sharded_checkpoint",
               "step_hooks", "weight_files", "weights"},
    "watch": {"distributed", "preemption"},
    "preemption": set(),
    "requeue": {"run", "preemption", "processes"},
    "launch": {"distributed", "supervise"},
    "supervise": {"processes", "preemption"},
    "recipe": {"config", "schedule"},
    "memory": {"recipe"},
    "step_hooks": {"objectives"},
    "benchmark": {"training", "build", "train", "flops", "parallel", "config", "data", "distributed", "logbook",
                  "objectives", "models", "batch", "schedule"},
    "evidence": {"build", "checkpoint", "config", "curves", "data", "distributed", "durable", "logbook", "objectives",
                 "probe", "run", "training", "visualize", "weight_files"},
    "quickstart": {"run", "data", "visualize", "picture", "logbook", "config", "checkpoint"},
    "visualize": {"build", "checkpoint", "config", "picture", "batch", "objectives", "weight_files"},
    "build": {"config", "data", "objectives", "models", "optim", "schedule", "masking", "distributed", "batch"},
    "train": {"batch", "data", "distributed", "logbook", "objectives", "optim", "parallel", "schedule",
              "step_hooks"},
    "evaluate": {"batch", "data", "distributed", "logbook", "objectives", "parallel"},
    "probe": {"data", "models", "parallel"},
    "flops": {"models"},
    "parallel": {"distributed", "objectives"},
    "logbook": {"distributed"},
    "optim": {"sharding"},
    "sharding": {"distributed"},
    "sharded_checkpoint": {"distributed", "durable", "objectives", "sharded_files"},
    "sharded_files": {"durable"},
    "durable": set(),
    "objectives": {"models", "batch", "masking", "sharding", "weights"},
    "models": {"masking"},
    "data": {"batch", "local_files", "processes"},
    "config": set(),
    "checkpoint": {"durable", "sharded_checkpoint", "sharded_files", "weight_files"},
    "weight_files": {"config", "download", "local_files", "weight_scan"},
    "weight_scan": {"weight_archive", "weight_values"},
    "weight_values": {"weight_archive"},
    "weight_archive": set(),
    "download": set(),
    "local_files": set(),
    "weights": set(),
    "schedule": set(),
    "masking": set(),
    "batch": set(),
    "distributed": set(),
    "picture": set(),
    "curves": set(),
    "processes": set(),
    "__init__": set(),
}  # fmt: skip


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
    text = (PACKAGE / "train.py").read_text()
    functions = {n.name: n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)}
    loop = sum((functions[name].end_lineno or 0) - functions[name].lineno for name in ("train", "optimisation_step"))
    assert loop < 120
    for word in ("maskfeat_", "hog", "hidden", "classif", "mixup", "video", "MaskMViT"):
        assert word not in text.replace("from maskfeat.", "").lower(), word


def test_entry_points_are_thin() -> None:
    for path in (REPO / "tools").glob("*.py"):
        assert path.read_text().count("\n") < 80, path
