"""Promises 1 and 7: killed at any moment, a run resumes to the very same bits; asked to stop, it loses no step."""

import random
import signal
import time
from pathlib import Path

import pytest

from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.distributed.preemption import INTERRUPTED, PREEMPTED
from tests.reliability.harness import FINE_TUNING, PRETRAINING, Forks, arguments, await_partial, digest
from tests.reliability.scale import note, size
from tests.worker import json_stats

OFTEN = ("TRAIN.CHECKPOINT_MINUTES", "0.001")
RECIPES = {"pt": PRETRAINING, "ft": FINE_TUNING}
STEPS = 5  # of an epoch

Undisturbed = dict[str, tuple[str, float]]


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Final bits and seconds of runs that nobody disturbs."""
    found = {}
    for task, recipe in RECIPES.items():
        output = tmp_path_factory.mktemp("undisturbed")
        began = time.monotonic()
        assert forks.run(arguments(recipe, image_data, output, *OFTEN), output / "log") == 0, (
            output / "log"
        ).read_text()
        found[task] = digest(output, task), time.monotonic() - began
    return found


@pytest.mark.slow
def test_killed_at_any_moment(undisturbed: Undisturbed, forks: Forks, image_data: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    trials, equal, during_saves, again = size(12, 200), 0, 0, 0
    for trial in range(trials):
        task = ("pt", "ft")[trial % 2]
        expected, seconds = undisturbed[task]
        output = tmp_path / str(trial)
        output.mkdir()
        workers = ("0", "2", "4")[trial % 3]
        argv = arguments(RECIPES[task], image_data, output, *OFTEN, "DATA_LOADER.NUM_WORKERS", workers)
        for _ in range(1 + trial % 2):  # every other one twice
            run = forks.start(argv, output / "log")
            if trial % 4 == 3:
                during_saves += await_partial(output, run, rng.randint(1, 6))
            else:
                time.sleep(rng.uniform(0.05, 1.0) * seconds)
            run.kill()
            again += run.wait() == -signal.SIGKILL
        assert forks.run(argv, output / "log") == 0, (output / "log").read_text()
        same = digest(output, task) == expected
        assert same, f"trial {trial} ({task}, {workers} workers) ended with other bits:\n{(output / 'log').read_text()}"
        equal += same
    assert again > trials // 2, "hardly any run was killed before its end"
    note(1, f"{equal} of {trials} runs bit-identical after {again} kills, {during_saves} of them while saving")
    assert during_saves


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop(
    number: signal.Signals, undisturbed: Undisturbed, forks: Forks, image_data: Path, tmp_path: Path
) -> None:
    rng, stopped = random.Random(int(number)), INTERRUPTED if number == signal.SIGINT else PREEMPTED
    lost, stops, trials, slowest = 0, 0, size(2, 40), 0.0
    for trial in range(trials):
        task = ("pt", "ft")[trial % 2]
        expected, _ = undisturbed[task]
        output = tmp_path / str(trial)
        output.mkdir()
        # No other checkpoint within an epoch.
        argv = arguments(RECIPES[task], image_data, output, "DATA_LOADER.NUM_WORKERS", ("0", "2")[trial % 2])
        code = None
        while code != 0:
            target = steps_logged(output) + rng.randint(1, 4)
            run = forks.start(argv, output / "log")
            while steps_logged(output) < target and Path(f"/proc/{run.pid}").exists():
                time.sleep(0.01)
            if target < 3 * STEPS:  # otherwise it ends by itself, and may have stopped listening
                run.kill(number)
            asked = time.monotonic()
            code = run.wait()
            assert code in (0, stopped), (output / "log").read_text()
            if code == stopped:
                stops += 1
                slowest = max(slowest, time.monotonic() - asked)
                lost += steps_logged(output) - steps_saved(output, task)
        assert digest(output, task) == expected, f"trial {trial}:\n{(output / 'log').read_text()}"
    assert stops >= trials and lost == 0
    note(
        7,
        f"{number.name}: {stops} stops with exit code {stopped} within {slowest:.1f} s, {lost} steps lost, same bits",
    )


def steps_logged(output: Path) -> int:
    """How many steps the log of a run knows."""
    logged = json_stats(output, "train_iter") if (output / "stdout.log").exists() else []
    if not logged:
        return 0
    last = logged[-1]
    epoch, step = (int(last[key].split("/")[0]) for key in ("epoch", "iter"))
    return (epoch - 1) * STEPS + step


def steps_saved(output: Path, task: str) -> int:
    """How many steps the last checkpoint of a run has behind it."""
    epochs, *step = [int(part) for part in find_checkpoints(output, task)[-1].stem.split("_") if part.isdigit()]
    return epochs * STEPS + sum(step)
