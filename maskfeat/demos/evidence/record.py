"""What remains of runs beside the report, in docs/evidence/<suite>_<budget>.json: their settings, figures and curves.

With it, seeds can be run on several machines or days, and every figure of the report can be checked.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskfeat.demos.evidence.runs import Published, Runs
from maskfeat.errors import UserFileError, naming
from maskfeat.file_io import replace_text
from maskfeat.report.run_log import LOG, read_log

_CURVES = {"train_iter": ("epoch", "iter", "loss"), "val_epoch": ("epoch", "loss", "top1")}
_TESTS = ("test_final",)
_HOST = re.compile(r"\S+ \((.+)\)")
"""What a log says of a machine: its name, which is not published, and what it is."""


def record_file(docs: Path, name: str) -> Path:
    """Return the path of a record; `name` is "<suite>_<budget>"."""
    return docs / "evidence" / f"{name}.json"


def read_record(path: Path) -> tuple[Published, dict[str, str]]:
    """Read a record.

    Returns:
        the runs, and by seed where they were made; both empty where there is no record.

    Raises:
        UserFileError: it cannot be read, or is none.
    """
    if not path.exists():
        return {}, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["runs"]), dict(content["made_on"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserFileError(
            f"{path} is no record of runs ({type(error).__name__}: {error}): leave out --add, or restore the file"
        ) from error


def where_made(runs: Runs, seed: int, name: str) -> list[str]:
    """Return on which machine and by which revision a run was made; empty where it has no log, as a probe."""
    log = runs.folder(seed, name) / LOG
    found = read_log(log).values() if log.is_file() else ()
    return [
        "; ".join([_HOST.sub(r"\1", run.machine), run.torch.replace("PyTorch", "torch"), run.revision])
        for run in found
        if run.revision
    ]


def write_record(path: Path, runs: Runs, made_on: dict[str, str]) -> None:
    """Write a record of all finished runs of the seeds of `made_on`, which says where each seed was made."""
    found = {
        seed: {name: _of_run(runs, int(seed), name) for name in runs.names(int(seed))}
        for seed in sorted(made_on, key=int)
    }
    lines = [f'  "{seed}": {{\n{_lines(of_seed)}\n  }}' for seed, of_seed in found.items()]
    text = f'{{\n "made_on": {json.dumps(made_on)},\n "runs": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    with naming(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)


def _lines(of_seed: dict[str, Any]) -> str:
    """Return a line of JSON for each run, for diffs that people can read."""
    return ",\n".join(f"   {json.dumps(name)}: {json.dumps(run)}" for name, run in of_seed.items())


def _of_run(runs: Runs, seed: int, name: str) -> dict[str, Any]:
    known = runs.known(seed, name)
    if known is not None:
        return known
    log = runs.folder(seed, name) / LOG
    stats: dict[str, Any] = {}
    if log.is_file():
        stats = {
            kind: [_picked(entry, keys) for entry in _ends(runs.stats(seed, name, kind))]
            for kind, keys in _CURVES.items()
        }
        stats |= {kind: runs.stats(seed, name, kind)[-1:] for kind in _TESTS}
    found = runs.checkpoints(seed, name)
    return {
        "asked": runs.asked(seed, name),
        "done": runs.result(seed, name),
        "stats": {kind: entries for kind, entries in stats.items() if entries},
        "checkpoints": [path.name for path in (found[:1] + found[1:][-1:])],
    }


def _ends(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the last entry of each epoch."""
    return list({entry["epoch"]: entry for entry in entries}.values())


def _picked(entry: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: entry[key] for key in keys if key in entry}
