"""The process of one part."""

import logging
import shutil
import sys
import traceback
from pathlib import Path

import torch

from benchmarks.gpu.parts import Context, Failed, Part, write_json
from maskfeat.distributed.processes import die_with_parent


def outcome_file(output: Path, name: str) -> Path:
    """Where the process of a part leaves its figures."""
    return output / "parts" / f"{name}.json"


def run_part(part: Part, output: Path, device: torch.device, toy: bool, seconds: float) -> int:
    """Run a part in this process and write what it found to `outcome_file`.

    Returns:
        the exit code: 0, or 1 where it failed.
    """
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    folder = output / "work" / part.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcome_file(output, part.name).parent.mkdir(exist_ok=True)
    path = outcome_file(output, part.name)
    if toy:
        torch.set_num_threads(1)  # more do not speed up small tensors
    context = Context(device, toy, folder, output / "data", seconds, path)
    context.note()
    why = ""
    try:
        context.figures.update(part.run(context))
    except Failed as error:
        why = str(error) or "Failed"
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        why = f"{type(error).__name__}: {text[0]}"
    content = {"figures": context.figures, "not_run": context.not_run, "why": why, "done": True}
    if context.cuda:
        content["device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    write_json(path, content)
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if why else 0
