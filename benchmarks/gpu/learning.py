"""Parts that train: the suites of the evidence (tools/evidence.py) at the budget of a GPU."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import LEARNING, Context, Failed, Figures, Part
from maskfeat.demos.evidence import make_data
from maskfeat.demos.evidence.runs import Runs, Stopped, run_seed, scratch
from maskfeat.demos.evidence.suites import SUITES
from maskfeat.engine.provenance import machine

REPO = Path(__file__).resolve().parents[2]
SHARED = "MASKFEAT_SHARED"  # in the environment: a folder with data/cifar10
KINDS = ("train_epoch", "val_epoch", "test_final")

TOY = (
    "SOLVER.MAX_EPOCH", "1", "SOLVER.WARMUP_EPOCHS", "0", "TRAIN.EVAL_PERIOD", "1", "TRAIN.CHECKPOINT_PERIOD", "1",
    "TRAIN.BATCH_SIZE", "4", "TEST.BATCH_SIZE", "4", "DATA_LOADER.NUM_WORKERS", "0", "NUM_GPUS", "0",
    "TRAIN.COMPILE", "False", "MVIT.EMBED_DIM", "16",
)  # fmt: skip


class NotedRuns(Runs):
    """Runs of a suite; what each has found is noted as soon as it is done."""

    context: Context

    def once(self, seed: int, name: str, asked: list[str], work: Callable[[], dict[str, Any]]) -> None:
        super().once(seed, name, asked, work)
        self.context.figures.setdefault("runs", {})[name] = {**self.result(seed, name), **self._last(seed, name)}
        self.context.note()

    def _last(self, seed: int, name: str) -> Figures:
        """The last metrics of each kind that a training run has logged."""
        if not (self.folder(seed, name) / "stdout.log").is_file():
            return {}
        stats = {kind: self.stats(seed, name, kind) for kind in KINDS}
        return {kind: found[-1] for kind, found in stats.items() if found}


def gains(runs: Runs, found: Figures) -> Figures:
    """Top-1 in percent, pre-trained against random weights (linear probe) and against training from scratch.

    Args:
        found: results of the runs by name; comparisons of runs that are not there are left out.
    """
    rows = []
    for method in runs.methods:
        for labels in runs.budget.labels:
            row = {"method": method.title, "on": labels.title}
            probe = found.get(f"{method.name}_probe", {}).get("probe", {}).get(labels.folder)
            if probe:
                before, after = (float(probe[weights]["linear"]) for weights in ("random", "given"))
                rows.append({**row, "what": "linear probe", "without": before, "with": after, "gain": after - before})
            trained = [found.get(f"{arm}_{labels.folder}") for arm in (scratch(method), method.name)]
            if all(trained):
                before, after = (float(run["test_final"]["top1"]) for run in trained if run)
                rows.append({**row, "what": "fine-tuning", "without": before, "with": after, "gain": after - before})
    return {"gains": rows}


def cifar10() -> Path | None:
    """CIFAR-10 as downloaded, where this machine has it."""
    folder = Path(os.environ.get(SHARED, REPO.parent / "shared")) / "data" / "cifar10"
    return folder if folder.is_dir() else None


def suite(name: str) -> Callable[[Context], Figures]:
    """All runs of a suite with one seed; what an earlier call has finished is not repeated."""

    def run(context: Context) -> Figures:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(context.data / "inductor"))
        data, source = context.data / f"evidence_{name}", cifar10() if name == "cifar10" else None
        if name == "cifar10" and source is None and not data.is_dir():
            context.not_run.append(f"CIFAR-10: {SHARED} names no folder with data/cifar10")
            return {}
        if not (data / "complete").is_file():
            make_data(name, data, source, (10, 2, 2) if context.toy else (400, 100, 100))
        runs = NotedRuns(SUITES[name], "gpu", context.data / "evidence", data, TOY if context.toy else ())
        runs.context = context
        context.note(machine=machine())
        try:
            run_seed(runs, 0, controls=not context.toy)
        except Stopped as stopped:
            raise Failed(f"a run ended with exit code {stopped.code}; its log says why") from stopped
        finally:
            context.note(**gains(runs, context.figures.get("runs", {})))
        return {}

    return run


PARTS: tuple[Part, ...] = (
    Part("learning from clips", LEARNING, 540, suite("shapes"), ("engine/provenance.py:machine",)),
    Part("learning from images", LEARNING, 540, suite("cifar10"), cuda=True),
)
