"""Features of a trained network as a file: `maskfeat extract-features` and tools/extract_features.py call `main`."""

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskfeat.analysis.command import add_options, exit_code, joined, load
from maskfeat.analysis.extraction import TOKENS, Plan, compute_parts, make_plan, part_name
from maskfeat.analysis.feature_files import Features, check_format, read_rows, write_features
from maskfeat.analysis.identity import inputs_digest, network_digest
from maskfeat.analysis.inputs import JOB, MOST_WORKERS, PARTS, Inputs, find_inputs, split_views
from maskfeat.analysis.model import POOLS, Model
from maskfeat.data.datasets.sample_list import NO_LABEL
from maskfeat.distributed.collectives import (
    all_gather_object,
    destroy_process_group,
    init_process_group,
    run_on_main,
)
from maskfeat.distributed.launch import read_launch_environment
from maskfeat.distributed.world import World, available_cores, choose_device
from maskfeat.engine.owner import owned
from maskfeat.errors import UserError, naming
from maskfeat.file_io import replace_text
from maskfeat.text import count

logger = logging.getLogger(__name__)

_VERSION = 1
"""Of the parts; another one does not go on with them."""


def describe(model: Model, inputs: Inputs, plan: Plan) -> dict[str, Any]:
    """Return what the rows depend on: parts of another description are not taken."""
    return {
        "version": _VERSION,
        "network": network_digest(model),
        "inputs": inputs_digest(inputs),
        "number of inputs": len(inputs),
        "pool": plan.pool,
        "blocks": list(plan.blocks),
        "views": "{}x{}".format(*plan.views),
        "batch size": plan.batch_size,
        "precision": model.precision,
        "device": model.device.type,
    }


def _read(path: Path) -> dict[str, Any]:
    """Return what a JSON file of this program holds; {} where it is not there, or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _prepare(folder: Path, job: dict[str, Any]) -> None:
    """Check that the parts that are there are of this job, and say which job they are of where there are none."""
    path = folder / JOB
    if not path.exists():
        replace_text(path, json.dumps(job, indent=1) + "\n")
        return
    before = _read(path)
    changed = [f"{key} {before.get(key)!r} and now {value!r}" for key, value in job.items() if before.get(key) != value]
    if changed:
        raise UserError(
            f"{folder} holds parts of another command ({'; '.join(changed)}): give that one again, delete the "
            "folder, or give another --output"
        )


def _record(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def _is_done(output: Path, folder: Path, job: dict[str, Any]) -> bool:
    """Whether the output of this job is there, and its record.

    Raises:
        UserError: there is an output, of another job.
    """
    if not output.exists():
        return False
    record = _read(_record(output))
    if record.get("job") == job and record.get("bytes") == output.stat().st_size:
        return True
    if _read(folder / JOB) == job:
        return False  # the command was killed before it wrote the record
    raise UserError(f"{output} exists, and is not of this command: delete it, or give another --output")


def _assemble(output: Path, folder: Path, inputs: Inputs, plan: Plan, job: dict[str, Any], checkpoint: str) -> str:
    """Write the output and what is said about it, and return a line about them."""
    parts = [folder / part_name(number) for number in range(plan.parts(len(inputs)))]
    found = [read_rows(part) for part in parts]
    rows = np.concatenate([rows for rows, _ in found])
    bad = [sample for _, samples in found for sample in samples]
    if not len(rows):
        shutil.rmtree(folder, ignore_errors=True)  # they may be mended until the next call
        raise UserError(
            f"none of {count(len(inputs), inputs.media)} can be read, such as {bad[0].path}: {bad[0].cause}"
        )
    labels = inputs.numbers[rows]
    features = Features(
        parts,
        [inputs.paths[row] for row in rows],
        None if (labels == NO_LABEL).all() else labels,
        inputs.classes,
        plan.shapes,
    )
    write_features(output, features)
    about = {
        "checkpoint": checkpoint,
        "job": job,
        "bytes": output.stat().st_size,
        "rows": len(rows),
        "shapes": plan.shapes,
        "unreadable": [{"path": sample.path, "cause": sample.cause} for sample in bad],
    }
    replace_text(_record(output), json.dumps(about, indent=1) + "\n")
    shapes = ", ".join(f"{name} {'x'.join(map(str, (len(rows), *shape)))}" for name, shape in plan.shapes.items())
    unread = f"; {count(len(bad), inputs.media)} could not be read, listed in {_record(output)}" if bad else ""
    return f"{output}: {shapes}{unread}"


def extract(args: argparse.Namespace, world: World) -> int:
    """Do what the command line says in one of the processes."""
    output = Path(args.output)
    check_format(output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: the name of a file is expected")
    if args.device is None:
        args.device = str(choose_device(1, world.local_rank))
    if args.workers is None:
        args.workers = min(max(available_cores() // world.local_size, 1), MOST_WORKERS)
    folder = output.with_name(output.name + PARTS)
    model = load(args)
    inputs = find_inputs(args.data, model.media, args.prefix)
    views = split_views(model, args.views or 1)
    plan = make_plan(model, views, args.batch_size, args.pool, args.blocks)
    job = describe(model, inputs, plan)
    if inputs.left_out and world.is_main:
        logger.info("left out: %s", inputs.left_out)
    with ExitStack() as stack:

        def begin() -> list[int] | None:
            """Return the parts that are to be computed; None = the output is complete."""
            with naming(f"--output {output} cannot be written"):
                output.parent.mkdir(parents=True, exist_ok=True)
                if _is_done(output, folder, job):
                    shutil.rmtree(folder, ignore_errors=True)
                    return None
                stack.enter_context(owned(folder, "--output"))
                _prepare(folder, job)
                there = {path.name for path in folder.iterdir()}
            return [number for number in range(plan.parts(len(inputs))) if part_name(number) not in there]

        missing = run_on_main(begin)
        if missing is None:
            logger.info("%s is complete already; files are not read again: delete it if some have changed", output)
            return 0
        if world.is_main and len(missing) < plan.parts(len(inputs)):
            logger.info(
                "%d of %d parts are there already", plan.parts(len(inputs)) - len(missing), plan.parts(len(inputs))
            )
        compute_parts(model, inputs, plan, folder, missing[world.rank :: world.size], args.workers)
        all_gather_object(None)  # until all are done

        def end() -> str:
            with naming(f"--output {output} cannot be written"):
                said = _assemble(output, folder, inputs, plan, job, args.checkpoint)
                shutil.rmtree(folder, ignore_errors=True)
                return said

        said = run_on_main(end)
        if world.is_main:
            logger.info(said)
    return 0


def _blocks(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 3,7,11") from None


def parse_args(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write the features of images or videos into a file, with their paths and, where known, labels. "
        "The same command goes on where an interrupted one stopped.",
        epilog="example: %(prog)s --checkpoint runs/pt/checkpoints/ssl_checkpoint_epoch_00300.pyth --data photos "
        "--output photos.npz",
    )
    add_options(parser, views="1, the central one; more are averaged")
    parser.add_argument("--data", required=True, nargs="+", metavar="D", help="files, folders and lists (.csv)")
    parser.add_argument("--output", required=True, metavar="X", help="a .npz, .safetensors or .parquet file")
    parser.add_argument(
        "--pool", choices=(*POOLS, TOKENS), default="mean", help="of tokens to one vector (default: %(default)s)"
    )
    parser.add_argument(
        "--blocks", type=_blocks, default=[], metavar="3,7,11", help="outputs of these blocks, not of the last norm"
    )
    return parser.parse_args(joined(argv, "--blocks"))


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Extract features; return the exit code.

    Args:
        argv: the command line; None = sys.argv.
        prog: name of the command in its help.
    """
    args = parse_args(argv, prog)

    def work() -> int:
        started = read_launch_environment()
        world = started.world if started else World()
        init_process_group(
            world, "gloo", torch.device("cpu"), started.init_method if started else "", timedelta(days=1)
        )
        try:
            return extract(args, world)
        finally:
            destroy_process_group()

    return exit_code(work, goes_on=True)
