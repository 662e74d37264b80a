"""The tables of a benchmark, the machine they were measured on, and both as JSON."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row
from benchmarks.training import Training
from maskfeat.distributed.world import available_cores
from maskfeat.engine.provenance import cpu

REPO = Path(__file__).resolve().parents[1]
COLUMNS = ("what", "reference s", "ours s", "ratio", "reference MiB", "ours MiB", "ratio", "asked", "checked before")
TRAINING_COLUMNS = (
    "training", "input", "batch", "samples/s", "asked", "of peak", "GiB", "waits/step", "for data", "target",
)  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "cpu": cpu(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of this checkout, with a plus where files differ from it; "unknown" outside of git."""
    commands = (["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        done = [subprocess.run(c, cwd=REPO, capture_output=True, text=True, check=True).stdout for c in commands]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done[0].strip() + ("+" if done[1].strip() else "")


def machine_line(found: dict[str, Any]) -> str:
    """The machine in one line."""
    gpu = f", {found['gpu']}" if found["gpu"] else ""
    return (
        f"{found['cpu']}, {found['cores']} cores{gpu}; torch {found['torch']}, {found['threads']} thread(s); "
        f"commit {found['commit']}"
    )


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""
    return aligned([COLUMNS, *(_cells(row) for row in rows)])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.what,
        f"{row.reference.cpu:.4g}",
        f"{row.ours.cpu:.4g}",
        f"{row.ratio:.2f}x",
        _number(row.reference_mib, ".1f"),
        _number(row.ours_mib, ".1f"),
        _number(row.memory_ratio, ".2f", "x"),
        row.asked or "-",
        row.note,
    )


def training_table(rows: Sequence[Training]) -> str:
    """Whole training runs as aligned text."""
    return aligned([TRAINING_COLUMNS, *(_training_cells(row) for row in rows)])


def _training_cells(row: Training) -> tuple[str, ...]:
    return (
        row.recipe,
        row.input,
        str(row.batch),
        f"{row.samples_per_second:.4g}",
        row.asked or "-",
        _number(row.utilisation, ".1%"),
        _number(row.peak_gib, ".1f"),
        _number(row.waits_per_step, ".1f"),
        _number(row.waiting_for_data, ".1%"),
        _number(row.target_share, ".1%"),
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns under one another: the first and the last to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_json(path: str, found: dict[str, Any], rows: Sequence[Row], training: Sequence[Training]) -> None:
    """Everything that the tables say, and wall times."""
    content = {
        "machine": found,
        "rows": [row.as_dict() for row in rows],
        "training": [row.as_dict() for row in training],
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
