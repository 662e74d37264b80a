"""The runs of the evidence: each is a command of tools/run_net.py or a measurement of its weights.

An interrupted run continues where it stopped; a finished one is not repeated. The settings of a run are stored beside
its result, so that another budget or recipe in the same folder is refused.
"""

import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from maskfeat.analysis.probes.exact import features, linear_probe, nearest_neighbours
from maskfeat.build import build_loader, build_objective
from maskfeat.checkpoint.atomic import fsync_dir, write_and_fsync
from maskfeat.checkpoint.files import find_checkpoints, open_checkpoint
from maskfeat.checkpoint.reading import model_state
from maskfeat.config import load_config
from maskfeat.demos.commands import train_command
from maskfeat.demos.evidence.suites import CONFIGS, CONTROLS, Control, Method, Suite
from maskfeat.distributed.world import choose_device
from maskfeat.engine.metrics_log import last_json_stats, read_json_stats
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.run import main as run_net
from maskfeat.engine.trainer import precision_of
from maskfeat.errors import UserError, UserFileError
from maskfeat.objectives.maskfeat import MaskFeat

logger = logging.getLogger("maskfeat.evidence")

ASKED = "asked.json"
"""File in the folder of a run, written when it starts: its recipe and overrides."""
DONE = "done.json"
"""File written when a run is finished: wall-clock and CPU seconds, and what was measured."""
_MEAN_OF = 40
"""Number of training batches over which the mean HOG of the data set is computed."""


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
    """

    def __init__(self, suite: Suite, budget_name: str, root: Path, data: Path, opts: tuple[str, ...] = ()) -> None:
        self.suite, self.budget, self.data, self.opts = suite, suite.budgets[budget_name], data, opts
        self.root = root / f"{suite.name}_{budget_name}"

    @property
    def methods(self) -> list[Method]:
        """Methods of the suite that are run at this budget."""
        return [method for method in self.suite.methods if method.name in self.budget.pretraining]

    def folder(self, seed: int, name: str) -> Path:
        """Return the folder of one run."""
        return self.root / f"seed{seed}" / name

    def result(self, seed: int, name: str) -> dict[str, Any]:
        """Return the result of a finished run."""
        return dict(_read(self.folder(seed, name) / DONE))

    def is_done(self, seed: int, name: str) -> bool:
        return (self.folder(seed, name) / DONE).is_file()

    def stats(self, seed: int, name: str, kind: str) -> list[dict[str, Any]]:
        """Return the metrics of one kind that a training run logged."""
        return read_json_stats(self.folder(seed, name) / "stdout.log", kind)

    def last(self, seed: int, name: str, kind: str) -> dict[str, Any]:
        """Return the last metrics of one kind that a training run logged; UserFileError if there are none."""
        return last_json_stats(self.folder(seed, name) / "stdout.log", kind)

    def checkpoint(self, seed: int, name: str) -> Path:
        """Return the last checkpoint of a pre-training run."""
        return find_checkpoints(self.folder(seed, name), "pt")[-1]

    def _paths(self, seed: int, name: str, data: str) -> list[str]:
        paths = [*self._data(data), "OUTPUT_DIR", str(self.folder(seed, name))]
        return [*paths, "RNG_SEED", str(seed), *self.budget.opts]

    def _data(self, name: str) -> list[str]:
        """Return overrides for a folder of the suite's data; lists of clips refer to files in the unlabelled folder."""
        prefix = ["DATA.PATH_PREFIX", str(self.data / self.suite.unlabelled)] if self.suite.of_clips else []
        return ["DATA.PATH_TO_DATA_DIR", str(self.data / name), *prefix]

    def pretraining(self, method: Method, seed: int, name: str, control: Control | None = None) -> list[str]:
        """Return the overrides for a pre-training run."""
        own = (*self.budget.families.get(method.family.name, ()), *self.budget.pretraining[method.name])
        more = control.opts if control is not None and control.opts is not None else ()
        return [*self._paths(seed, name, self.suite.unlabelled), *own, *more, *self.opts]

    def fine_tuning(self, method: Method, seed: int, name: str, labels: str, weights: Path | None) -> list[str]:
        """Return the overrides for fine-tuning, or without weights for training from scratch."""
        own = (*self.budget.families.get(method.family.name, ()), *self.budget.fine_tuning.get(labels, ()))
        start = [] if weights is None else ["TRAIN.CHECKPOINT_FILE_PATH", str(weights)]
        return [*self._paths(seed, name, labels), *own, *start, *self.opts]

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

    def train(self, seed: int, name: str, config: str, opts: list[str]) -> None:
        """Run tools/run_net.py, which resumes an interrupted run."""

        def work() -> dict[str, Any]:
            logger.info("\n== %s, seed %d: %s\n   %s", self.suite.name, seed, name, train_command(config, opts))
            code = run_net(["--cfg", str(CONFIGS / config), *opts])
            if code:
                raise Stopped(code)
            return {}

        self.once(seed, name, [config, *opts], work)

    def probe(self, seed: int, name: str, method: Method, opts: list[str], weights: Path | None) -> None:
        """Probe a backbone (linear and kNN) for each set of labels; without weights, one with random weights."""

        def work() -> dict[str, Any]:
            logger.info("\n== %s, seed %d: %s", self.suite.name, seed, name)
            cfg = load_config(CONFIGS / method.pretraining, opts)
            device = choose_device(cfg.NUM_GPUS, 0)
            seed_everything(cfg.RNG_SEED)  # as at the start of a run: these are the initial weights of pre-training
            objective = build_objective(cfg)
            if weights is not None:
                objective.load_released_state(model_state(open_checkpoint(weights)))
            objective.to(device)
            found: dict[str, Any] = {}
            test = features(objective.backbone, self._plain(cfg, "val", device), device, precision_of(cfg.TRAIN))
            for labels in self.budget.labels.values():
                loader = self._plain(
                    load_config(CONFIGS / method.pretraining, [*opts, *self._data(labels)]), "train", device
                )
                train = features(objective.backbone, loader, device, precision_of(cfg.TRAIN))
                found[labels] = {
                    "linear": linear_probe(train, test),
                    "knn": nearest_neighbours(train, test),
                    "train": len(train.label),
                    "test": len(test.label),
                }
                logger.info("%s: linear %.2f %%, kNN %.2f %%", labels, found[labels]["linear"], found[labels]["knn"])
            return {"probe": found}

        self.once(seed, name, [method.pretraining, *opts, str(weights)], work)

    def _plain(self, cfg: CfgNode, split: str, device: torch.device) -> Any:
        return build_loader(cfg, split, device=device, plain=True)

    def references(self, seed: int, name: str, method: Method, opts: list[str]) -> None:
        """Measure the held-out loss of the model and of two constant predictors: zero, and the mean HOG of the training
        set, the latter also for each position, because borders differ from the centre.
        """

        def work() -> dict[str, Any]:
            logger.info("\n== %s, seed %d: %s", self.suite.name, seed, name)
            cfg = load_config(CONFIGS / method.pretraining, opts)
            objective = build_objective(cfg)
            if not isinstance(objective, MaskFeat):
                return {}
            objective.load_released_state(model_state(open_checkpoint(self.checkpoint(seed, method.name))))
            device = choose_device(cfg.NUM_GPUS, 0)
            return held_out(objective.to(device).eval(), cfg, device)

        self.once(seed, name, [method.pretraining, *opts], work)


@torch.no_grad()
def held_out(objective: MaskFeat, cfg: CfgNode, device: torch.device) -> dict[str, float]:
    """Return the mean squared error on hidden tokens of the validation set, for the model and constant predictors."""
    train = build_loader(cfg, "train", device=device)
    train.set_epoch(0)
    total, count = torch.zeros((), device=device), 0
    for number, batch in enumerate(train):
        if number == _MEAN_OF:
            break
        target = objective.target(batch.clip.to(device))
        total, count = total + target.sum(dim=0), count + len(target)
    by_position = total / count  # (tokens, F)
    overall = by_position.mean(dim=0)
    sums = {name: torch.zeros((), device=device) for name in ("model", "zero", "mean_hog", "mean_hog_of_place")}
    terms = 0
    for batch in build_loader(cfg, "val", device=device):
        batch = batch.to(device)
        prediction, target = objective.predict_hidden(batch)
        positions = objective.hidden_tokens(batch).nonzero()[:, 1]
        guesses = (prediction.float(), torch.zeros_like(target), overall, by_position[positions])
        for name, guess in zip(sums, guesses, strict=True):
            sums[name] += (guess - target).square().sum()
        terms += target.numel()
    return {name: float(value) / terms for name, value in sums.items()}


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


def without_backbone(source: Path, fresh: Mapping[str, torch.Tensor], target: Path) -> None:
    """Copy a pre-training checkpoint with the weights of its backbone replaced by those of `fresh`."""
    content = open_checkpoint(source)
    state = {name: fresh.get(name, value) for name, value in content["model_state"].items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": content["epoch"], "model_state": state, "cfg": content["cfg"]}, target)


def run_seed(runs: Runs, seed: int, controls: bool) -> None:
    """Run everything for one seed."""
    met: set[str] = set()
    for method in runs.methods:
        opts, family = runs.pretraining(method, seed, method.name), method.family.name
        runs.train(seed, method.name, method.pretraining, opts)
        weights = runs.checkpoint(seed, method.name)
        if family not in met:  # the first method's recipe names the size of its family's backbone
            runs.probe(seed, f"{family}_random_probe", method, opts, None)
            met.add(family)
        runs.probe(seed, f"{method.name}_probe", method, opts, weights)
        runs.references(seed, f"{method.name}_references", method, opts)
        for labels in runs.budget.labels.values():
            _fine_tune(runs, seed, method, f"{family}_scratch_{labels}", labels, None)
            _fine_tune(runs, seed, method, f"{method.name}_ft_{labels}", labels, weights)
        for control in CONTROLS if method.has_controls and controls else ():
            _control(runs, seed, method, control)


def _fine_tune(runs: Runs, seed: int, method: Method, name: str, labels: str, weights: Path | None) -> None:
    runs.train(seed, name, method.family.fine_tuning, runs.fine_tuning(method, seed, name, labels, weights))


def _control(runs: Runs, seed: int, method: Method, control: Control) -> None:
    name = f"{method.name}_{control.name}"
    if control.opts is None:
        for labels in runs.budget.labels.values():
            run, weights = f"{name}_ft_{labels}", runs.folder(seed, name) / f"{labels}.pyth"
            opts = runs.fine_tuning(method, seed, run, labels, weights)
            # As at the start of a run: the result must equal training from scratch if nothing else was loaded.
            seed_everything(seed)
            objective = build_objective(load_config(CONFIGS / method.family.fine_tuning, opts))
            fresh = {n: v for n, v in objective.released_state().items() if not n.startswith(("norm.", "head."))}
            without_backbone(runs.checkpoint(seed, method.name), fresh, weights)
            runs.train(seed, run, method.family.fine_tuning, opts)
        return
    opts = runs.pretraining(method, seed, name, control)
    runs.train(seed, name, method.pretraining, opts)
    weights = runs.checkpoint(seed, name)
    runs.probe(seed, f"{name}_probe", method, opts, weights)
    if runs.budget.fine_tune_controls:
        for labels in runs.budget.labels.values():
            _fine_tune(runs, seed, method, f"{name}_ft_{labels}", labels, weights)
