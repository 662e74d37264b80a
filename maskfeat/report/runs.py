"""Runs to report on, each read from its OUTPUT_DIR: its log, config, pictures and bad samples, and its figures."""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from maskfeat.config.yaml_io import read_entries
from maskfeat.errors import UserError, UserFileError, naming
from maskfeat.report.run_log import LOG, Curves, RunLog, direction, numbers, read_log
from maskfeat.text import duration, printable

CONFIG, BAD_SAMPLES, PICTURES = "config.yaml", "bad_samples.jsonl", "pictures"
_OVERRIDE = "# override: "
_UNSAID = ("OUTPUT_DIR",)  # it is another one for each run, and the name of the run
_FOR_THE_MACHINE = ("lr", "grad_norm", "clipped", "skipped", "samples_per_second", "dt", "dt_data")
"""Values of a training that say nothing about the model."""
KINDS = ("state", "test", "validation", "training")
_SPEED_AND_SKIPPED = ("samples_per_second", "skipped")


@dataclass(frozen=True)
class Run:
    """A run, or the part of it that has one TASK.

    Attributes:
        name: where it is, and its TASK where several wrote into the folder.
        folder: its OUTPUT_DIR.
        log: what its log says.
        config: its values by key; empty where that of this TASK is not there any more.
        overrides: KEY VALUE of its command line.
        pictures: files of predictions after the first and the last epoch that has one.
        bad_samples: that cannot be read; None where the list is of another TASK, or cannot be read.
        problems: what could not be read.
    """

    name: str
    folder: Path
    log: RunLog
    config: Mapping[str, str]
    overrides: Mapping[str, str]
    pictures: Sequence[Path]
    bad_samples: int | None
    problems: Sequence[str]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the runs of these folders, in their order.

    Raises:
        UserFileError: a folder has no log that can be read.
    """
    runs: list[Run] = []
    places: dict[Path, Path] = {}
    for given in map(Path, folders):
        places.setdefault(given.parent if given.name == LOG else given, given)
    for folder, given in places.items():
        if not (folder / LOG).is_file():
            raise UserFileError(f"{folder} is not the OUTPUT_DIR of a run: it has no {LOG}")
        logs = read_log(folder / LOG)
        for number, (task, log) in enumerate(logs.items(), 1):
            name = f"{given} [{task or 'no TASK'}]" if len(logs) > 1 else str(given)
            runs.append(_read_run(name, folder, task, log, is_last=number == len(logs), alone=len(logs) == 1))
    return runs


def _read_run(name: str, folder: Path, task: str, log: RunLog, is_last: bool, alone: bool) -> Run:
    problems, config, overrides = [], {}, {}
    if is_last:  # its files are those of the last TASK
        try:
            with naming(f"{folder / CONFIG} cannot be read"):
                config = {key: _shown(entry.value) for key, entry in read_entries(folder / CONFIG).items()}
        except UserError as error:
            problems.append(str(error))
        overrides = _overrides(folder / "config_given.yaml")
    if log.damaged:
        problems.append(f"{log.damaged} lines of {LOG} are damaged and left out")
    bad = _lines(folder / BAD_SAMPLES) if is_last else None
    return Run(name, folder, log, config, overrides, _pictures(folder / PICTURES, task, alone), bad, problems)


def _shown(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _overrides(path: Path) -> dict[str, str]:
    found = {}
    with suppress(OSError, ValueError, TypeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(_OVERRIDE):
                key, value = json.loads(line.removeprefix(_OVERRIDE))
                found[str(key)] = _shown(value)
    return found


def _lines(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            return sum(bool(line.strip()) for line in file)
    except FileNotFoundError:
        return 0
    except OSError:
        return None


def _pictures(folder: Path, task: str, alone: bool) -> list[Path]:
    """Return the first and the last picture of this TASK; of all, where none is said and no other wrote (`alone`)."""
    prefix = f"{re.escape(task)}_" if task else "(?:.*_)?" if alone else ""
    named = re.compile(rf"{prefix}epoch_(\d+)\.png")
    found = []
    with suppress(OSError):
        found = sorted((int(m[1]), path) for path in folder.iterdir() if (m := named.fullmatch(path.name)))
    return [path for _, path in dict.fromkeys([*found[:1], *found[-1:]])]


# ---------------------------------------------------------------------- figures


def metric_names(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Return the names of all curves: what says something about the model, "loss" first, and the rest."""
    names = dict.fromkeys(
        name for run in runs for curves in (run.log.train, run.log.validation) for name in curves.values
    )
    about = sorted((name for name in names if name not in _FOR_THE_MACHINE), key=lambda name: name != "loss")
    return about, [name for name in _FOR_THE_MACHINE if name in names]


def _finite(values: Sequence[float]) -> list[int]:
    return [index for index, value in enumerate(values) if math.isfinite(value)]


def _last(curves: Curves, name: str, with_best: bool) -> str:
    """The last value, and the best one with its epoch where there is a better one; "" without values."""
    values = curves.values.get(name, ())
    found = _finite(values)
    if not found:
        return ""
    last, sign = found[-1], direction(name) if with_best else 0
    text = f"{values[last]:.5g}"
    best = max(found, key=lambda index: sign * values[index]) if sign else last
    if values[best] != values[last]:
        text += f" (best {values[best]:.5g} after epoch {curves.epoch[best]:.4g})"
    return text


def state(run: Run) -> str:
    """Return whether a run is complete, and what ended it if not."""
    log = run.log
    done = max([0.0, *log.train.epoch[-1:], *log.validation.epoch[-1:]])
    if log.ending:
        return log.ending
    if not log.max_epoch:
        return "tested" if log.tests else "nothing trained"
    if done >= log.max_epoch - 1e-9:
        return f"complete: {log.max_epoch} of {log.max_epoch} epochs"
    return f"goes on, or was killed: {done:.2f} of {log.max_epoch} epochs"


def results(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the figures of a run: name and value, "" where it is not known."""
    log = run.log
    yield "state", state(run)
    for entries, entry in log.tests.items():
        for name, value in numbers(entry).items():
            if name != "samples":
                yield f"test {name} ({entries})", f"{value:.5g}"
    for kind, curves in (("validation", log.validation), ("training", log.train)):
        for name in curves.values:
            if name not in _FOR_THE_MACHINE:
                yield f"{kind} {name}", _last(curves, name, with_best=curves is log.validation)


def circumstances(run: Run) -> Iterator[tuple[str, str]]:
    """Yield how a run went, on what: name and value, "" where it is not known."""
    log, values = run.log, run.log.train.values
    speeds, skipped = ([v for v in values.get(name, ()) if math.isfinite(v)] for name in _SPEED_AND_SKIPPED)
    yield "steps", f"{log.train.step[-1]:.0f}" if log.train.step else ""
    yield "steps skipped", f"{sum(skipped):.0f}" if skipped else ""
    yield "samples/s (median)", f"{statistics.median(speeds):.4g}" if speeds else ""
    yield "time at work", duration(log.seconds)
    yield "begun", log.begun
    yield "resumed", str(log.resumes)
    yield "warnings", str(sum(log.warnings.values()))
    yield "bad samples", "" if run.bad_samples is None else str(run.bad_samples)
    yield "model", log.model
    yield "program", log.revision
    yield "PyTorch", log.torch.removeprefix("PyTorch ")
    yield "machine", log.machine


def _kind(name: str) -> int:
    """Place of a row's kind among the kinds; the runs may have different ones."""
    kind = name.split()[0]
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def summary(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the rows of the summary, one value a run: figures, then keys of the config.

    Of one run these are its overrides, of several the keys whose values differ.
    """
    rows: dict[str, list[str]] = {}
    for part in (results, circumstances):
        found = [dict(part(run)) for run in runs]
        names = sorted(dict.fromkeys(name for of_run in found for name in of_run), key=_kind)
        rows |= {name: [of_run.get(name, "") for of_run in found] for name in names}
    rows = {name: values for name, values in rows.items() if any(values)}
    given = [run.overrides if len(runs) == 1 else run.config for run in runs]
    for key in sorted({key for of_run in given for key in of_run} - {*_UNSAID}):
        values = [of_run.get(key, "") for of_run in given]
        if len(runs) == 1 or len({value for value in values if value}) > 1:
            rows[key] = values
    return rows


def summary_csv(runs: Sequence[Run]) -> str:
    """Return the summary as CSV: a line for each run."""
    rows, text = summary(runs), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *rows])
    writer.writerows([run.name, *(values[number] for values in rows.values())] for number, run in enumerate(runs))
    return printable(text.getvalue())
