"""Trackers of experiments that a run reports to: Weights & Biases, MLflow, Trackio, a CSV file (LOG.TRACKERS).

Each works in a thread of its own, so that no network and no disk holds up training. What fails there is a warning.
"""

import csv
import importlib
import logging
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from maskfeat.errors import UserError
from maskfeat.file_io import is_cut_short, replace_text

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
PROJECT = "maskfeat"
FOLDER = "trackers"
"""In OUTPUT_DIR, a file for each tracker: which of its runs this run is, so that a resumed one goes on in it."""

_KINDS = ("train_iter", "val_epoch", "test_final", "test_final_ema", "pictures")
_WAITING = 10_000
"""Entries that may wait for a tracker; more are left out."""
_PATIENCE = 30.0
"""Seconds for which the end of a run waits for its trackers."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run.

    Attributes:
        folder: OUTPUT_DIR.
        task: TASK, which may share the folder with others.
        config: by full key.
        beside: whether it is a test of a training that goes on in another process.
    """

    folder: Path
    task: str
    config: Mapping[str, object]
    beside: bool = False

    @property
    def title(self) -> str:
        """What people call the run."""
        return " ".join(filter(None, (self.folder.resolve().name, self.task, "test" * self.beside)))

    def path(self, name: str) -> Path:
        """A file in OUTPUT_DIR, of this TASK alone."""
        path = self.folder / name
        return path.with_name(f"{self.task}_{path.name}") if self.task else path


class Sink:
    """A run in a tracker. Made and used in one thread; whatever is raised there is a warning.

    Args:
        about: the run.
        identity: of the run in the tracker that it goes on in; "" = a new one.

    Attributes:
        identity: of the run in the tracker.
        shared: whether two processes may write to one run; else a test has one of its own beside a training.
    """

    identity: str
    shared = False

    def __init__(self, about: About, identity: str) -> None:
        raise NotImplementedError

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name; `step` counts steps for "train_iter", and epochs for "val_epoch"."""

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Write a picture."""

    def close(self) -> None:
        """Finish the run."""


class _Csv(Sink):
    """OUTPUT_DIR/[TASK_]metrics.csv, one value a line."""

    shared = True

    def __init__(self, about: About, identity: str) -> None:
        path = about.path("metrics.csv")
        goes_on = bool(identity) and path.exists()
        self._file = path.open("a" if goes_on else "w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if goes_on and is_cut_short(path):
            self._file.write("\n")
        if not goes_on:
            self._writer.writerow(["kind", "step", "name", "value"])
        self.identity = path.name

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        self._writer.writerows([kind, step, name, value] for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Wandb(Sink):
    """A run of Weights & Biases, or of a library with its interface. Every kind of entry has its own steps."""

    def __init__(self, about: About, identity: str) -> None:
        import wandb

        if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.api.api_key:
            raise UserError("nobody is logged in: wandb login, WANDB_API_KEY, or WANDB_MODE=offline")
        self.identity = identity or uuid.uuid4().hex[:12]
        self._image: Callable[[Image.Image], Any] = wandb.Image
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.identity,
            resume="allow",
            name=about.title,
            dir=str(about.folder),
            config=dict(about.config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        for kind in _KINDS:
            self._run.define_metric(f"{kind}/step")
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")

    def log(self, kind: str, values: Mapping[str, Any], step: int) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()} | {f"{kind}/step": step})

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.log("pictures", {name: self._image(picture)}, step)

    def close(self) -> None:
        self._run.finish()


class _Trackio(_Wandb):
    """A run of Trackio, on this machine (TRACKIO_DIR) or on a Space (TRACKIO_SPACE_ID)."""

    def __init__(self, about: About, identity: str) -> None:
        import trackio

        self.identity = identity or f"{about.title} {uuid.uuid4().hex[:6]}"
        self._image = trackio.Image
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.identity,
            config={key: str(value) for key, value in about.config.items()},
            resume="allow",
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            embed=False,
        )


class _Mlflow(Sink):
    """A run of MLflow, at MLFLOW_TRACKING_URI, or in OUTPUT_DIR/mlruns."""

    def __init__(self, about: About, identity: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # refused since MLflow 3.7, but still there
        local = (about.folder.resolve() / "mlruns").as_uri()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        self._metric, self.identity = Metric, identity
        if identity:
            self._client.update_run(identity, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.identity = self._client.create_run(experiment, run_name=about.title).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in about.config.items()]
        for start in range(0, len(params), 100):  # as many as it takes at once
            self._client.log_batch(self.identity, params=params[start : start + 100])

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(f"{kind}/{name}", value, now, step) for name, value in values.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._client.log_image(self.identity, picture, artifact_file=f"pictures/{name}_{step + 1:05d}.png")

    def close(self) -> None:
        self._client.set_terminated(self.identity)


SINKS: dict[str, tuple[type[Sink], str]] = {
    "csv": (_Csv, "csv"),
    "wandb": (_Wandb, "wandb"),
    "mlflow": (_Mlflow, "mlflow"),
    "trackio": (_Trackio, "trackio"),
}
"""By name in LOG.TRACKERS: the class, and the module that it needs."""
_INSTALL = "pip install 'maskfeat[trackers]', or leave it out"


def find_trackers(names: Sequence[str]) -> None:
    """Check that the packages of these trackers, and of no others, can be imported.

    Raises:
        UserError: one of them cannot.
    """
    missing = [name for name in names if name in SINKS and find_spec(SINKS[name][1]) is None]
    if missing:
        what = f"LOG.TRACKERS names {', '.join(missing)}, which cannot be imported"
        raise UserError(f"{what}: {_INSTALL}")
    for name in names:
        if name in SINKS:
            _import(name)


def _import(name: str) -> None:
    """Import the package of a tracker, which may be there and still not work, such as with another protobuf."""
    package = SINKS[name][1]
    try:
        importlib.import_module(package)
    except Exception as error:  # a package may raise anything
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        what = f"LOG.TRACKERS names {name}, whose package {package} cannot be imported ({cause})"
        raise UserError(f"{what}: {_INSTALL}") from error


class _Worker:
    """A tracker and its thread.

    Args:
        name: of the tracker.
        start: makes its sink; called in the thread.
    """

    def __init__(self, name: str, start: Callable[[], Sink]) -> None:
        self._name, self._start = name, start
        self._queue = queue.SimpleQueue[Callable[[Sink], None] | None]()
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, what: Callable[[Sink], None]) -> None:
        """Let the thread do this; it is left out where too much waits already."""
        if self._queue.qsize() < _WAITING:
            self._queue.put(what)
        else:
            self._warn("is too slow: entries are left out there")

    def end(self) -> None:
        """Let the thread finish."""
        self._queue.put(None)

    def wait(self, until: float) -> None:
        """Wait for the thread; `until`: a time of `time.monotonic`."""
        self._thread.join(max(until - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._warn(f"did not take everything within {_PATIENCE:g} s")

    def _warn(self, what: str, cause: str = "") -> None:
        """Say this once, whatever the cause."""
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s (LOG.TRACKERS) %s%s", self._name, what, cause)

    def _try(self, what: Callable[[], Any]) -> Any:
        """Do this. A tracker may raise anything, and none of it is a reason to stop training."""
        try:
            return what()
        except Exception as error:
            self._warn("failed", f" ({type(error).__name__}: {' '.join(str(error).split())[:300]})")

    def _work(self) -> None:
        sink = self._try(self._start)
        while (what := self._queue.get()) is not None:
            if sink is not None:
                self._try(partial(what, sink))
        if sink is not None:
            self._try(sink.close)


class Trackers:
    """The trackers of a run. They start with the first entry, or when training begins.

    Args:
        names: in LOG.TRACKERS.
        about: the run.
    """

    def __init__(self, names: Sequence[str], about: About) -> None:
        self._names, self._about = [name for name in names if name in SINKS], about
        self._workers: list[_Worker] | None = None
        for name in self._names:
            # Here, and not in their threads: a data worker that is forked during an import may wait for it forever.
            with suppress(Exception):  # the thread meets it again, and says so
                importlib.import_module(SINKS[name][1])

    def begin(self, resume: bool) -> None:
        """Start them, in the runs of before if this one resumes, else in new ones."""
        if self._workers is None:
            self._workers = [_Worker(name, partial(_sink, name, self._about, resume)) for name in self._names]

    def write(self, kind: str, stats: Mapping[str, Any], step: int) -> None:
        """Write the finite numbers of an entry."""
        numbers = {name: float(v) for name, v in stats.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._put(lambda sink: sink.log(kind, numbers, step))

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Write a picture."""
        self._put(lambda sink: sink.picture(name, picture, step))

    def close(self) -> None:
        """Wait for them, a while, and finish their runs."""
        until = time.monotonic() + _PATIENCE
        for worker in self._workers or ():
            worker.end()
        for worker in self._workers or ():
            worker.wait(until)

    def _put(self, what: Callable[[Sink], None]) -> None:
        self.begin(resume=True)
        for worker in self._workers or ():
            worker.put(what)


def _sink(name: str, about: About, resume: bool) -> Sink:
    kind = SINKS[name][0]
    if about.beside and not kind.shared:  # its end would be that of the training there
        return kind(about, "")
    path, known = about.path(f"{FOLDER}/{name}"), ""
    if resume:
        with suppress(OSError):
            known = path.read_text(encoding="utf-8", errors="replace").strip()
    sink = kind(about, known)
    path.parent.mkdir(exist_ok=True)
    replace_text(path, f"{sink.identity}\n")
    return sink
