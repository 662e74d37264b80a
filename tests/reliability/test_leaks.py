"""Nothing leaks: memory and open files over many steps of the real loop, with data workers, checkpoints and logs."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.reliability.scale import SOAK, note, size
from tests.small import RECIPES, REPO, VIT_PT, images

PT = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"
BATCH, IMAGES = 4, 40
STEPS = size(600, 10_000)
SAMPLED = max(STEPS // 200, 1)  # steps between two samples
LIMIT = 1.0  # MB per 1,000 steps
CERTAIN = LIMIT * (0.25 if SOAK else 5)  # errors below this one tell a leak
TRIES = 1 if SOAK else 3  # of a measurement: memory that the machine takes back in its middle spoils it

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

# The program itself; what is measured stands around each step. `kept` is a leak on purpose, of so many bytes a step.
CHILD = """
import json, multiprocessing, os, sys
import maskfeat.engine.run
from maskfeat.engine.trainer import Trainer
step, samples, kept = Trainer.train_step, [], []
def own(pid):  # its own and shared memory, without pages of files: the kernel takes these back as it needs memory
    with open(f"/proc/{pid}/status") as file:
        sizes = dict(line.split(":", 1) for line in file)
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
def measured(*args):
    step(*args)
    measured.done += 1
    if LEAK:
        kept.append(os.urandom(LEAK))
    if measured.done % SAMPLED == 0:
        workers = sum(own(child.pid) for child in multiprocessing.active_children())
        samples.append([measured.done, own("self"), workers, len(os.listdir("/proc/self/fd"))])
measured.done = 0
Trainer.train_step = measured
code = maskfeat.engine.run.main(sys.argv[2:])
json.dump(samples, open(sys.argv[1], "w"))
sys.exit(code)
"""


@dataclass
class Slope:
    """Per 1,000 steps, with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} +- {self.error:.2f}"


def fit(steps: list[int], values: list[float], blocks: int = 10) -> Slope:
    """A straight line through the medians of equal stretches, least squares; its error from their scatter.

    Medians, because single samples jump with what is in flight; stretches, because neighbours are not independent.
    """
    length = len(steps) // blocks
    xs = [statistics.fmean(steps[i * length : (i + 1) * length]) / 1000 for i in range(blocks)]
    ys = [statistics.median(values[i * length : (i + 1) * length]) for i in range(blocks)]
    middle = statistics.fmean(xs)
    spread = sum((x - middle) ** 2 for x in xs)
    slope = sum((x - middle) * y for x, y in zip(xs, ys, strict=True)) / spread
    level = statistics.fmean(ys)
    rest = sum((y - level - slope * (x - middle)) ** 2 for x, y in zip(xs, ys, strict=True))
    return Slope(slope, (rest / (blocks - 2) / spread) ** 0.5)


def measure(data: Path, folder: Path, leak: int = 0) -> tuple[Slope, Slope, Slope]:
    """Slopes of the memory of the program and of its data workers (MB), and of open files."""
    epochs = STEPS * BATCH // IMAGES
    opts = [*VIT_PT, *images(data), "OUTPUT_DIR", str(folder), "TRAIN.BATCH_SIZE", str(BATCH), "SOLVER.MAX_EPOCH",
            str(epochs), "DATA_LOADER.NUM_WORKERS", "2", "TENSORBOARD.ENABLE", "True", "TRAIN.CHECKPOINT_PERIOD", "10",
            "TRAIN.EVAL_PERIOD", "20", "LOG_PERIOD", "5"]  # fmt: skip
    script = CHILD.replace("LEAK", str(leak)).replace("SAMPLED", str(SAMPLED))
    command = [sys.executable, "-c", script, str(folder / "samples.json"), "--cfg", str(PT), *opts]
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    samples = json.loads((folder / "samples.json").read_text())
    assert samples[-1][0] == STEPS - STEPS % SAMPLED
    warm = samples[len(samples) * 2 // 5 :]  # before that, allocators and caches fill
    steps, program, workers, files = (list(column) for column in zip(*warm, strict=True))
    return fit(steps, [p / 1e6 for p in program]), fit(steps, [w / 1e6 for w in workers]), fit(steps, files)


def measure_surely(data: Path, folder: Path, leak: int = 0) -> tuple[Slope, Slope, Slope]:
    """As `measure`, again until program and workers are certain, `TRIES` times at most."""
    for attempt in range(TRIES):
        program, workers, files = measure(data, folder / f"run{attempt}", leak)
        if max(program.error, workers.error) < CERTAIN:
            break
    return program, workers, files


def test_the_fit_tells_a_slope_and_its_error() -> None:
    steps = list(range(0, 2000, 5))
    jumping = [(7 * step) % 13 for step in steps]
    flat, rising = fit(steps, jumping), fit(steps, [v + step / 100 for v, step in zip(jumping, steps, strict=True)])
    assert abs(flat.value) < 3 * flat.error + 1e-9 and flat.error < 1
    assert rising.value == pytest.approx(10 + flat.value, abs=0.5)


@pytest.mark.slow
def test_memory_and_files_stay_flat(image_data: Path, tmp_path: Path) -> None:
    """CI's few steps can only refute a leak that its error lets it see; a soak shows that there is none."""
    program, workers, files = measure_surely(image_data, tmp_path)
    said = f"{STEPS} steps: {program} MB per 1,000 steps, its 2 data workers {workers} MB, open files {files}"
    print(said)
    for slope in (program, workers):
        assert slope.value + 2 * slope.error < LIMIT if SOAK else slope.value - 3 * slope.error < LIMIT, said
        assert slope.error < CERTAIN, f"too uncertain to tell: {said}"
    assert files.value - 3 * files.error < 0.5, said
    note(13, said)


@pytest.mark.slow
def test_a_leak_is_seen(image_data: Path, tmp_path: Path) -> None:
    """30 kB a step: 30 MB per 1,000 steps."""
    program, _, _ = measure_surely(image_data, tmp_path, leak=30_000)
    assert program.value - 3 * program.error > LIMIT, program
    assert program.value == pytest.approx(30, rel=0.5)
