"""Frozen features on the disk: resumed extraction, samples that cannot be read, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskfeat.analysis.inputs import InputBatch
from maskfeat.analysis.probes import features
from maskfeat.analysis.probes.features import Stored, extract
from maskfeat.batch import BadSample
from maskfeat.engine import owner
from tests.small import REPO

SAMPLES, VIEWS, SIZE = 11, 2, 3
ASKED = {"weights": "abc", "views": (2, 1)}


class Source:
    """Batches of clips whose pixels say which view they are; it can break off, and notes what is asked for."""

    def __init__(self, fail_at: int = 99, bad: tuple[int, ...] = ()) -> None:
        self.fail_at, self.bad, self.shown = fail_at, bad, []  # type: ignore[var-annotated]

    def __call__(self, numbers: range) -> Iterator[InputBatch]:
        for number in numbers:
            if number == self.fail_at:
                raise KeyboardInterrupt
            self.shown.append(number)
            items = torch.arange(SAMPLES * VIEWS)[number * SIZE : (number + 1) * SIZE]
            index, view = items // VIEWS, items % VIEWS
            bad = tuple(BadSample(one, f"file {one}", "broken") for one in self.bad if one in index)
            yield InputBatch(index, view, (100.0 * index + view)[:, None].expand(-1, 3), bad)


def run(folder: Path, source: Source, **changes: Any) -> Stored:
    given: dict[str, Any] = {
        "asked": ASKED, "label": np.arange(SAMPLES) % 3, "views": VIEWS, "shape": (2,), "dtype": "float32",
        "batch_size": SIZE, "features": lambda clip: torch.stack([clip[:, 0], -clip[:, 1]], dim=1),
    }  # fmt: skip
    return extract(folder, "train", batches=source, **{**given, **changes})


def expected() -> np.ndarray:
    value = 100.0 * np.arange(SAMPLES)[:, None] + np.arange(VIEWS)
    return np.stack([value, -value], axis=2)


def test_every_view_is_where_it_belongs(tmp_path: Path) -> None:
    found = run(tmp_path, Source())
    assert isinstance(found.x, np.memmap) and found.x.dtype == np.float32 and not found.x.flags.writeable
    np.testing.assert_array_equal(found.x, expected())
    assert found.rows.tolist() == list(range(SAMPLES)) and not found.bad
    rows = np.array([7, 2, 9])
    np.testing.assert_array_equal(found.take(rows, 1), expected()[rows, 1])


@pytest.mark.parametrize("fail_at", [0, 1, 4, 7])
def test_an_interrupted_extraction_goes_on(tmp_path: Path, fail_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Source(fail_at, bad=(1,)))
    rest = Source(bad=(1,))
    found = run(tmp_path, rest)
    assert rest.shown == list(range(fail_at // 2 * 2, 8)), "what was saved is not computed again"
    np.testing.assert_array_equal(found.x, expected())
    assert found.rows.tolist() == [0, *range(2, SAMPLES)] and found.bad == {1: "file 1 (broken)"}
    again = Source()
    assert run(tmp_path, again).bad == found.bad and not again.shown, "all is there"


def test_what_is_left_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that is left is told from these numbers, and the live line ends where they meet."""
    made: list[features.Progress] = []

    class Noted(features.Progress):
        def __init__(self, what: str, total: int) -> None:
            super().__init__(what, total)
            made.append(self)

    monkeypatch.setattr(features, "_SAVE_EVERY", 2)
    monkeypatch.setattr(features, "Progress", Noted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Source(5))
    run(tmp_path, Source())
    assert [(one.done, one.total) for one in made] == [(5 * SIZE, 22), (22 - 4 * SIZE, 22 - 4 * SIZE)]


def test_one_command_at_a_time_writes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "WAIT", 0.1)
    program = "import sys, pathlib; from maskfeat.engine.owner import owned\nwith owned(pathlib.Path(sys.argv[1])):"
    command = [sys.executable, "-c", f"{program} print(flush=True); sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(ValueError, match=r"--features .* in use"):
            run(tmp_path, Source())
        other.communicate()
    assert len(run(tmp_path, Source()).rows) == SAMPLES


def test_features_of_something_else_are_refused(tmp_path: Path) -> None:
    run(tmp_path, Source())
    with pytest.raises(ValueError, match=r"has features of something else \(weights changed\): give another folder"):
        run(tmp_path, Source(), asked={**ASKED, "weights": "other"})
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train\.json cannot be read .*: remove"):
        run(tmp_path, Source())


def test_a_lost_file_of_features_begins_anew(tmp_path: Path) -> None:
    run(tmp_path, Source())
    (tmp_path / "train.npy").unlink()
    np.testing.assert_array_equal(run(tmp_path, Source()).x, expected())


def test_samples_that_cannot_be_read_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        run(tmp_path, Source(bad=(3, 5)))
    assert [record.getMessage() for record in caplog.records] == [
        "left out of train: file 3 (broken)",
        "left out of train: file 5 (broken)",
    ]
    with pytest.raises(ValueError, match=r"none of the 11 samples of train can be read; the first: file 0 \(broken\)"):
        run(tmp_path / "none", Source(bad=tuple(range(SAMPLES))))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_features_that_do_not_fit_the_type_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"NaN, infinite or above 6\.55e\+04|NaN, infinite or above 65504"):
        run(tmp_path, Source(), dtype="float16", features=lambda clip: torch.full((len(clip), 2), value))


def test_a_disk_that_is_too_small_is_said_before_any_work(tmp_path: Path) -> None:
    source = Source()
    with pytest.raises(ValueError, match=r"features of shape 11 x 2 x 100000000000000 take .* GiB .*--features"):
        run(tmp_path, source, shape=(10**14,))
    assert not source.shown and not list(tmp_path.glob("*.npy"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--features .* cannot be written"):
        run(tmp_path / "file" / "folder", Source())


def test_scale_is_that_of_the_samples_that_could_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_CHUNK", 7)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2, 5)) * np.array([1.0, 10.0, 1e-8, 0.0, 1.0]) + np.array([0, 1e4, 0, 3, -5])
    x[3] = np.nan
    rows = np.setdiff1d(np.arange(40), [3])
    mean, std = Stored(x.astype(np.float32), np.zeros(40), rows, {}).scale()
    known = x.astype(np.float32).astype(np.float64)[rows, 0]
    np.testing.assert_allclose(mean.numpy(), known.mean(axis=0), rtol=1e-6, atol=1e-6)
    truth = known.std(axis=0, ddof=1)
    np.testing.assert_allclose(std.numpy(), np.maximum(truth, truth.max() * 1e-3), rtol=1e-5)


def test_the_record_is_json_a_person_can_read(tmp_path: Path) -> None:
    run(tmp_path, Source(bad=(3,)))
    found = json.loads((tmp_path / "train.json").read_text())
    assert found == {"asked": {"weights": "abc", "views": [2, 1]}, "done": 8, "bad": {"3": "file 3 (broken)"}}
