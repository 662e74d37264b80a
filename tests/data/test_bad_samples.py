"""Logging, counting and limiting samples that cannot be read."""

import errno
import json
import logging
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from maskfeat.batch import BadSample
from maskfeat.data.bad_samples import BadSampleLog, TooManyBadSamples, UnreadableSample, allowed_bad, error_context
from maskfeat.data.datasets.folders import list_class_folders
from maskfeat.data.datasets.imagenet import ImageFolder
from maskfeat.data.transforms import ImageEvalTransform
from maskfeat.errors import UserError
from tests.data.datasets.test_imagenet import make_folder


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
    log.record(bad(1, 2, 3))
    with pytest.raises(TooManyBadSamples):
        log.record(bad(4))
    with pytest.raises(ValueError, match="DATA.MAX_BAD_FRACTION"):
        BadSampleLog(None, 10, 1.5, "test")


@pytest.mark.parametrize(
    ("number", "fraction", "allowed"),
    [
        (92, 0.01, 3), (10_000, 0.01, 100), (300, 0.01, 3), (400, 0.01, 4), (5, 0.01, 2), (4, 0.01, 2), (2, 0.01, 1),
        (1, 0.01, 0), (1, 1.0, 0), (8, 1.0, 7), (92, 0.0, 0), (100, 0.29, 29), (4, 0.3, 2),
    ],
)  # fmt: skip
def test_a_small_set_may_have_a_few_and_no_set_may_be_bad_as_a_whole(
    number: int, fraction: float, allowed: int
) -> None:
    assert allowed_bad(number, fraction) == allowed
    log = BadSampleLog(None, number, fraction, "train")
    log.record(bad(*range(allowed)))
    with pytest.raises(TooManyBadSamples, match=rf"{allowed + 1} of {number} .* allows \({allowed}\)"):
        log.record(bad(allowed))


def test_the_error_says_what_is_known() -> None:
    """Five of 92 are broken; what was found when the run stopped is not said to be all of them."""
    log = BadSampleLog(None, 92, 0.01, "train")
    log.record(bad(3, 9), shown=range(10, 22))
    log.record((), shown=range(10, 30))
    with pytest.raises(TooManyBadSamples) as caught:
        log.record(bad(3, 31, 40), shown=[50, 51])
    message = str(caught.value)
    assert message.startswith("4 of 92 samples of train cannot be read") and "All" not in message
    assert "tried 26 of 92: further ones may follow" in message
    log = BadSampleLog(None, 8, 0.01, "val")
    with pytest.raises(TooManyBadSamples, match="tried 8 of 8: every sample was tried"):
        log.record(bad(*range(8)), shown=range(8))


@pytest.fixture
def pictures(tmp_path: Path) -> ImageFolder:
    listed, _ = list_class_folders(make_folder(tmp_path / "images", {"a": 20, "b": 20}))
    return ImageFolder(listed, ImageEvalTransform(16, (0.5,) * 3, (0.5,) * 3), seed=0, replace_bad=False)


def listed_as_bad(folder: Path, pictures: ImageFolder, *indices: int) -> None:
    """Writes the list that an earlier run would have left."""
    log = BadSampleLog(folder, 40, 1.0, "train")
    log.record(BadSample(index, pictures.path(index), "no such file") for index in indices)


def test_listed_samples_are_read_again_before_they_stop_a_run(
    tmp_path: Path, pictures: ImageFolder, caplog: pytest.LogCaptureFixture
) -> None:
    listed_as_bad(tmp_path, pictures, 1, 2, 3, 5, 8)
    BadSampleLog(tmp_path, 40, 0.5, "val").record(bad(7))
    for index in (2, 20):
        Path(pictures.path(index)).write_bytes(b"text")
    log = BadSampleLog(tmp_path, 40, 0.01, "train", pictures)
    assert log.indices == {1, 2, 3, 5, 8}, "nothing is read before it is needed"
    with caplog.at_level(logging.INFO):
        log.record((BadSample(20, pictures.path(20), "text"),))
    assert log.indices == {2, 20} and "4 samples of train that were listed as bad can be read again" in caplog.text
    assert [(row["split"], row["index"]) for row in lines(tmp_path)] == [("train", 2), ("val", 7), ("train", 20)]


def test_a_list_that_cannot_be_rewritten_stops_no_run(
    tmp_path: Path, pictures: ImageFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that has become read-only: the samples count as read in this run, and stay listed."""
    listed_as_bad(tmp_path, pictures, 1, 2, 3, 5, 8)

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(BadSampleLog, "_rewrite", read_only)
    log = BadSampleLog(tmp_path, 40, 0.01, "train", pictures)
    log.record((), shown=(1, 2))
    assert log.indices == {3, 5, 8} and "cannot be written (Read-only file system)" in caplog.text
    assert [row["index"] for row in lines(tmp_path)] == [1, 2, 3, 5, 8]


def test_listed_samples_that_are_still_bad_stop_the_next_run(tmp_path: Path, pictures: ImageFolder) -> None:
    listed_as_bad(tmp_path, pictures, 1, 2, 3)
    for index in (1, 2, 3, 20):
        Path(pictures.path(index)).unlink()
    for _ in range(2):
        log = BadSampleLog(tmp_path, 40, 0.01, "train", pictures)
        with pytest.raises(TooManyBadSamples, match="4 of 40"):
            log.record((BadSample(20, pictures.path(20), "no such file"),))
    pictures.replace_bad = True  # another sample in place of a bad one does not make that one readable
    with pytest.raises(TooManyBadSamples, match="4 of 40"):
        BadSampleLog(tmp_path, 40, 0.01, "train", pictures).record((BadSample(20, pictures.path(20), "x"),))


def test_a_listed_sample_is_taken_off_once_it_is_shown(tmp_path: Path, pictures: ImageFolder) -> None:
    listed_as_bad(tmp_path, pictures, 1, 2, 3)
    log = BadSampleLog(tmp_path, 40, 0.01, "train", pictures)
    still = BadSample(2, pictures.path(2), "no such file")
    log.record((still,), shown=[1, 2, 30])
    assert log.indices == {2, 3} and [row["index"] for row in lines(tmp_path)] == [2, 3]
    log.record((), shown=[2, 3])  # what this run could not read once stays
    assert log.indices == {2} and [row["index"] for row in lines(tmp_path)] == [2]


def test_files_that_left_the_set_do_not_count(tmp_path: Path, pictures: ImageFolder) -> None:
    listed_as_bad(tmp_path, pictures, 1, 2, 3)
    fewer = ImageFolder(pictures.samples[2:], pictures.transform, seed=0, replace_bad=False)
    assert BadSampleLog(tmp_path, 38, 0.01, "train", fewer).indices == frozenset()
    assert BadSampleLog(tmp_path, 40, 0.01, "train", pictures).indices == {1, 2, 3}


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
    with pytest.raises(UserError, match="/data/a.jpg: set that key"), error_context("/data/a.jpg"):
        raise UserError("set that key")
    with pytest.raises(KeyboardInterrupt), error_context("/data/a.jpg"):
        raise KeyboardInterrupt
