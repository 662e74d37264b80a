"""Trackers get every entry and picture, a resumed run goes on in the same ones, and none of them stops training."""

import csv
import importlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskfeat.engine import trackers
from maskfeat.engine.run import main
from maskfeat.engine.trackers import SINKS, About, Sink, Trackers, find_trackers
from tests.small import VIT_PT, images
from tests.worker import json_stats

PRETRAINING = ["--cfg", "masked_ssl/in1k_VIT_B_MaskFeat_PT", *VIT_PT, "TASK", "pt", "TRAIN.EVAL_PERIOD", "1"]
CONFIG = {"SOLVER.BASE_LR": 0.1, "TASK": "pt", "DATA.MEAN": [0.1, 0.2], **{f"A.B{n}": "x" * 900 for n in range(120)}}


def about(folder: Path) -> About:
    return About(folder, "pt", CONFIG)


def rows(folder: Path) -> list[list[str]]:
    with (folder / "pt_metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


class Fake(Sink):
    """A tracker that remembers what it was given; its class attributes say what fails: of "log", every other one."""

    made: list["Fake"] = []
    broken: tuple[str, ...] = ()
    seconds = 0.0

    def __init__(self, about: About, identity: str) -> None:
        self.identity, self.given = identity or f"run {len(self.made)}", list[Any]()
        self.made.append(self)
        self._fail("init")

    def _fail(self, what: str) -> None:
        time.sleep(self.seconds)
        if what in self.broken:
            raise RuntimeError(f"no network\nfor {what}")

    def log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        self.given.append((kind, dict(values), step))
        if len(self.given) % 2:
            self._fail("log")

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.given.append((name, picture.size, step))
        self._fail("picture")

    def close(self) -> None:
        self._fail("close")


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("maskfeat"), "propagate", True)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    made = type("Made", (Fake,), {"made": []})
    monkeypatch.setitem(SINKS, "wandb", (made, "csv"))
    return made


def test_a_run_and_its_continuation(image_data: Path, tmp_path: Path) -> None:
    """CSV and TensorBoard hold what the log holds."""
    opts = [*PRETRAINING, *images(image_data), "OUTPUT_DIR", str(tmp_path), "LOG.TRACKERS", "[csv, tensorboard]"]
    assert main(opts) == 0
    lines = rows(tmp_path)
    assert lines[0] == ["kind", "step", "name", "value"]
    losses = [float(value) for kind, _, name, value in lines[1:] if (kind, name) == ("train_iter", "loss")]
    assert losses == pytest.approx([float(entry["loss"]) for entry in json_stats(tmp_path, "train_iter")], rel=1e-6)
    assert [step for kind, step, name, _ in lines if (kind, name) == ("val_epoch", "loss")] == ["0", "1"]
    assert list((tmp_path / "tensorboard" / "pt").glob("events.*")), "TENSORBOARD.ENABLE is False here"
    (tmp_path / "checkpoints" / "pt_checkpoint_epoch_00002.pyth").unlink()
    assert main(opts) == 0
    assert rows(tmp_path)[: len(lines)] == lines and len(rows(tmp_path)) > len(lines)


def test_a_resumed_run_goes_on_in_the_same_run(tmp_path: Path, fake: type[Fake]) -> None:
    for resume in (False, True, False):
        found = Trackers(["wandb", "csv"], about(tmp_path))
        found.begin(resume)
        found.write("train_iter", {"loss": 1.0, "nan": float("nan"), "eta": "1:00", "n": 3}, 7)
        found.picture("predictions", Image.new("RGB", (4, 2)), 2)
        found.close()
    assert [made.identity for made in fake.made] == ["run 0", "run 0", "run 2"]
    assert fake.made[0].given == [("train_iter", {"loss": 1.0, "n": 3.0}, 7), ("predictions", (4, 2), 2)]
    assert (tmp_path / "trackers" / "pt_wandb").read_text() == "run 2\n"
    assert len(rows(tmp_path)) == 3, "the third run is a new one"


def test_tasks_that_share_a_folder_are_runs_of_their_own(tmp_path: Path, fake: type[Fake]) -> None:
    for task in ("pt", "ft", "pt", ""):
        found = Trackers(["wandb", "csv"], About(tmp_path, task, CONFIG))
        found.write("test_final", {"top1": 50.0}, 0)
        found.close()
    assert [made.identity for made in fake.made] == ["run 0", "run 1", "run 0", "run 3"]
    lengths = [len((tmp_path / name).read_text().splitlines()) for name in ("pt_metrics.csv", "ft_metrics.csv")]
    assert lengths == [3, 2] and (tmp_path / "metrics.csv").exists()


def test_a_test_beside_a_training_ends_another_run_than_that_of_the_training(tmp_path: Path, fake: type[Fake]) -> None:
    """What was cut short by a kill is a line of its own."""
    for beside in (False, True, False):
        found = Trackers(["wandb", "csv"], About(tmp_path, "pt", CONFIG, beside))
        found.write("test_final", {"top1": 50.0}, 0)
        found.close()
        with (tmp_path / "pt_metrics.csv").open("a") as file:
            file.write("test_fi")
    assert [made.identity for made in fake.made] == ["run 0", "run 1", "run 0"]
    assert [len(row) for row in rows(tmp_path)] == [4, 4, 1, 4, 1, 4, 1]
    assert About(tmp_path, "pt", CONFIG, True).title == f"{tmp_path.name} pt test"


@pytest.mark.parametrize("broken", [("init",), ("log",), ("picture",), ("close",), ("init", "log", "close")])
def test_one_that_fails_is_said_once_and_stops_nothing(
    broken: tuple[str, ...],
    tmp_path: Path,
    fake: type[Fake],
    heard: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake, "broken", broken)
    found = Trackers(["wandb", "csv"], about(tmp_path))
    for step in range(5):
        found.write("train_iter", {"loss": 1.0}, step)
    found.picture("predictions", Image.new("RGB", (4, 2)), 2)
    found.close()
    assert caplog.text.count(f"wandb (LOG.TRACKERS) failed (RuntimeError: no network for {broken[0]})") == 1
    assert len(rows(tmp_path)) == 6, "the other one has everything"


@pytest.mark.slow
def test_no_training_waits_for_one(
    tmp_path: Path, fake: type[Fake], heard: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "seconds", 0.5)
    monkeypatch.setattr(trackers, "_WAITING", 3)
    monkeypatch.setattr(trackers, "_PATIENCE", 1.0)
    found = Trackers(["wandb"], about(tmp_path))
    began = time.monotonic()
    for step in range(100):
        found.write("train_iter", {"loss": 1.0}, step)
    assert time.monotonic() - began < 0.4
    found.close()
    assert time.monotonic() - began < 3
    assert caplog.text.count("wandb (LOG.TRACKERS) is too slow") == 1
    assert caplog.text.count("wandb (LOG.TRACKERS) did not take everything within 1 s") == 1


def test_bad_input(
    image_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not known, and what is not installed: nothing is written."""
    monkeypatch.setitem(SINKS, "wandb", (Fake, "no_such_module"))
    opts = [*PRETRAINING, *images(image_data), "OUTPUT_DIR", str(tmp_path / "out")]
    for name, problem in (
        ("neptune", "LOG.TRACKERS must be one of 'tensorboard', 'csv', 'wandb', 'mlflow', 'trackio'; given "),
        ("wandb", "LOG.TRACKERS names wandb, which cannot be imported: pip install 'maskfeat[trackers]', or leave"),
    ):
        for dry in ([], ["--dry-run"]):
            caplog.clear()
            assert main([*opts, *dry, "LOG.TRACKERS", f"[csv, {name}]"]) == 2
            assert problem in caplog.text
    assert not (tmp_path / "out").exists()


def test_one_that_cannot_be_imported_is_refused(
    image_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written, and in a line that says why; where nobody asks for it, it is left alone."""
    (tmp_path / "broken_tracker.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SINKS, "wandb", (Fake, "broken_tracker"))
    find_trackers(["csv", "tensorboard"])
    opts = [*PRETRAINING, *images(image_data), "OUTPUT_DIR", str(tmp_path / "out")]
    assert main([*opts, "LOG.TRACKERS", "[csv, wandb]"]) == 2 and not (tmp_path / "out").exists()
    assert (
        "error: LOG.TRACKERS names wandb, whose package broken_tracker cannot be imported (ModuleNotFoundError: No "
        "module named 'no_such_module'): pip install 'maskfeat[trackers]', or leave it out"
    ) in caplog.text


def test_one_that_breaks_when_it_starts_is_a_warning(
    tmp_path: Path, heard: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Fake):
        def __init__(self, about: About, identity: str) -> None:
            importlib.import_module("no_such_module")

    monkeypatch.setitem(SINKS, "wandb", (Broken, "no_such_module"))
    found = Trackers(["wandb", "csv"], about(tmp_path))
    found.write("train_iter", {"loss": 1.0}, 0)
    found.close()
    assert "wandb (LOG.TRACKERS) failed (ModuleNotFoundError: No module named 'no_such_module')" in caplog.text
    assert len(rows(tmp_path)) == 2


def test_nothing_is_imported_unless_it_is_named() -> None:
    assert {module for _, module in SINKS.values()} == {"csv", "wandb", "mlflow", "trackio"}
    text = Path(trackers.__file__).read_text()
    assert not any(line.startswith(f"{word} {name}") for line in text.splitlines() for word in ("import", "from")
                   for name in ("wandb", "mlflow", "trackio"))  # fmt: skip


# ------------------------------------------------------------------------- read back


def twice(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run and its continuation; its identity. Where other work runs on the machine, W&B needs a minute to start."""
    monkeypatch.setattr(trackers, "_PATIENCE", 300.0)
    for resume, steps in ((False, (0, 1)), (True, (1, 2))):
        found = Trackers([name], about(folder))
        found.begin(resume)
        for step in steps:
            found.write("train_iter", {"loss": 1.0 + step}, step)
        found.write("val_epoch", {"top1": 50.0}, 0)
        found.picture("predictions", Image.new("RGB", (4, 2)), 0)
        found.close()
    return (folder / "trackers" / f"pt_{name}").read_text().strip()


def quiet(caplog: pytest.LogCaptureFixture) -> bool:
    return "LOG.TRACKERS" not in caplog.text


@pytest.mark.slow
def test_mlflow(tmp_path: Path, heard: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    identity = twice("mlflow", tmp_path, monkeypatch)
    client = importlib.import_module("mlflow").MlflowClient((tmp_path / "mlruns").as_uri())
    run = client.get_run(identity)
    assert quiet(caplog) and run.info.status == "FINISHED"
    assert run.data.params["SOLVER.BASE_LR"] == "0.1" and len(run.data.params) == len(CONFIG)
    history = client.get_metric_history(identity, "train_iter/loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 2.0), (1, 2.0), (2, 3.0)]
    assert [file.path for file in client.list_artifacts(identity, "pictures")] == ["pictures/predictions_00001.png"]


@pytest.mark.slow
def test_wandb_offline(
    tmp_path: Path, heard: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    identity = twice("wandb", tmp_path, monkeypatch)
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert quiet(caplog) and len(files) == 2, "one for each time that it ran"
    text = b"".join(path.read_bytes() for path in files)  # records of protobuf, not compressed
    for part in (b"train_iter/loss", b"train_iter/step", b"val_epoch/top1", b"pictures/predictions", b"SOLVER.BASE_LR"):
        assert part in text, part


@pytest.mark.slow
def test_trackio(
    tmp_path: Path, heard: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    identity = twice("trackio", tmp_path, monkeypatch)
    assert quiet(caplog)
    (file,) = (tmp_path / "trackio").glob("*.db")
    database = importlib.import_module("sqlite3").connect(file)
    found = [
        json.loads(text) for (text,) in database.execute("select metrics from metrics where run_name = ?", [identity])
    ]
    assert [entry["train_iter/loss"] for entry in found if "train_iter/loss" in entry] == [1.0, 2.0, 2.0, 3.0]
