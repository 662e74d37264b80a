"""What is read from a log: curves without what was repeated, time without pauses, results, warnings."""

import logging
import math
from datetime import datetime
from pathlib import Path

import pytest

from maskfeat.distributed.world import World
from maskfeat.engine.metrics_log import MetricsLog, logged_to_file, setup_logging
from maskfeat.report.run_log import RunLog, read_log
from tests.report.runs import MODEL, Log, whole, write_run


def read(folder: Path, log: Log | str) -> RunLog:
    (found,) = read_log(write_run(folder, log) / "stdout.log").values()
    return found


def test_a_whole_run(tmp_path: Path) -> None:
    log = read(tmp_path, whole(0.4))
    assert list(log.train.step) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert list(log.train.epoch) == [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert list(log.train.values["loss"]) == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.4 / 3, 0.4 / 3, 0.1, 0.1])
    assert [hour * 3600 for hour in log.train.hour] == pytest.approx([10 * n for n in range(1, 9)])
    assert list(log.validation.step) == [10, 20, 30, 40] and list(log.validation.values["top1"])[1] == 60.0
    assert set(log.train.values) == {"loss", "lr", "skipped", "samples_per_second"}, "and no text such as eta"
    assert (log.revision, log.machine, log.model) == ("commit 1234abc+", "host7 (Some CPU, 2 cores)", MODEL)
    assert (log.starts, log.resumes, log.max_epoch, log.ending, log.damaged) == (1, 0, 4, "", 0)
    assert log.seconds == 80


def test_a_resumed_run_repeats_steps(tmp_path: Path) -> None:
    """What it repeats replaces what was there, also where the lines fall on other steps; the pause is no work."""
    log = Log()
    log.start()
    for step in (4, 8):
        log.train(1, step, 10, 1.0)
    log.validate(1, loss=0.9)
    log.train(2, 4, 10, 1.0)
    log.say("stopped on SIGTERM; the same command resumes from here (exit code 75: requeue me)")
    log.start(pause=100_000)
    log.say("resumed from out/checkpoints/checkpoint_epoch_00000_step_000006.pyth, after epoch 0, step 6", 5)
    log.train(1, 7, 10, 2.0)
    found = read(tmp_path / "stopped", log)
    assert found.ending == "" and list(found.train.step) == [4, 7] and list(found.train.values["loss"]) == [1.0, 2.0]
    assert not found.validation.step, "a validation of what is repeated is repeated, too"
    assert found.resumes == 1 and found.starts == 2 and found.seconds == 30 + 5 + 10
    assert found.train.hour[1] * 3600 == 45


@pytest.mark.parametrize(
    "then", ["the same command tests again", "TRAIN.AUTO_RESUME True resumes from here, the same command starts anew"]
)
def test_how_a_run_was_stopped(then: str, tmp_path: Path) -> None:
    log = Log()
    log.start()
    log.train(1, 4, 10, 1.0)
    log.say(f"stopped on SIGTERM; {then} (exit code 143)")
    assert read(tmp_path, log).ending == "stopped on SIGTERM"


def test_other_steps_per_epoch(tmp_path: Path) -> None:
    """A resumed run with twice the batch counts on from the steps that were done."""
    log = Log()
    log.train(1, 10, 10, 1.0)
    log.train(2, 5, 5, 1.0)
    log.validate(2, loss=1.0)
    found = read(tmp_path, log)
    assert list(found.train.step) == [10, 15] and list(found.train.epoch) == [1, 2]
    assert list(found.validation.step) == [15]


def test_tasks_in_one_folder(tmp_path: Path) -> None:
    log = Log()
    for task, loss in (("pt", 1.0), ("ft, b", 2.0), ("pt", 3.0)):
        log.start(task)
        if loss == 3:
            log.say("resumed from out/checkpoints/checkpoint_epoch_00000_step_000010.pyth, after epoch 0, step 10")
        log.train(1, 10 if loss < 3 else 20, 20, loss)
    found = read_log(write_run(tmp_path, log) / "stdout.log")
    assert {name: list(run.train.values["loss"]) for name, run in found.items()} == {"pt": [1.0, 3.0], "ft, b": [2.0]}
    assert list(found) == ["ft, b", "pt"], "the last one that wrote is the last"


def test_a_training_that_begins_anew(tmp_path: Path) -> None:
    """Of an earlier one in the folder nothing is left, neither points before its first line nor what it was tested."""
    log = Log()
    log.start()
    for step in (2, 4, 10):
        log.train(1, step, 10, 9.0)
    log.validate(1, loss=9.0)
    log.stats("test_final", {"views": "1x1", "top1": 9.0})
    log.start(pause=1000)
    earlier = read(tmp_path / "tested", log)
    assert len(earlier.train.step) == 3 and earlier.tests, "a test of what was trained is no new training"
    log.train(1, 8, 10, 1.0)
    found = read(tmp_path / "anew", log)
    assert list(found.train.values["loss"]) == [1.0] and list(found.train.step) == [8]
    assert not found.validation.step and not found.tests


def test_values_that_are_not_finite_or_come_later(tmp_path: Path) -> None:
    log = Log()
    log.train(1, 1, 4, "nan")
    log.train(1, 2, 4, 1.0, top1=0.5, clipped=True)
    found = read(tmp_path, log).train.values
    assert math.isnan(found["loss"][0]) and math.isnan(found["top1"][0]) and found["top1"][1] == 0.5
    assert "clipped" not in found


def test_tests_warnings_and_weights(tmp_path: Path) -> None:
    log = Log()
    log.start()
    log.say("to evaluate: weights from the_tested_ones.pyth\n  loaded    9")
    table = "weights from pt.pyth\n  loaded    3\n  fresh     1  head.weight"
    log.say(table)
    for _ in range(3):
        log.say("warning: the disk is slow\nreally")
    log.stats("test_final", {"views": "1x1", "top1": 3.0})
    log.stats("test_final", {"views": "1x1", "top1": 4.0})
    log.stats("test_final_ema", {"views": "1x1", "top1": 5.0})
    log.say("error: OUTPUT_DIR out cannot be written")
    found = read(tmp_path, log)
    assert found.weights == table and found.warnings == {"the disk is slow\nreally": 3}
    assert {name: entry["top1"] for name, entry in found.tests.items()} == {"final 1x1": 4.0, "final_ema 1x1": 5.0}
    assert found.ending == "error: OUTPUT_DIR out cannot be written"


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        ('[11/01 00:00:10] json_stats: {"_type": "train_iter", "epo\n', 1),
        ("json_stats: 5\n", 1),
        ("json_stats: " + "[" * 100_000 + "\n", 1),
        ('[11/01 00:00:10] json_stats: {"_type": "train_iter", "epoch": "1/0", "iter": "1/0", "loss": 1}\n', 1),
        ('[11/01 00:00:10] json_stats: {"_type": "train_iter", "epoch": 3}\n', 1),
        ('[11/01 00:00:10] json_stats: {"_type": "val_epoch"}\n', 1),
        ("\0\0\0\xff\n", 0),
        ("[99/99 99:99:99] what\n", 0),
        ("[02/29 00:00:00] in a year that may have none\n", 0),
        ("\n\n", 0),
    ],
)
def test_damage(damage: str, lost: int, tmp_path: Path) -> None:
    """A line that cannot be read costs itself alone."""
    first, second = Log(), Log(datetime(2026, 11, 1, 0, 1))
    first.train(1, 1, 4, 1.0)
    second.train(1, 2, 4, 2.0)
    found = read(tmp_path, first.text() + damage + second.text())
    assert list(found.train.values["loss"]) == [1.0, 2.0] and found.damaged == lost


@pytest.mark.parametrize("text", ["", "\n", "[11/01 00:00:10", "json_stats: {"])
def test_almost_nothing(text: str, tmp_path: Path) -> None:
    found = read(tmp_path, text)
    assert not found.train.step and not found.tests and found.seconds == 0


def test_over_new_year(tmp_path: Path) -> None:
    log = Log(datetime(2026, 12, 31, 23, 59, 55))
    log.say("begun")
    log.train(1, 1, 4, 1.0)
    log.train(1, 2, 4, 1.0)
    assert read(tmp_path, log).seconds == 20


def test_what_a_run_writes_is_what_is_read(tmp_path: Path) -> None:
    setup_logging(World())
    with logged_to_file(tmp_path):
        metrics = MetricsLog(World(), None)
        for step in (1, 2):
            values = {"epoch": "1/2", "iter": f"{step}/2", "loss": 1.5 / step, "lr": 1e-5, "grad_norm": math.inf}
            metrics.write("train_iter", "a line", values, step)
        metrics.write("val_epoch", "a line", {"epoch": "1/2", "loss": 0.25}, 0)
        logging.getLogger("maskfeat.x").warning("some %s", "thing")
    (found,) = read_log(tmp_path / "stdout.log").values()
    assert list(found.train.values["loss"]) == [1.5, 0.75] and list(found.train.values["lr"]) == [1e-5, 1e-5]
    assert list(found.validation.values["loss"]) == [0.25] and found.warnings == {"some thing": 1}
    assert all(map(math.isnan, found.train.values["grad_norm"]))
