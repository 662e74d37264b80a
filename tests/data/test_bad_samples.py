"""Logging, counting and limiting samples that cannot be read."""

import json
import logging
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from maskfeat.batch import BadSample
from maskfeat.data.bad_samples import BadSampleLog, TooManyBadSamples, UnreadableSample, error_context


def bad(*indices: int) -> tuple[BadSample, ...]:
    return tuple(BadSample(index, f"/data/{index}.jpg", "the file is empty") for index in indices)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def test_each_sample_is_logged_and_written_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = BadSampleLog(tmp_path / "new" / "out", 1000, 0.01, "train")
    with caplog.at_level(logging.WARNING):
        log.record(())
        assert not (tmp_path / "new").exists()  # no folder is created before it is needed
        log.record(bad(5, 7))
        log.record(bad(7, 5, 5))
        log.record(bad(8))
    assert lines(tmp_path / "new" / "out") == [
        {"split": "train", "index": i, "path": f"/data/{i}.jpg", "cause": "the file is empty"} for i in (5, 7, 8)
    ]
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 3
    assert "/data/7.jpg" in caplog.text and "the file is empty" in caplog.text
    assert log.indices == {5, 7, 8} and len(log) == 3


def test_a_resumed_run_counts_but_does_not_repeat(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BadSampleLog(tmp_path, 100, 0.05, "train").record(bad(1, 2, 3))
    BadSampleLog(tmp_path, 100, 0.05, "val").record(bad(1))
    resumed = BadSampleLog(tmp_path, 100, 0.05, "train")
    assert resumed.indices == {1, 2, 3}
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        resumed.record(bad(1, 2, 4))
        assert len(caplog.records) == 1
    assert [(entry["split"], entry["index"]) for entry in lines(tmp_path)] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("val", 1),
        ("train", 4),
    ]
    resumed.record(bad(5))
    with pytest.raises(TooManyBadSamples, match="6 of 100"):
        resumed.record(bad(6))


def test_ranks_share_the_file(tmp_path: Path) -> None:
    one, two = (BadSampleLog(tmp_path, 100, 0.5, "train") for _ in range(2))
    one.record(bad(1))
    two.record(bad(1, 2))
    one.record(bad(2, 3))
    assert [entry["index"] for entry in lines(tmp_path)] == [1, 2, 3]
    assert one.indices == {1, 2, 3} and two.indices == {1, 2}


def test_incomplete_line_of_a_killed_run(tmp_path: Path) -> None:
    BadSampleLog(tmp_path, 100, 0.5, "train").record(bad(1, 2))
    path = tmp_path / "bad_samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    log = BadSampleLog(tmp_path, 100, 0.5, "train")
    assert log.indices == {1}
    log.record(bad(2, 3))
    assert BadSampleLog(tmp_path, 100, 0.5, "train").indices == {1, 2, 3}


def test_too_many(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path, 3000, 0.01, "train")
    log.record(bad(*range(30)))  # exactly the fraction: allowed
    with pytest.raises(TooManyBadSamples) as caught:
        log.record(bad(30))
    message = str(caught.value)
    for word in (
        "31 of 3000",
        "DATA.MAX_BAD_FRACTION = 0.01",
        str(tmp_path / "bad_samples.jsonl"),
        "11 more",
    ):
        assert word in message
    assert message.count("the file is empty") == 20 and "/data/19.jpg" in message and "/data/20.jpg" not in message
    assert len(lines(tmp_path)) == 31  # the last one is listed too


def test_without_a_folder() -> None:
    log = BadSampleLog(None, 10, 0.1, "test")
    log.record(bad(1))
    with pytest.raises(TooManyBadSamples):
        log.record(bad(2))
    with pytest.raises(ValueError, match="DATA.MAX_BAD_FRACTION"):
        BadSampleLog(None, 10, 1.5, "test")


def record_many(folder: str) -> None:
    log = BadSampleLog(folder, 1000, 1.0, "train")
    for index in range(60):
        log.record(bad(index))


def test_processes_do_not_overwrite_each_other(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(record_many, [str(tmp_path)] * 2))
    assert [entry["index"] for entry in lines(tmp_path)] == list(range(60))


def test_errors_contain_the_path_once() -> None:
    with pytest.raises(RuntimeError, match="/data/a.jpg.*KeyError"), error_context("/data/a.jpg"):
        raise KeyError("x")
    with pytest.raises(UnreadableSample) as caught, error_context("/data/a.jpg"):
        raise UnreadableSample("/data/a.jpg", "the file is empty")
    assert str(caught.value) == "/data/a.jpg: the file is empty"
    assert str(UnreadableSample(str(caught.value))) == str(caught.value)  # as a DataLoader re-raises it
    with pytest.raises(KeyboardInterrupt), error_context("/data/a.jpg"):
        raise KeyboardInterrupt
