"""Whatever in the package names what only CUDA has is reached by a part of tools/gpu_check.py, which says so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu.table import PARTS

PACKAGE = Path(__file__).resolve().parents[2] / "maskfeat"
NAMES = re.compile(r"\b(cuda|nccl|triton|is_cuda|pin_memory|triton_op|wrap_triton|_triton_kernels)\b|\bfused=")
# A file of kernels as a whole: each of its functions is compiled for CUDA or launches what is.
KERNELS = ("models/pooling_kernels.py", "models/pooling_triton.py")


def scopes(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Qualified names of functions, with their first and last lines, outer ones first."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                assert child.end_lineno is not None
                if not isinstance(child, ast.ClassDef):
                    first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                    yield name, first, child.end_lineno
                yield from walk(child, f"{name}.")

    yield from walk(tree, "")


def code_tokens(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names, attributes, keywords and strings of the code, with their lines; comments and docstrings are none of it."""
    texts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.JoinedStr)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield node.end_lineno or line, node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, f"{node.arg}="
        elif isinstance(node, ast.arg):
            yield line, node.arg
        elif isinstance(node, ast.FunctionDef):
            yield line, node.name
        elif isinstance(node, ast.alias):
            yield line, node.name.replace(".", " ")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield line, "" if " " in node.value else node.value  # a message is no branch


def named(source: str, file: str) -> dict[str, list[int]]:
    """The functions of a file that name what only CUDA has, as "file:function" (outside of any: "file"), with lines."""
    tree = ast.parse(source)
    functions = list(scopes(tree))
    found: dict[str, set[int]] = {}
    for line, text in code_tokens(tree):
        if NAMES.search(text):
            around = [name for name, first, last in functions if first <= line <= last]
            found.setdefault(f"{file}:{around[0]}" if around else file, set()).add(line)
    return {place: sorted(lines) for place, lines in found.items()}


def all_named() -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        places = named(path.read_text(encoding="utf-8"), file)
        if file in KERNELS:
            places = {file: sorted(line for lines in places.values() for line in lines)}
        found |= places
    return found


def claims() -> dict[str, list[str]]:
    """Which parts say that they reach a place."""
    found: dict[str, list[str]] = {}
    for part in PARTS:
        for place in part.covers:
            found.setdefault(place, []).append(part.name)
    return found


def test_every_path_has_a_part() -> None:
    places = all_named()
    assert len(places) > 15, "the search finds what is there"
    without = {place: lines for place, lines in places.items() if place not in claims()}
    assert not without, f"name the part of benchmarks/gpu that reaches each, in its `covers`: {without}"


@pytest.mark.slow
def test_no_part_claims_what_is_not_there() -> None:
    places = all_named()
    gone = {place: parts for place, parts in claims().items() if place not in places}
    assert not gone, f"nothing here names CUDA any more: {gone}"


def test_what_is_found() -> None:
    """Code, in functions and outside of them; not comments, docstrings and messages."""
    source = '''
"""cuda"""
import torch  # cuda
import triton.language as tl
BACKENDS = ("nccl", "gloo")
def plain(x):
    """x.is_cuda"""
    raise ValueError("no cuda device here")
class A:
    def method(self, x):
        def inner():
            return x.is_cuda
        return inner
    def copy(self, x, pin_memory=False):
        return x.to("cuda")
def optimizer(groups):
    return torch.optim.SGD(
        groups,
        fused=True,
    )
refused = not_cudas = 1
'''
    assert named(source, "f.py") == {
        "f.py": [4, 5],
        "f.py:A.method": [12],
        "f.py:A.copy": [14, 15],
        "f.py:optimizer": [19],
    }
