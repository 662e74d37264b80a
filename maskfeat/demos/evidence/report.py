"""Write docs/evidence.md: tables, charts and images, made from the files of the runs alone.

Each suite and budget has its own section between two comments; text outside of them is kept.
"""

import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import maskfeat
from maskfeat.analysis.curves import Chart, Line, Point, chart_figure
from maskfeat.analysis.visualize import drawing
from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.config import load_config
from maskfeat.config.recipes import INSTALLED
from maskfeat.demos.evidence.runs import Runs
from maskfeat.demos.evidence.suites import CONFIGS, CONTROLS, Method

FILE = "evidence.md"
_HEAD = """# Evidence that pre-training helps

`tools/evidence.py` writes the sections between the `begin` and `end` comments; each section names its command. A new
run of a command replaces its section only.
"""
_PICTURED = 4
"""Number of held-out samples in an image."""


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, one per seed."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation; NaN for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(len(self.values))

    def shown(self, form: str = ".1f", sign: str = "") -> str:
        """Format as "36.8 ± 0.4"; a single seed as the value alone."""
        mean = format(self.mean, sign + form)
        return mean if len(self.values) == 1 else f"{mean} ± {format(self.deviation, form)}"

    def __sub__(self, other: "Spread") -> "Spread":
        """Return the differences, paired by seed."""
        return Spread([a - b for a, b in zip(self.values, other.values, strict=True)])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Report:
    """The section of a suite at a budget.

    Args:
        runs: the runs of the suite.
        budget: its name.
        seeds: the finished seeds.
        docs: folder of the report.
        command: the command that is reported for this section.
    """

    def __init__(self, runs: Runs, budget: str, seeds: Sequence[int], docs: Path, command: str) -> None:
        self.runs, self.suite, self.seeds, self.docs, self.command = runs, runs.suite, list(seeds), docs, command
        self.name = f"{self.suite.name} {budget}"
        self.images = docs / "evidence"

    def write(self) -> str:
        """Draw the images and write the section into docs/evidence.md; return the section."""
        self.images.mkdir(parents=True, exist_ok=True)
        begin, end = f"<!-- begin: {self.name} -->", f"<!-- end: {self.name} -->"
        written = self.section()
        section = f"{begin}\n{written}\n{end}"
        path = self.docs / FILE
        text = path.read_text(encoding="utf-8") if path.is_file() else _HEAD
        if begin in text and end in text:
            before, rest = text.split(begin, 1)
            text = before + section + rest.split(end, 1)[1]
        else:
            text = f"{text.rstrip()}\n\n{section}\n"
        path.write_text(text, encoding="utf-8")
        return written

    # ------------------------------------------------------------------ figures

    def probe(self, name: str, labels: str, kind: str, seeds: Sequence[int] | None = None) -> Spread:
        """Return the top-1 accuracy of a probe."""
        found = [self.runs.result(seed, name)["probe"][labels][kind] for seed in seeds or self.seeds]
        return Spread(found)

    def tested(self, name: str, seeds: Sequence[int] | None = None) -> Spread:
        """Return the top-1 accuracy of the last test of a run."""
        found = [self.runs.last(seed, name, "test_final")["top1"] for seed in seeds or self.seeds]
        return Spread([float(value) for value in found])

    def with_run(self, name: str) -> list[int]:
        """Return the seeds for which a run is finished."""
        return [seed for seed in self.seeds if self.runs.is_done(seed, name)]

    # ------------------------------------------------------------------ tables

    def section(self) -> str:
        """Return the section as Markdown."""
        parts = [
            f"## {self.suite.title}, budget {self.name.split()[1]}",
            f"`{self.command}`\n\n{self._setting()}",
            "Top-1 in percent on the held-out set, mean ± standard deviation over seeds; gains are paired by seed.",
            self.probes(),
            self.fine_tuning(),
            self.held_out(),
            self.controls(),
            self.charts(),
            *self.drawings(),
            self.times(),
        ]
        return "\n\n".join(part for part in parts if part)

    def _setting(self) -> str:
        seeds = ", ".join(map(str, self.seeds))
        return f"Seeds {seeds}. {machine()}; torch {torch.__version__}; {revision()}."

    def probes(self) -> str:
        """Compare frozen features with those of a backbone with random weights."""
        rows = []
        for method in self.runs.methods:
            for words, labels in self.runs.budget.labels.items():
                row = [method.title, words]
                for kind in ("linear", "knn"):
                    random = self.probe(f"{method.family.name}_random_probe", labels, kind)
                    learned = self.probe(f"{method.name}_probe", labels, kind)
                    row += [random.shown(), learned.shown(), (learned - random).shown(sign="+")]
                rows.append(row)
        head = ["frozen features", "probe fitted to", "linear: random", "pre-trained", "gain", "kNN: random"]
        return table([*head, "pre-trained", "gain"], rows)

    def fine_tuning(self) -> str:
        """Compare fine-tuning with training from scratch."""
        rows = []
        for method in self.runs.methods:
            for words, labels in self.runs.budget.labels.items():
                scratch = self.tested(f"{method.family.name}_scratch_{labels}")
                tuned = self.tested(f"{method.name}_ft_{labels}")
                rows.append([method.title, words, scratch.shown(), tuned.shown(), gain(tuned - scratch)])
        return table(["fine-tuning", "on", "from scratch", "pre-trained", "gain"], rows)

    def held_out(self) -> str:
        """Compare the held-out loss of pre-training with that of constant predictors."""
        rows = []
        for method in self.runs.methods:
            name = f"{method.name}_references"
            found = [self.runs.result(seed, name) for seed in self.seeds]
            if "model" not in found[0]:
                steps = [self.runs.last(seed, method.name, "val_epoch") for seed in self.seeds]
                zero, model = (
                    Spread([float(step[key]) for step in steps]).shown(".4f") for key in ("zero_predictor", "loss")
                )
                rows.append([method.title, zero, "", "", model])
                continue
            keys = ("zero", "mean_hog", "mean_hog_of_place", "model")
            rows.append([method.title, *(Spread([run[key] for run in found]).shown(".4f") for key in keys)])
        head = ["loss on held-out samples", "zero", "mean HOG of the training set", "the same, by place", "model"]
        return table(head, rows)

    def controls(self) -> str:
        """Return the results of the controls, which should remove the gain."""
        rows = []
        for method in self.runs.methods:
            for control in CONTROLS:
                for words, labels in self.runs.budget.labels.items():
                    row = self._control(method, f"{method.name}_{control.name}", labels)
                    if row:
                        rows.append([f"{method.title}: {control.title}", words, *row])
        if not rows:
            return ""
        head = ["control", "on", "seeds", "linear probe", "gain over random", "fine-tuning", "gain over scratch"]
        return table(head, rows)

    def _control(self, method: Method, name: str, labels: str) -> list[str]:
        family, empty = method.family.name, ["", ""]
        probed, tuned = self.with_run(f"{name}_probe"), self.with_run(f"{name}_ft_{labels}")
        if not probed and not tuned:
            return []
        row = [str(len(probed or tuned))]
        if probed:
            found = self.probe(f"{name}_probe", labels, "linear", probed)
            random = self.probe(f"{family}_random_probe", labels, "linear", probed)
            row += [found.shown(), (found - random).shown(sign="+")]
        else:
            row += empty
        if not tuned:
            return [*row, *empty]
        found, scratch = (self.tested(n, tuned) for n in (f"{name}_ft_{labels}", f"{family}_scratch_{labels}"))
        return [*row, found.shown(), (found - scratch).shown(sign="+")]

    def times(self) -> str:
        """Return wall-clock and CPU minutes of each run."""
        names = sorted({path.parent.name for path in self.runs.root.glob("seed*/*/done.json")})
        rows = []
        for name in names:
            found = [self.runs.result(seed, name) for seed in self.with_run(name)]
            if found:
                clock, cpu = (Spread([run[key] / 60 for run in found]) for key in ("seconds", "cpu_seconds"))
                rows.append([f"`{name}`", str(len(found)), clock.shown(), cpu.shown()])
        for method in self.runs.methods:
            own = [name for name in names if _belongs(name, method)]
            totals = [
                Spread([sum(self.runs.result(seed, name)[key] / 60 for name in own) for seed in self.seeds]).shown()
                for key in ("seconds", "cpu_seconds")
            ]
            rows.append([f"**{method.title}**, one seed without controls", str(len(self.seeds)), *totals])
        return table(["run", "seeds", "wall-clock minutes", "CPU minutes"], rows)

    # ------------------------------------------------------------------ images

    def charts(self) -> str:
        """Draw the losses of pre-training and the top-1 accuracy of fine-tuning over epochs."""
        charts = []
        for method in self.runs.methods:
            held = Line("held-out", [self._curve(seed, method.name, "val_epoch", "loss") for seed in self.seeds])
            lines = [Line("training", [self._curve(seed, method.name, "train_iter", "loss") for seed in self.seeds])]
            levels = [self._curve(seed, method.name, "val_epoch", "mean_hog_predictor") for seed in self.seeds]
            if all(levels):  # MFM has none
                lines.append(Line("mean HOG", levels, level=True))
            charts.append(Chart(f"{method.title}: loss", "epoch of pre-training", [*lines, held]))
            for words, labels in self.runs.budget.labels.items():
                names = {
                    "pre-trained": f"{method.name}_ft_{labels}",
                    "from scratch": f"{method.family.name}_scratch_{labels}",
                }
                found = [
                    Line(line, [self._curve(seed, name, "val_epoch", "top1") for seed in self.seeds])
                    for line, name in names.items()
                ]
                charts.append(Chart(f"{method.title}: top-1, {words}", "epoch of fine-tuning", found))
        path = self.images / f"{self.name.replace(' ', '_')}_curves.png"
        chart_figure(charts, columns=1 + len(self.runs.budget.labels)).savefig(path)
        return f"![Curves](evidence/{path.name})"

    def _curve(self, seed: int, name: str, kind: str, key: str) -> list[Point]:
        points: dict[float, float] = {}  # of a step that was repeated after a kill, the last one
        for entry in self.runs.stats(seed, name, kind):
            if key in entry:
                epoch = int(str(entry["epoch"]).split("/")[0])
                if kind == "train_iter":
                    step, steps = map(int, entry["iter"].split("/"))
                    points[epoch - 1 + step / steps] = float(entry[key])
                else:
                    points[float(epoch)] = float(entry[key])
        return sorted(points.items())

    def drawings(self) -> list[str]:
        """Draw predictions for held-out samples by the first and the last checkpoint of the first seed."""
        shown = []
        for method in self.runs.methods:
            seed = self.seeds[0]
            found = find_checkpoints(self.runs.folder(seed, method.name), "pt")
            for words, checkpoint in (("early", found[0]), ("late", found[-1])):
                opts = [*self.runs.pretraining(method, seed, method.name), "TEST.CHECKPOINT_FILE_PATH", str(checkpoint)]
                drawn = drawing(load_config(CONFIGS / method.pretraining, opts), _PICTURED)
                epoch = int(re.findall(r"epoch_(\d+)", checkpoint.name)[0])
                title = f"{method.title}: {words}, after epoch {epoch}"
                path = self.images / f"{self.name.replace(' ', '_')}_{method.name}_{words}.png"
                drawn.figure(title).quantize(128).save(path, optimize=True)
                shown.append(f"![{title}](evidence/{path.name})")
        return shown


def _belongs(name: str, method: Method) -> bool:
    """Return whether a run belongs to a method: its own runs and those of its family, not its controls."""
    if any(name.startswith(f"{method.name}_{control.name}") for control in CONTROLS):
        return False
    return name == method.name or name.startswith((f"{method.name}_", f"{method.family.name}_"))


def gain(spread: Spread) -> str:
    """Format a gain, with its size in standard errors where there are several seeds."""
    if len(spread.values) == 1:
        return spread.shown(sign="+")
    errors = spread.mean / spread.error if spread.error else math.inf
    return f"{spread.shown(sign='+')} ({errors:+.1f} standard errors)"


def machine() -> str:
    """Return the name of the GPU, or of the CPU with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def revision() -> str:
    """Return the version of an installed package, or the commit of a checkout, with a + where files differ from it."""
    if INSTALLED:
        return f"maskfeat {maskfeat.__version__}"
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=CONFIGS, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"
    return f"commit {done.stdout.strip()}"
