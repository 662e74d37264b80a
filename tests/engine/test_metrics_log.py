"""What is written for people and for scripts: no line is lost to an encoding, none stops a run, none is read twice."""

import io
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskfeat.distributed.world import World
from maskfeat.engine.log_handlers import LogFile
from maskfeat.engine.metrics_log import MetricsLog, last_json_stats, logged_to_file, read_json_stats, setup_logging
from maskfeat.errors import UserFileError
from tests.small import REPO

NAMES = ["r\xe9sum\xe9.jpg", "\u56fe.jpg", os.fsdecode(b"caf\xe9.jpg"), "a\nb.jpg"]


@contextmanager
def full() -> Iterator[None]:
    """No file grows any more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_any_name_is_logged(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    setup_logging(World())
    with logged_to_file(tmp_path):
        for number, name in enumerate(NAMES):
            logging.getLogger("maskfeat.test").warning("bad sample %d: %s", number, name)
    shown = screen.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    written = (tmp_path / "stdout.log").read_text(encoding="utf-8")
    for text in (shown, written):
        assert [f"bad sample {number}: " in text for number in range(len(NAMES))] == [True] * len(NAMES)
        assert "caf\\udce9.jpg" in text
    assert NAMES[0] in written and NAMES[1] in written and not errors.getvalue()


@pytest.mark.slow
def test_any_name_is_logged_under_the_locale_c(tmp_path: Path) -> None:
    code = (
        "import logging, os, sys; from maskfeat.distributed.world import World\n"
        "from maskfeat.engine.metrics_log import setup_logging\n"
        "setup_logging(World())\n"
        "for name in os.listdir(os.fsencode(sys.argv[1])): logging.getLogger('maskfeat.x').info(os.fsdecode(name))"
    )
    for name in NAMES:
        (tmp_path / name).touch()
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, check=True)
    assert done.stdout.count(b".jpg") == len(NAMES) and not done.stderr


def test_a_terminal_shows_a_line_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stdout", screen)
        setup_logging(World())
        with logged_to_file(tmp_path):
            MetricsLog(World(), None).write("train_iter", "for people", {"loss": 1.0}, 0)
        logging.getLogger("maskfeat.test").info("of the notebook, after the run")
        assert screen.getvalue().count("for people") == 1
        assert screen.getvalue().count("json_stats: ") == (not terminal)
    assert len(read_json_stats(str(tmp_path / "stdout.log"), "train_iter")) == 2, "the file has them all"
    assert "of the notebook" not in (tmp_path / "stdout.log").read_text()


def entry(step: int) -> bytes:
    return b'[11/28 04:16:01] json_stats: {"_type": "train_iter", "loss": %d}\n' % step


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (entry(1)[:-20], 0),  # cut at the end, and the next run wrote on
        (entry(1)[:-20] + b"\n", 1),
        (b"\0" * 50 + b"\n", 0),
        (b"\xff\xfe json_stats: \xff\n", 1),
        (b"json_stats: 5\n", 1),
        (b"json_stats: {}\n", 1),
        (b"json_stats: " + b"[" * 100_000 + b"\n", 1),
        (b"json_stats: \n", 1),
        ("a\u2028b\x85c\n".encode(), 0),
    ],
)
def test_damaged_lines_are_left_out(
    damage: bytes, lost: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("maskfeat"), "propagate", True)
    log = tmp_path / "stdout.log"
    log.write_bytes(entry(0) + damage + entry(2) + b'json_stats: {"_type": "val_epoch", "top1": 5}\n')
    assert [found["loss"] for found in read_json_stats(log, "train_iter")] == [0, 2]
    assert last_json_stats(log, "val_epoch")["top1"] == 5
    assert (f"{log}: {lost} damaged lines" in caplog.text) == bool(lost)
    with pytest.raises(UserFileError, match="has no test_final entry"):
        last_json_stats(log, "test_final")


@pytest.mark.parametrize("end", [b"", b"whole\n", b"[11/28 04:16:01] json_stats: {"])
def test_a_log_goes_on_with_a_line_of_its_own(end: bytes, tmp_path: Path) -> None:
    (tmp_path / "stdout.log").write_bytes(end)
    handler = LogFile(tmp_path / "stdout.log")
    handler.emit(logging.makeLogRecord({"msg": "next"}))
    handler.close()
    assert (tmp_path / "stdout.log").read_bytes().split(b"\n")[-2] == b"next"


def test_a_full_disk_stops_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda file, text: said.append(text))  # standard error may be a file as well
    handler = LogFile(tmp_path / "stdout.log")

    def log(first: int, end: int) -> None:
        for number in range(first, end):
            handler.handle(logging.makeLogRecord({"msg": f"line {number} " + 90 * "x"}))

    for start in (0, 1000):
        log(start, start + 10)
        with full():
            log(start + 10, start + 500)
        log(start + 500, start + 510)
    handler.close()
    lines = (tmp_path / "stdout.log").read_text().splitlines()
    whole = [line for line in lines if line.startswith("line ") and line.endswith(" " + 90 * "x")]
    numbers = [int(line.split()[1]) for line in whole]
    assert {*range(10), *range(500, 510), *range(1000, 1010), *range(1500, 1510)} <= set(numbers)
    assert numbers == sorted(numbers) and len(numbers) < 600
    assert [line for line in lines if line not in whole] == 2 * [
        "up to 490 lines before the last one are missing: they could not be written"
    ]
    assert len(said) == 2 and all(b"stdout.log cannot be written (File too large)" in text for text in said)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output(tmp_path: Path) -> None:
    """Also at the exit, where Python would end with 120."""
    code = (
        "from maskfeat.distributed.processes import run_program; from maskfeat.distributed.world import World\n"
        "from maskfeat.engine.metrics_log import MetricsLog, setup_logging\n"
        "def main():\n"
        "    setup_logging(World())\n"
        "    for step in range(300): MetricsLog(World(), None).write('train_iter', 'a line', {'loss': 1.0}, step)\n"
        "    return int(sys.argv[1])\n"
        "import sys; run_program(main)"
    )
    for expected in (0, 3):
        with open("/dev/full", "w") as out:
            command = [sys.executable, "-c", code, str(expected)]
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)}
            )
        assert done.returncode == expected, done.stderr
        assert done.stderr.count("\n") == 1 and "standard output cannot be written (No space left" in done.stderr


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    for first, steps in ((0, 10), (6, 4), (8, 4)):  # killed twice
        log = MetricsLog(World(), tmp_path)
        log.begin(first)
        for step in range(first, first + steps):
            log.write("train_iter", "", {"loss": float(first), "eta": "0:00:00"}, step)
        log.write("val_epoch", "", {"top1": 1.0}, first)
        if first:
            log.close()  # the first one was killed: nothing is lost all the same
    assert points(tmp_path, "train_iter/loss") == [(n, 0 if n < 6 else 6 if n < 8 else 8) for n in range(12)]
    test = MetricsLog(World(), tmp_path)
    test.write("test_final", "", {"top1": 50.0}, 0)
    test.close()
    assert len(points(tmp_path, "train_iter/loss")) == 12, "a test hides nothing"
    assert points(tmp_path, "test_final/top1") == [(0, 50.0)]


def test_tensorboard_on_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("maskfeat"), "propagate", True)
    log = MetricsLog(World(), tmp_path / "new")
    log.begin(0)
    with full():
        log.write("train_iter", "", {"loss": 1.0}, 0)
    for step in range(1, 30):
        if step in (7, 8, 15):
            size = sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))  # room for a part of a record
            log.write("train_iter", "", {"loss": 1.0}, step)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        else:
            log.write("train_iter", "", {"loss": 1.0}, step)
    log.close()
    assert [step for step, _ in points(tmp_path / "new", "train_iter/loss")] == [
        *range(1, 7),
        *range(9, 15),
        *range(16, 30),
    ]
    warnings = {id(record) for record in caplog.records if "TensorBoard will lack points" in record.getMessage()}
    assert len(warnings) == 3, "once for each time"


def test_ranks_other_than_the_first_write_no_metrics(tmp_path: Path) -> None:
    log = MetricsLog(World(1, 2, 1, 2), tmp_path / "events")
    log.begin(0)
    log.write("train_iter", "", {"loss": 1.0}, 0)
    log.close()
    assert not (tmp_path / "events").exists()
