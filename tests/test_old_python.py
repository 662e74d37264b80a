"""A Python that is too old is named in one line, before anything that it cannot read."""

import ast
import re
import subprocess
import sys

import pytest

from tests.documents import REPO


@pytest.mark.parametrize(
    "script", ["setup.py", *sorted(f"tools/{path.name}" for path in (REPO / "tools").glob("*.py"))]
)
def test_an_old_python_is_named_in_one_line(script: str) -> None:
    ast.parse((REPO / script).read_text(), feature_version=(3, 9))
    old = "import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0); "
    code = f"{old}runpy.run_path({str(REPO / script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"maskfeat needs Python 3.10 or newer; this is Python [0-9.]+\S*\n", done.stderr)


def test_what_is_imported_on_the_way_parses_on_an_old_python() -> None:
    for path in ("maskfeat/__init__.py", "benchmarks/__init__.py"):
        ast.parse((REPO / path).read_text(), feature_version=(3, 9))
