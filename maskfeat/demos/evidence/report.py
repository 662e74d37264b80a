"""Write docs/evidence.md: tables, charts and images, made from the files of the runs, or what was published of them.

Each suite and budget has its own section between two comments; text outside of them is kept.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from maskfeat.analysis.curves import Chart, Line, Point, chart_figure
from maskfeat.analysis.probes.command import GIVEN, RANDOM
from maskfeat.analysis.references import MEAN, MODEL, PLACE, RIDGE, ZERO, share
from maskfeat.analysis.visualize import drawing
from maskfeat.config import load_config
from maskfeat.demos.evidence.record import record_file, where_made, write_record
from maskfeat.demos.evidence.runs import TUNING, Runs, scratch, tuning_run
from maskfeat.demos.evidence.suites import CONFIGS, CONTROLS, GRAY, Labels, Method
from maskfeat.errors import naming
from maskfeat.file_io import replace_text, unexpanded_path

FILE = "evidence.md"
_HEAD = """# Evidence that pre-training helps

`tools/evidence.py` writes the sections between the `begin` and `end` comments; each section names its command. A new
run of a command replaces its section only.
"""
_PICTURED = 4
"""Number of held-out samples in an image."""
_PROBE_NAMES = {"linear": "linear", "attentive": "attentive", "knn": "kNN"}


def _shown(probe: str) -> str:
    """Return the name of a probe in the report."""
    return _PROBE_NAMES[probe.removesuffix(GRAY)] + (GRAY if probe.endswith(GRAY) else "")


@dataclass(frozen=True)
class Spread:
    """Values of one quantity, one per seed."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
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


def _filled(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, or nothing where it has no rows."""
    return table(head, rows) if rows else ""


class Report:
    """The section of a suite at a budget.

    Args:
        runs: the runs of the suite.
        budget: its name.
        seeds: numbers of seeds. Rows, lines and pictures are of those of which the runs are finished.
        docs: folder of the report.
        command: the command that is reported for this section.
        made_on: where published seeds were made, by seed.
    """

    def __init__(
        self,
        runs: Runs,
        budget: str,
        seeds: Sequence[int],
        docs: Path,
        command: str,
        made_on: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.runs, self.suite, self.seeds, self.docs, self.command = runs, runs.suite, list(seeds), docs, command
        self.name = f"{self.suite.name} {budget}"
        self.record = record_file(docs, runs.root.name)
        self.images = self.record.parent
        self.made_on = {str(seed): self._place(seed, made_on) for seed in self.seeds}

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
        with naming(f"{path} cannot be written"):
            replace_text(path, text)
        write_record(self.record, self.runs, self.made_on)
        return written

    # ------------------------------------------------------------------ figures

    def probe(
        self, name: str, labels: Labels, kind: str, weights: str = GIVEN, seeds: Sequence[int] | None = None
    ) -> Spread:
        """Return the top-1 accuracy of a probe; `weights` is `GIVEN` or `RANDOM`."""
        return Spread(
            [self.runs.result(seed, name)["probe"][labels.folder][weights][kind] for seed in seeds or self.seeds]
        )

    def tested(self, name: str, seeds: Sequence[int] | None = None) -> Spread:
        """Return the top-1 accuracy of the last test of a run."""
        found = [self.runs.last(seed, name, "test_final")["top1"] for seed in seeds or self.seeds]
        return Spread([float(value) for value in found])

    def with_run(self, *names: str) -> list[int]:
        """Return the seeds for which runs are finished."""
        return [seed for seed in self.seeds if all(self.runs.is_done(seed, name) for name in names)]

    # ------------------------------------------------------------------ tables

    def section(self) -> str:
        """Return the section as Markdown."""
        parts = [
            f"## {self.suite.title}, budget {self.name.split()[1]}",
            f"`{self.command}`\n\n{self._setting()}",
            "Top-1 in percent on the held-out set, mean ± standard deviation over seeds; gains are paired by seed.",
            self.probes(),
            self.fine_tuning(),
            self.tuning(),
            self.held_out(),
            self.controls(),
            self.charts(),
            *self.drawings(),
            self.times(),
        ]
        return "\n\n".join(part for part in parts if part)

    def _place(self, seed: int, made_on: Mapping[str, str]) -> str:
        """Return where, and by which revision, the runs of a seed were made."""
        names = self.runs.names(seed)
        places = [made_on[str(seed)]] if any(self.runs.known(seed, name) is not None for name in names) else []
        for name in names:
            if self.runs.known(seed, name) is None:
                places += where_made(self.runs, seed, name)
        return ", and ".join(dict.fromkeys(places))

    def _setting(self) -> str:
        places = dict.fromkeys(self.made_on.values())
        by_place = {place: [seed for seed, made in self.made_on.items() if made == place] for place in places}
        lines = [f"Seeds {', '.join(seeds)}: {place}." for place, seeds in by_place.items()]
        return "\n".join([*lines, f"[Settings, figures and curves of every run](evidence/{self.record.name})."])

    def probes(self) -> str:
        """Compare frozen features with those of a backbone with random weights."""
        rows = []
        for method in self.runs.methods:
            for labels in self.runs.budget.labels:
                name = f"{method.name}_probe"
                seeds = self.with_run(name)
                for kind in self.suite.all_probes() if seeds else ():
                    random, learned = (self.probe(name, labels, kind, weights, seeds) for weights in (RANDOM, GIVEN))
                    row = [random.shown(), learned.shown(), gain(learned - random)]
                    rows.append([method.title, labels.title, _shown(kind), *row])
        return _filled(["frozen features", "probe fitted to", "probe", "random", "pre-trained", "gain"], rows)

    def fine_tuning(self) -> str:
        """Compare fine-tuning with training from scratch."""
        rows = []
        for method in self.runs.methods:
            for labels in self.runs.budget.labels:
                arms = scratch(method), method.name
                names = [f"{arm}_{labels.folder}" for arm in arms]
                seeds = self.with_run(*names)
                if not seeds:
                    continue
                before, after = (self.tested(name, seeds) for name in names)
                settings = [self.runs.chosen(arm, labels) for arm in arms]
                cells = [
                    f"{found.shown()}{f' ({setting})' if setting else ''}"
                    for found, setting in zip((before, after), settings, strict=True)
                ]
                rows.append([method.title, labels.title, *cells, gain(after - before)])
        return _filled(["fine-tuning", "on", "from scratch", "pre-trained", "gain"], rows)

    def tuning(self) -> str:
        """Return what each setting of the grids reached on held-out training samples."""
        methods = self.runs.methods
        arms = dict.fromkeys(arm for method in methods for arm in (scratch(method), method.name))
        parts = []
        for labels in self.runs.budget.labels:
            runs = {arm: [tuning_run(arm, labels, number) for number in range(len(labels.grid))] for arm in arms}
            known = [arm for arm in arms if labels.grid and all(self.runs.is_done(0, name) for name in runs[arm])]
            rows = [[f"`{arm}`", *(f"{value:.1f}" for value in self.runs.tuned(arm, labels).values())] for arm in known]
            parts.append(_filled([f"held-out training samples, {labels.title}", *labels.grid], rows))
        return "\n\n".join(part for part in parts if part)

    def held_out(self) -> str:
        """Compare the held-out loss of pre-training with that of simple predictors."""
        rows = []
        for method in self.runs.methods:
            name = f"{method.name}_references"
            found = [self.runs.result(seed, name)["losses"] for seed in self.with_run(name)]
            if not found:
                continue
            row = [method.title]
            for key in (ZERO, MEAN, PLACE, RIDGE, MODEL):
                row.append(Spread([losses[key] for losses in found]).shown(".4f") if key in found[0] else "")
            part = Spread([100 * share(losses) for losses in found])
            rows.append([*row, "" if math.isnan(part.mean) else f"{part.shown('.0f')} %"])
        head = ["loss on held-out samples", "zero", "mean", "mean by place", "ridge regression", "model"]
        return _filled([*head, "share of what the regression finds"], rows)

    def controls(self) -> str:
        """Return the results of the controls, which should remove the gain."""
        rows = []
        for method in self.runs.methods:
            for control in CONTROLS:
                for labels in self.runs.budget.labels:
                    row = self._control(method, f"{method.name}_{control.name}", labels)
                    if row:
                        rows.append([f"{method.title}: {control.title}", labels.title, *row])
        head = ["control", "on", "seeds", "linear probe", "gain over random", "fine-tuning", "gain over scratch"]
        return _filled(head, rows)

    def _control(self, method: Method, name: str, labels: Labels) -> list[str]:
        empty = ["", ""]
        probed, tuned = self.with_run(f"{name}_probe"), self.with_run(f"{name}_{labels.folder}")
        if not probed and not tuned:
            return []
        row = [str(len(probed or tuned))]
        if probed:
            found = self.probe(f"{name}_probe", labels, "linear", seeds=probed)
            random = self.probe(f"{method.name}_probe", labels, "linear", RANDOM, probed)
            row += [found.shown(), (found - random).shown(sign="+")]
        else:
            row += empty
        if not tuned:
            return [*row, *empty]
        found, before = (self.tested(f"{arm}_{labels.folder}", tuned) for arm in (name, scratch(method)))
        return [*row, found.shown(), (found - before).shown(sign="+")]

    def times(self) -> str:
        """Return wall-clock and CPU minutes of each run."""
        names = sorted({name for seed in self.seeds for name in self.runs.names(seed)})
        rows = []
        for name in names:
            found = [self.runs.result(seed, name) for seed in self.with_run(name)]
            if found:
                clock, cpu = (Spread([run[key] / 60 for run in found]) for key in ("seconds", "cpu_seconds"))
                rows.append([f"`{name}`", str(len(found)), clock.shown(), cpu.shown()])
        for method in self.runs.methods:
            own = [name for name in names if _belongs(name, method)]
            folders = [labels.folder for labels in self.runs.budget.labels]
            seeds = self.with_run(*own, *(f"{arm}_{f}" for arm in (scratch(method), method.name) for f in folders))
            if not seeds:
                continue
            totals = [
                Spread([sum(self.runs.result(seed, name)[key] / 60 for name in own) for seed in seeds]).shown()
                for key in ("seconds", "cpu_seconds")
            ]
            rows.append([f"**{method.title}**, one seed without controls and grid", str(len(seeds)), *totals])
        return _filled(["run", "seeds", "wall-clock minutes", "CPU minutes"], rows)

    # ------------------------------------------------------------------ images

    def charts(self) -> str:
        """Draw the losses of pre-training and the top-1 accuracy of fine-tuning over epochs."""
        charts = []
        for method in self.runs.methods:
            seeds = self.with_run(method.name, f"{method.name}_references")
            if not seeds:
                continue
            held = Line("held-out", [self._curve(seed, method.name, "val_epoch", "loss") for seed in seeds])
            lines = [Line("training", [self._curve(seed, method.name, "train_iter", "loss") for seed in seeds])]
            for key, words in ((PLACE, "mean by place"), (RIDGE, "ridge regression")):
                lines.append(Line(words, [self._level(seed, method, key) for seed in seeds], level=True))
            charts.append(Chart(f"{method.title}: loss", "epoch of pre-training", [*lines, held]))
            for labels in self.runs.budget.labels:
                names = {
                    "pre-trained": f"{method.name}_{labels.folder}",
                    "from scratch": f"{scratch(method)}_{labels.folder}",
                }
                seeds = self.with_run(*names.values())
                found = [
                    Line(line, [self._curve(seed, name, "val_epoch", "top1") for seed in seeds])
                    for line, name in names.items()
                ]
                if seeds:
                    charts.append(Chart(f"{method.title}: top-1, {labels.title}", "epoch of fine-tuning", found))
        if not charts:
            return ""
        path = self.images / f"{self.name.replace(' ', '_')}_curves.png"
        chart_figure(charts, columns=1 + len(self.runs.budget.labels)).savefig(path)
        return f"![Curves](evidence/{path.name})"

    def _level(self, seed: int, method: Method, key: str) -> list[Point]:
        """Return a held-out loss that does not change, at the epochs of the validations."""
        value = self.runs.result(seed, f"{method.name}_references")["losses"][key]
        return [(epoch, value) for epoch, _ in self._curve(seed, method.name, "val_epoch", "loss")]

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
        """Draw predictions for held-out samples by the first and the last checkpoint of the first seed.

        Images of a published seed stay as they are.
        """
        shown = []
        for method in self.runs.methods:
            seeds = self.with_run(method.name)
            if not seeds:
                continue
            seed = seeds[0]
            found = self.runs.checkpoints(seed, method.name)
            for words, checkpoint in (("early", found[0]), ("late", found[-1])):
                epoch = int(re.findall(r"epoch_(\d+)", checkpoint.name)[0])
                title = f"{method.title}: {words}, after epoch {epoch}"
                path = self.images / f"{self.name.replace(' ', '_')}_{method.name}_{words}.png"
                if self.runs.known(seed, method.name) is None:
                    weights = ["TEST.CHECKPOINT_FILE_PATH", unexpanded_path(str(checkpoint))]
                    opts = [*self.runs.pretraining(method, seed, method.name), *weights]
                    drawn = drawing(load_config(CONFIGS / method.pretraining, opts), _PICTURED)
                    drawn.figure(title).quantize(128).save(path, optimize=True)
                shown.append(f"![{title}](evidence/{path.name})")
        return shown


def _belongs(name: str, method: Method) -> bool:
    """Return whether a run belongs to a method: its own runs and those of its family, not its controls or grids."""
    if TUNING in name or any(name.startswith(f"{method.name}_{control.name}") for control in CONTROLS):
        return False
    return name == method.name or name.startswith((f"{method.name}_", f"{method.family.name}_"))


def gain(spread: Spread) -> str:
    """Format a gain, with its size in standard errors where there are several seeds."""
    if len(spread.values) == 1:
        return spread.shown(sign="+")
    shown = spread.shown(sign="+")
    if spread.error < 1e-9:  # the same in every seed
        return shown
    return f"{shown} ({spread.mean / spread.error:+.1f} standard errors)"
