"""The files a config is read from: what cannot be used, hostile YAML, and the `_BASE_` chain."""

import logging
import os
import time
from pathlib import Path

import pytest

from maskfeat.config import load_config
from maskfeat.errors import UserError
from tests.config.helpers import MVIT_FT, load_text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("TRAIN: 3\n", "line 1: TRAIN is a section"),
        ("- TRAIN\n", "holds a list"),
        ("just words\n", "holds a value"),
        ("TRAIN: {BATCH_SIZE: 4\n", "not valid YAML"),
        ("A: 1\n---\nB: 2\n", "not valid YAML"),
        ("TRAIN: {? [1, 2] : 3}\n", "key must be a name"),
        ("TASK: !!python/object/apply:os.getcwd []\n", "tag .* is not allowed"),
        ("TASK: !!python/name:os.system\n", "tag .* is not allowed"),
        ("!!python/object:os.x {TASK: a}\n", "tag .* is not allowed"),
        ("TASK: !!binary aGFsbG8=\n", "tag .* is not allowed"),
        ("RNG_SEED: !!int x\n", "cannot read 'x'"),
        ("BN: &a [*a]\n", "aliases"),
        ("BN: &a {X: *a}\n", "aliases"),
        ("TASK: a/b\n", "TASK becomes part of file names"),
    ],
)
def test_unusable_yaml(text, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_text(tmp_path, text)


def test_unusable_files(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is not a file"):
        load_config(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match="is not a file"):
        load_config(tmp_path / "pipe.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"TASK: \xe9\n")
    with pytest.raises(ValueError, match="UTF-8"):
        load_config(tmp_path / "latin.yaml")


def _bombs():
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    merges = ["a0: &a0 {x: 1}"]
    merges += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 10)]
    many = ", ".join(["*a"] * 101)
    return {
        "large": "TASK: " + "a" * 1_000_001,
        "laughs": "BN:\n  " + "\n  ".join(laughs),
        "merges": "BN:\n  " + "\n  ".join(merges),
        "aliases": f"BN: {{x: &a 1, y: [{many}]}}",
        "deep": "BN: " + "[" * 100_000,
        "wide": "BN: [" + "1," * 400_000 + "]",
        "literal": "SOLVER.BETAS: '" + "(" * 10_000 + "'",
    }


_SAID = {
    "large": "has more than 1000000 characters",
    "laughs": "aliases make this file too large",
    "merges": "aliases make this file too large",
    "aliases": "is too large: .* 100 aliases",
    "deep": "is too large: .* 20 levels",
    "wide": "is too large: at most 10000 values",
    "literal": "a value has at most 4096 characters",
}


@pytest.mark.parametrize("name", _bombs())
def test_bombs_are_refused_soon(name, tmp_path):
    start = time.process_time()
    with pytest.raises(UserError, match=_SAID[name]):
        load_text(tmp_path, _bombs()[name])
    assert time.process_time() - start < 5


# --- _BASE_ ---


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_base_chain_and_order(tmp_path):
    _write(tmp_path / "bases" / "a.yaml", "TASK: a\nRNG_SEED: 2\nSOLVER: {MAX_EPOCH: 11, WARMUP_EPOCHS: 1}\n")
    _write(tmp_path / "bases" / "b.yaml", "_BASE_: a.yaml\nTASK: b\nSOLVER.MAX_EPOCH: 12\n")
    top = _write(tmp_path / "top.yaml", "TASK: top\n_BASE_: bases/b.yaml\n")
    cfg = load_config(top, ["RNG_SEED", "3"])
    assert (cfg.TASK, cfg.RNG_SEED, cfg.SOLVER.MAX_EPOCH, cfg.SOLVER.WARMUP_EPOCHS) == ("top", 3, 12, 1.0)
    assert "_BASE_" not in cfg


def test_base_may_be_a_recipe_of_the_project(tmp_path, caplog):
    own = _write(tmp_path / "own.yaml", f"_BASE_: {MVIT_FT}\nTASK: own\n")
    with caplog.at_level(logging.WARNING):
        cfg = load_config(own)
    assert cfg.MVIT.DEPTH == 16 and cfg.TASK == "own" and not caplog.records
    relative = os.path.relpath(MVIT_FT, tmp_path)
    assert load_config(_write(tmp_path / "own.yaml", f"_BASE_: {relative}\n")) == load_config(MVIT_FT)


@pytest.mark.parametrize(
    "base", ["../secret.yaml", "{tmp}/secret.yaml", "in/../../secret.yaml", "link.yaml", "sub/up.yaml"]
)
def test_base_is_confined(base, tmp_path):
    _write(tmp_path / "secret.yaml", "TASK: secret\n")
    top = _write(tmp_path / "tree" / "top.yaml", f"_BASE_: {base.format(tmp=tmp_path)}\n")
    (tmp_path / "tree" / "in").mkdir()
    (tmp_path / "tree" / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    _write(tmp_path / "tree" / "sub" / "up.yaml", "_BASE_: ../../secret.yaml\n")
    with pytest.raises(ValueError, match="_BASE_ must be a path, relative to this file.*which lies outside"):
        load_config(top)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("https://example.org/a.yaml", "_BASE_ must be a path"),
        ("file:///etc/passwd", "_BASE_ must be a path"),
        ("[a.yaml, b.yaml]", "_BASE_ must be a path"),
        ("3", "_BASE_ must be a path"),
        ("", "_BASE_ must be a path"),
        ("none.yaml", "'none.yaml' does not exist"),
        ("top.yaml", "_BASE_ is a cycle: top.yaml -> top.yaml"),
        ("loop.yaml", "_BASE_ is a cycle: top.yaml -> loop.yaml -> top.yaml"),
    ],
)
def test_base_that_cannot_be_used(base, words, tmp_path):
    _write(tmp_path / "loop.yaml", "_BASE_: top.yaml\n")
    with pytest.raises(ValueError, match=words):
        load_config(_write(tmp_path / "top.yaml", f"_BASE_: {base}\n"))


def test_base_chains_are_short(tmp_path):
    for i in range(20):
        _write(tmp_path / f"{i}.yaml", f"_BASE_: {i + 1}.yaml\n")
    with pytest.raises(ValueError, match="more than 10 files"):
        load_config(tmp_path / "0.yaml")
