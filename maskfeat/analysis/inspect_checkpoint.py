"""What is in a file of weights: `tools/inspect_checkpoint.py` calls `main`."""

import argparse
import json
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from maskfeat.analysis.architecture import Recognised, build_recognised, recognise
from maskfeat.analysis.command import exit_code
from maskfeat.analysis.source import Source, read_source
from maskfeat.checkpoint.files import AVERAGE, SHARDED, checksum_path, verify_checkpoint
from maskfeat.checkpoint.names import bare
from maskfeat.checkpoint.reading import model_state, saved_entries, trained_classes
from maskfeat.checkpoint.sharded import OPTIMIZER
from maskfeat.checkpoint.sharded_files import tensors_of
from maskfeat.checkpoint.weights import not_finite
from maskfeat.config import load_config
from maskfeat.config.arguments import ConfigParser
from maskfeat.config.coerce import coerce
from maskfeat.config.recipes import recipe_names
from maskfeat.config.schema import schema
from maskfeat.config.yaml_io import Entry, read_chain
from maskfeat.engine.changes import find_changes
from maskfeat.engine.resume import fit_weights
from maskfeat.errors import UserError, about
from maskfeat.objectives.base import Objective
from maskfeat.registry import backbone_spec, lookup, objective_spec, tests_at_any_size
from maskfeat.text import some

_PLACES = ("NUM_GPUS", "NUM_SHARDS", "SHARD_ID", "DIST_BACKEND")
"""Keys that say where a run was, beside its paths."""


def inspect(source: str | Path, cfg: CfgNode | None = None) -> dict[str, Any]:
    """Return what is in a file of weights, as values that JSON can hold.

    Args:
        source: as `load_model`.
        cfg: into which network the weights are to be loaded; None = into that of the file.

    Raises:
        UserError: the file cannot be read or is damaged, or nobody knows its network.
    """
    file = read_source(source)
    try:
        state = model_state(file.content)
        found = recognise(file.content, file.cfg if cfg is None else cfg)
        own = found if cfg is None else _own(file, found)
    except UserError as error:
        raise about(file.path, error) from error
    tensors = {bare(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
    classes = trained_classes(file.content)
    report = {
        "file": file.path,
        "writer": own.writer,
        "kind": own.kind,
        "network": describe(own),
        **_origin(file, own),
        "epoch": _number(file.content.get("epoch"), 1),
        "step": _number(file.content.get("step"), 0),
        "parameters": _sizes(tensors),
        "integrity": _integrity(Path(file.path), tensors),
        "averaged weights": AVERAGE in file.content,
        "optimizer": _has_optimizer(file),
        "classes": classes,
        "assumed": list(own.notes),
    }
    report["loading"] = _loading(found, file, "its own network" if cfg is None else "the given recipe")
    return report


def _has_optimizer(file: Source) -> bool:
    path = Path(file.path)
    if path.suffix == SHARDED and path.is_dir():  # whose content leaves it out
        return any(name.startswith(OPTIMIZER) for name in tensors_of(path))
    return any(name.startswith("optimizer") for name in map(str, file.content))


def _own(file: Source, given: Recognised) -> Recognised:
    """Return the network of the file itself, or what the caller says that it is where nobody knows it."""
    try:
        return recognise(file.content, file.cfg)
    except UserError:
        return given


def _number(value: Any, first: int) -> int | None:
    """Return a count of a checkpoint, counted from `first` instead of 0; None where there is none."""
    return value + first if isinstance(value, int) and not isinstance(value, bool) else None


def empty_network(found: Recognised) -> Objective:
    """Return the network without values: initialising them takes longer than loading a file."""
    with torch.device("meta"):
        objective = build_recognised(found)
    return objective.to_empty(device="cpu")


def describe(found: Recognised) -> str:
    """Return the network in words: objective, backbone, blocks, width, input and number of parameters."""
    with torch.device("meta"):
        objective = build_recognised(found)
    backbone, spec, size = objective.backbone, objective_spec(found.cfg), list(objective.backbone.clip_size)
    if tests_at_any_size(found.cfg):  # as it is shown in tests
        size[-2:] = [found.cfg.DATA.TEST_CROP_SIZE] * 2
    shown = " x ".join(map(str, size))
    title = spec.title or spec.name
    heads = f", {found.cfg.MVIT.NUM_HEADS} attention heads in the first" if hasattr(backbone, "blocks") else ""
    count = sum(parameter.numel() for parameter in objective.parameters())
    return (
        f"{type(backbone).__name__} of {backbone.num_blocks} blocks{heads}, {backbone.width} channels at the end, for "
        f"{shown} {'pixels' if len(backbone.clip_size) == 2 else '(frames, pixels)'}; "
        f"{found.kind if found.kind == 'backbone' else title}; {count:,} parameters ({backbone_spec(found.cfg).name})"
    )


def _origin(file: Source, found: Recognised) -> dict[str, Any]:
    """Return the recipe, and the keys in which the config of the file differs from it."""
    if found.recipe:
        return {"recipe": found.recipe, "changed keys": dict(found.changed)}
    if not saved_entries(file.content):
        return {"recipe": None, "changed keys": {}}
    name = _nearest_recipe(found.cfg)
    kinds = schema(found.cfg.PLUGINS).rules.kinds
    changes = find_changes(file.content, load_config(name))
    changed = {c.key: c.was for c in changes if kinds.get(c.key) != "path" and c.key not in _PLACES}
    return {"recipe": name, "changed keys": changed}


def _nearest_recipe(cfg: CfgNode) -> str:
    """Return the recipe with the most values that are those of a config, of the same objective where one is."""
    allowed = schema(cfg.PLUGINS)

    def agreement(name: str) -> tuple[bool, int]:
        given = {key: entry for key, entry in _entries(name).items() if key in allowed.known}
        same = {
            key
            for key, entry in given.items()
            if coerce(key, entry, allowed.rules.kinds[key], allowed.known[key]) == lookup(cfg, key)
        }
        return "MODEL.MODEL_NAME" in same, 2 * len(same) - len(given)

    return max(recipe_names(), key=agreement)


@cache
def _entries(recipe: str) -> dict[str, Entry]:
    """Return what a recipe and those that it builds on give."""
    return {key: entry for entries in read_chain(recipe) for key, entry in entries.items()}


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return numbers and MiB of the tensors in a file, in all and by the first part of their names."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, value in tensors.items():
        parts[name.split(".")[0]].append(value)

    def size(values: Sequence[Tensor]) -> dict[str, Any]:
        count = sum(value.numel() for value in values)
        return {"count": count, "MiB": round(sum(value.numel() * value.itemsize for value in values) / 2**20, 2)}

    types = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    return {**size(list(tensors.values())), "types": types, "parts": {name: size(part) for name, part in parts.items()}}


def _integrity(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how the file was verified, which has succeeded, and which tensors are not finite."""
    if path.suffix == SHARDED:
        verified = "the checksums in SHA256SUMS hold"
    elif checksum_path(path).exists():
        verified = f"the checksum in {checksum_path(path).name} holds"
    elif path.suffix == ".safetensors":
        verified = "sizes agree; there is no checksum"
    else:
        try:
            verify_checkpoint(path)
            verified = "the CRC-32 of each member holds; there is no checksum beside it"
        except UserError:  # PyTorch's format of before 2020 is no archive
            verified = "nothing to verify it by"
    broken = not_finite((name, value) for name, value in tensors.items() if not value.is_meta)
    return {"verified": verified, "not finite": broken}


def _loading(found: Recognised, file: Source, target: str) -> dict[str, Any]:
    """Return what loading would do with each parameter, or why it would fail."""
    try:
        return {"into": target, **asdict(fit_weights(found.cfg, empty_network(found), file.path, file.content))}
    except UserError as error:
        return {"into": target, "error": str(error)}


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report for people."""
    sizes, integrity, loading = report["parameters"], report["integrity"], report["loading"]
    yield from (f"{name:<18}{report[name]}" for name in ("file", "writer", "kind", "network"))
    yield f"{'recipe':<18}{report['recipe'] or 'not known'}" + (", with" if report["changed keys"] else "")
    yield from (f"{'':<20}{key} {value}" for key, value in report["changed keys"].items())
    if report["epoch"] is not None:
        yield f"{'epoch':<18}{report['epoch']}" + (f", step {report['step']}" if report["step"] else "")
    yield f"{'tensors':<18}{sizes['count']:,} numbers, {sizes['MiB']:,} MiB, {', '.join(sizes['types'])}"
    yield from (f"{'':<20}{name:<14}{part['count']:>13,}" for name, part in sizes["parts"].items())
    yield f"{'integrity':<18}{integrity['verified']}"
    broken = integrity["not finite"]
    yield f"{'':<18}" + (f"NaN or infinite: {some(broken, 6)}" if broken else "all values are finite")
    yield f"{'averaged weights':<18}{'yes (TRAIN.EMA)' if report['averaged weights'] else 'no'}"
    yield f"{'optimizer':<18}{'yes' if report['optimizer'] else 'no'}"
    classes = report["classes"]
    yield f"{'classes':<18}" + (f"{len(classes)}: {some(classes, 6)}" if classes else "no names")
    yield from (f"{'assumed':<18}{note}" for note in report["assumed"])
    if "error" in loading:
        yield f"into {loading['into']}: it would not be loaded: {loading['error']}"
        return
    yield f"into {loading['into']}:"
    for what in ("loaded", "resized", "fresh", "dropped"):
        named = loading[what]
        shown = [f"{name} {change}" for name, change in named.items()] if what == "resized" else named
        yield f"  {what:<16}{len(named):>5}  {'' if what == 'loaded' else some(shown, 6)}".rstrip()


def _say(args: argparse.Namespace) -> int:
    """Do what the command line says."""
    if args.opts and args.cfg is None:
        raise UserError(f"overrides change the recipe of --cfg, and none is given: {' '.join(args.opts)}")
    report = inspect(args.file, None if args.cfg is None else load_config(args.cfg, args.opts))
    text = json.dumps(report, indent=1, default=str) if args.json else "\n".join(lines(report))
    sys.stdout.write(f"{text}\n")
    return 0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print what is in a file of weights; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    parser = ConfigParser(
        prog=prog,
        description="Say what a file of weights is: who wrote it, its network, epoch, recipe, parameters, integrity "
        "and classes, and what loading it would do with each parameter.",
        epilog="examples: %(prog)s maskfeat_vit_base_in1k   %(prog)s vit_b.pth --cfg masked_ssl/in1k_VIT_B_MaskFeat_FT",
    )
    parser.add_argument("file", help="a checkpoint, an http(s) address or a published name")
    parser.add_cfg("a recipe: say what its network would load, resize, start fresh and drop", required=False)
    parser.add_argument("--json", action="store_true", help="print JSON, with every name")
    parser.add_overrides("overrides of the recipe")
    args = parser.parse_args(argv)
    return exit_code(lambda: _say(args), logging.WARNING)
