"""The runs of the evidence: each is a command of tools/run_net.py or a measurement of its weights.

An interrupted run continues where it stopped; a finished one is not repeated. The settings of a run are stored beside
its result, so that another budget or recipe in the same folder is refused.
"""

import json
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskfeat.analysis.model import load_model
from maskfeat.analysis.probes.command import GIVEN, RANDOM, block_numbers, randomised
from maskfeat.analysis.probes.data import find_splits
from maskfeat.analysis.probes.probe import Probing
from maskfeat.analysis.references import references_of
from maskfeat.build import build_objective
from maskfeat.checkpoint.atomic import fsync_dir, write_and_fsync
from maskfeat.checkpoint.files import find_checkpoints, open_checkpoint
from maskfeat.config import load_config
from maskfeat.demos.commands import train_command
from maskfeat.demos.evidence.suites import CONFIGS, CONTROLS, GRAY, Control, Labels, Method, Suite
from maskfeat.distributed.world import choose_device
from maskfeat.engine.metrics_log import last_json_stats, read_json_stats
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.run import main as run_net
from maskfeat.errors import UserError, UserFileError
from maskfeat.file_io import unexpanded_path

logger = logging.getLogger("maskfeat.evidence")

ASKED = "asked.json"
"""File in the folder of a run, written when it starts: its recipe and overrides."""
DONE = "done.json"
"""File written when a run is finished: wall-clock and CPU seconds, and what was measured."""
SCRATCH, TUNING = "scratch", "_tuning_"

Published = dict[str, dict[str, dict[str, Any]]]
"""What `maskfeat.demos.evidence.record` keeps of a run, by seed (as text) and by its name."""


class Stopped(RuntimeError):
    """A run ended with an exit code other than 0."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


class Runs:
    """All runs of a suite at a budget.

    Args:
        suite: the suite.
        budget_name: the name of its budget.
        root: runs are written to <root>/<suite>_<budget>/seed<N>/<run>.
        data: the folder that holds the suite's data.
        opts: overrides that the user gave, for every run.
        published: what was published of runs that count as finished without their folders.
    """

    def __init__(
        self,
        suite: Suite,
        budget_name: str,
        root: Path,
        data: Path,
        opts: tuple[str, ...] = (),
        published: Published | None = None,
    ) -> None:
        self.suite, self.budget, self.data, self.opts = suite, suite.budgets[budget_name], data, opts
        self.root = root / f"{suite.name}_{budget_name}"
        self.published = published or {}

    @property
    def methods(self) -> list[Method]:
        """Methods of the suite that are run at this budget."""
        return [method for method in self.suite.methods if method.name in self.budget.pretraining]

    def folder(self, seed: int, name: str) -> Path:
        """Return the folder of one run."""
        return self.root / f"seed{seed}" / name

    def known(self, seed: int, name: str) -> dict[str, Any] | None:
        """Return what was published of a run, where that stands for its folder; None = it does not."""
        if (self.folder(seed, name) / DONE).is_file():
            return None
        return self.published.get(str(seed), {}).get(name)

    def result(self, seed: int, name: str) -> dict[str, Any]:
        """Return the result of a finished run."""
        known = self.known(seed, name)
        return dict(_read(self.folder(seed, name) / DONE) if known is None else known["done"])

    def is_done(self, seed: int, name: str) -> bool:
        """Return whether a run is finished, here or as it was published."""
        return self.known(seed, name) is not None or (self.folder(seed, name) / DONE).is_file()

    def stats(self, seed: int, name: str, kind: str) -> list[dict[str, Any]]:
        """Return the metrics of one kind that a training run logged."""
        known = self.known(seed, name)
        if known is not None:
            return list(known["stats"].get(kind, []))
        return read_json_stats(self.folder(seed, name) / "stdout.log", kind)

    def last(self, seed: int, name: str, kind: str) -> dict[str, Any]:
        """Return the last metrics of one kind that a training run logged; UserFileError if there are none."""
        if self.known(seed, name) is not None:
            return self.stats(seed, name, kind)[-1]
        return last_json_stats(self.folder(seed, name) / "stdout.log", kind)

    def checkpoints(self, seed: int, name: str) -> list[Path]:
        """Return the checkpoints of a pre-training run, the first one first; published runs do not have the files."""
        known = self.known(seed, name)
        if known is not None:
            return [self.folder(seed, name) / "checkpoints" / file for file in known["checkpoints"]]
        return find_checkpoints(self.folder(seed, name), "pt")

    def checkpoint(self, seed: int, name: str) -> Path:
        """Return the last checkpoint of a pre-training run."""
        return self.checkpoints(seed, name)[-1]

    def names(self, seed: int) -> list[str]:
        """Return the names of the finished runs of a seed."""
        here = (path.parent.name for path in (self.root / f"seed{seed}").glob(f"*/{DONE}"))
        return sorted({*here, *self.published.get(str(seed), {})})

    def portable(self, asked: list[str]) -> list[str]:
        """Return a recipe and its overrides without the folders of this machine."""
        named = ((str(self.root), "RUNS"), (str(self.data), "DATA"))
        folders = [(form(path), name) for path, name in named for form in (unexpanded_path, str)]

        def shown(text: str) -> str:
            within = next((pair for pair in folders if f"{text}/".startswith(f"{pair[0]}/")), None)
            return text if within is None else f"{within[1]}{text.removeprefix(within[0])}"

        return [shown(text) for text in asked]

    def asked(self, seed: int, name: str) -> list[str]:
        """Return recipe and overrides of a run that has started, as `portable`."""
        known = self.known(seed, name)
        return self.portable(_read(self.folder(seed, name) / ASKED)) if known is None else list(known["asked"])

    def _paths(self, seed: int, name: str, data: str) -> list[str]:
        paths = [*self._data(data), "OUTPUT_DIR", unexpanded_path(str(self.folder(seed, name)))]
        return [*paths, "RNG_SEED", str(seed), *self.budget.opts]

    def _data(self, name: str) -> list[str]:
        """Return overrides for a folder of the suite's data; lists of clips refer to files in the unlabelled folder."""
        data, unlabelled = (unexpanded_path(str(self.data / folder)) for folder in (name, self.suite.unlabelled))
        prefix = ["DATA.PATH_PREFIX", unlabelled] if self.suite.relative_lists else []
        return ["DATA.PATH_TO_DATA_DIR", data, *prefix]

    def pretraining(self, method: Method, seed: int, name: str, control: Control | None = None) -> list[str]:
        """Return the overrides for a pre-training run."""
        own = (*self.budget.families.get(method.family.name, ()), *self.budget.pretraining[method.name])
        more = control.opts if control is not None and control.opts is not None else ()
        return [*self._paths(seed, name, self.suite.unlabelled), *own, *more, *self.opts]

    def fine_tuning(
        self, method: Method, seed: int, name: str, labels: Labels, weights: Path | None, setting: tuple[str, ...]
    ) -> list[str]:
        """Return the overrides for fine-tuning, or without weights for training from scratch.

        Args:
            setting: one of the grid of `labels`; for a run that compares them, with its own data.
        """
        own = (*self.budget.families.get(method.family.name, ()), *labels.opts, *setting)
        start = [] if weights is None else ["TRAIN.CHECKPOINT_FILE_PATH", unexpanded_path(str(weights))]
        return [*self._paths(seed, name, labels.folder), *own, *start, *self.opts]

    def tuned(self, arm: str, labels: Labels) -> dict[str, float]:
        """Return the top-1 accuracies of the settings of a grid on held-out training samples, by name."""
        return {
            name: float(self.last(0, tuning_run(arm, labels, number), "test_final")["top1"])
            for number, name in enumerate(labels.grid)
        }

    def chosen(self, arm: str, labels: Labels) -> str:
        """Return the name of the best setting of a grid, the first one of equals; "" where there is no grid."""
        found = self.tuned(arm, labels)
        return max(found, key=found.__getitem__) if found else ""

    def once(self, seed: int, name: str, asked: list[str], work: Callable[[], dict[str, Any]]) -> None:
        """Run `work` unless the run is finished, and store its result and its duration, earlier attempts included.

        Args:
            seed, name: of the run.
            asked: its recipe and overrides.
            work: does the run and returns what it measured.

        Raises:
            UserError: the run was started with other overrides.
        """
        folder = self.folder(seed, name)
        known = self.known(seed, name)
        if known is not None:
            if known["asked"] != self.portable(asked):
                raise UserError(
                    f"seed {seed} of {name} was published with other settings: {shlex.join(known['asked'])}; now asked "
                    f"for: {shlex.join(self.portable(asked))}. Leave out --add to run all seeds anew"
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        begun = folder / ASKED
        given = _read(begun) if begun.is_file() else asked
        if given != asked:
            raise UserError(
                f"{folder} was made with other settings: {shlex.join(given)}; now asked for: {shlex.join(asked)}. Give "
                "another --output, or remove that folder"
            )
        if self.is_done(seed, name):
            return
        _write(begun, asked)
        with _timed(folder) as spent:
            found = work()
        _write(folder / DONE, {**spent, **found})

    def train(
        self, seed: int, name: str, config: str, opts: list[str], prepare: Callable[[], None] = lambda: None
    ) -> None:
        """Run tools/run_net.py, which resumes an interrupted run; before that, `prepare` what it reads."""

        def work() -> dict[str, Any]:
            prepare()
            logger.info("\n== %s, seed %d: %s\n   %s", self.suite.name, seed, name, train_command(config, opts))
            code = run_net(["--cfg", str(CONFIGS / config), *opts])
            if code:
                raise Stopped(code)
            return {}

        self.once(seed, name, [config, *opts], work)

    def probe(self, seed: int, name: str, method: Method, weights: Path, random: bool = True) -> None:
        """Probe frozen features for each set of labels; with `random`, also those of random weights.

        These are the initial weights of the pre-training with this seed.
        """

        def work() -> dict[str, Any]:
            logger.info("\n== %s, seed %d: %s", self.suite.name, seed, name)
            cfg = load_config(CONFIGS / method.pretraining, self.pretraining(method, seed, method.name))
            model = load_model(weights, device=choose_device(cfg.NUM_GPUS, 0))
            blocks = block_numbers(self.suite.blocks, len(model.backbone.repeated_blocks()))
            networks = {GIVEN: model, **({RANDOM: randomised(model, seed)} if random else {})}
            found: dict[str, Any] = {}
            for labels in self.budget.labels:
                prefix = str(self.data / self.suite.unlabelled) if self.suite.relative_lists else ""
                splits = find_splits(str(self.data / labels.folder), model.media, prefix)
                found[labels.folder] = {}
                for label, network in networks.items():
                    with tempfile.TemporaryDirectory(prefix="maskfeat-probe-") as folder:
                        colour = Probing(
                            network, label, splits, Path(folder), blocks, seed=seed, workers=cfg.DATA_LOADER.NUM_WORKERS
                        )
                        gray = replace(colour, gray=True)
                        results = {
                            name: (gray if name.endswith(GRAY) else colour).run(name.removesuffix(GRAY))
                            for name in self.suite.all_probes()
                        }
                    found[labels.folder][label] = {kind: result.top1 for kind, result in results.items()}
                    shown = ", ".join(f"{kind} {result.top1:.1f} %" for kind, result in results.items())
                    logger.info("%s, %s weights: %s", labels.title, label, shown)
            return {"probe": found}

        self.once(seed, name, [method.pretraining, str(weights), str(random)], work)

    def references(self, seed: int, name: str, method: Method, opts: list[str]) -> None:
        """Measure the held-out loss of the model and of simple predictors, see `maskfeat.analysis.references`."""

        def work() -> dict[str, Any]:
            logger.info("\n== %s, seed %d: %s", self.suite.name, seed, name)
            cfg = load_config(CONFIGS / method.pretraining, opts)
            return {"losses": references_of(self.checkpoint(seed, method.name), cfg)}

        self.once(seed, name, [method.pretraining, *opts], work)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserFileError(
            f"{path} cannot be read ({error}): delete {path.parent} and give the same command again"
        ) from error


def _write(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    draft = path.with_name(f".{path.name}.part")
    write_and_fsync(draft, (json.dumps(content, indent=1) + "\n").encode())
    os.replace(draft, path)
    fsync_dir(path.parent)


@contextmanager
def _timed(folder: Path) -> Iterator[dict[str, float]]:
    """Measure wall-clock and CPU seconds (of this process and its children) over all attempts at a run."""
    path = folder / "attempts.json"
    spent = _read(path) if path.is_file() else {"seconds": 0.0, "cpu_seconds": 0.0}
    clock, before = time.monotonic(), sum(os.times()[:4])
    try:
        yield spent
    finally:
        spent["seconds"] += time.monotonic() - clock
        spent["cpu_seconds"] += sum(os.times()[:4]) - before
        _write(path, spent)


def _without_backbone(source: Path, fine_tuning: str, opts: list[str], seed: int, target: Path) -> None:
    """Copy a pre-training checkpoint with the weights of its backbone replaced by those of training from scratch."""
    # As at the start of a run: the result must equal training from scratch if nothing else was loaded.
    seed_everything(seed)
    objective = build_objective(load_config(CONFIGS / fine_tuning, opts))
    fresh = {n: v for n, v in objective.released_state().items() if not n.startswith(("norm.", "head."))}
    content = open_checkpoint(source)
    state = {name: fresh.get(name, value) for name, value in content["model_state"].items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": content["epoch"], "model_state": state, "cfg": content["cfg"]}, target)


def tuning_run(arm: str, labels: Labels, number: int) -> str:
    """Return the name of the run that tries setting `number` of the grid of `labels`.

    Args:
        arm: name of a method, or of a family's training from scratch.
    """
    return f"{arm}{TUNING}{labels.folder}_{number}"


def scratch(method: Method) -> str:
    """Return the name of training the backbone of a method from scratch, which its family shares."""
    return f"{method.family.name}_{SCRATCH}"


def run_seed(runs: Runs, seed: int, controls: bool) -> None:
    """Run everything for one seed. Settings are chosen once, by seed 0, which is run first."""
    for method in runs.methods:
        opts = runs.pretraining(method, seed, method.name)
        runs.train(seed, method.name, method.pretraining, opts)
        weights = runs.checkpoint(seed, method.name)
        runs.probe(seed, f"{method.name}_probe", method, weights)
        runs.references(seed, f"{method.name}_references", method, opts)
        for labels in runs.budget.labels:
            for arm, start in ((scratch(method), None), (method.name, weights)):
                if seed == 0:
                    _tune(runs, method, arm, labels, start)
                _fine_tune(runs, seed, method, arm, f"{arm}_{labels.folder}", labels, start)
        for control in CONTROLS if method.has_controls and controls else ():
            _control(runs, seed, method, control)


def _tune(runs: Runs, method: Method, arm: str, labels: Labels, weights: Path | None) -> None:
    """Try each setting of a grid on a part of the training samples; the others of them are its test."""
    for number, setting in enumerate(labels.grid.values()):
        name = tuning_run(arm, labels, number)
        part = replace(labels, folder=labels.tuning)
        runs.train(0, name, method.family.fine_tuning, runs.fine_tuning(method, 0, name, part, weights, setting))


def _fine_tune(
    runs: Runs, seed: int, method: Method, arm: str, name: str, labels: Labels, weights: Path | None
) -> None:
    setting = labels.grid.get(runs.chosen(arm, labels), ())
    opts = runs.fine_tuning(method, seed, name, labels, weights, setting)
    runs.train(seed, name, method.family.fine_tuning, opts)


def _control(runs: Runs, seed: int, method: Method, control: Control) -> None:
    name = f"{method.name}_{control.name}"
    if control.opts is None:
        for labels in runs.budget.labels:
            run, weights = f"{name}_{labels.folder}", runs.folder(seed, name) / f"{labels.folder}.pyth"
            setting = labels.grid.get(runs.chosen(scratch(method), labels), ())
            opts = runs.fine_tuning(method, seed, run, labels, weights, setting)
            source = runs.checkpoint(seed, method.name)
            prepare = partial(_without_backbone, source, method.family.fine_tuning, opts, seed, weights)
            runs.train(seed, run, method.family.fine_tuning, opts, prepare)
        return
    runs.train(seed, name, method.pretraining, runs.pretraining(method, seed, name, control))
    weights = runs.checkpoint(seed, name)
    runs.probe(seed, f"{name}_probe", method, weights, random=False)
    if runs.budget.fine_tune_controls:
        for labels in runs.budget.labels:
            _fine_tune(runs, seed, method, method.name, f"{name}_{labels.folder}", labels, weights)
