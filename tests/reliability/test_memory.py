"""Out of memory is explained: what was full, the batch, and the keys that take less of it, with exit code 2."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from maskfeat.batch import Batch
from maskfeat.config import load_config
from maskfeat.engine.oom import explain_oom
from maskfeat.engine.run import main
from maskfeat.objectives.maskfeat import MaskFeat
from tests.reliability.scale import note
from tests.small import MFM_RECIPES, RECIPES, REPO, VIT_PT, images

PT = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
FT = str(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml")
R50 = str(MFM_RECIPES / "in1k_R50_MFM_PT.yaml")

CUDA = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is "
    "free. Process 12 has 78.07 GiB memory in use.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1."
)
CPU = "[enforce fail at alloc_cpu.cpp:122] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to get 99 B."
KILLED = "DataLoader worker (pid 41) is killed by signal: Killed. "
BUS = (
    "DataLoader worker (pid 41) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)
WORKER = (
    "Caught MemoryError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n  x\nMemoryError"
)
SETTINGS = ["MODEL.ACT_CHECKPOINT", "TRAIN.MICRO_BATCH_SIZE", "TRAIN.MIXED_PRECISION"]


def advice(error: BaseException, recipe: str = PT, *opts: object) -> str:
    """What is tried, of the one line that is said."""
    said = explain_oom(error, load_config(recipe, opts))
    assert said is not None and "\n" not in said and said.startswith("out of memory: ")
    return said.split(". Try ", 1)[1].split(". It said: ")[0]


def test_each_kind_is_told_apart() -> None:
    cfg = load_config(PT)
    full = {
        "the memory of the device is full": (
            torch.OutOfMemoryError(CUDA),
            RuntimeError("CUDA error: out of memory"),
            RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),  # cuDNN 8; then 9
            RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        ),
        "this machine (or the limit": (RuntimeError(CPU), MemoryError(), OSError(12, "Cannot allocate memory")),
        "a data worker was killed": (
            RuntimeError(KILLED),
            RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        ),
        "/dev/shm": (
            RuntimeError(BUS),
            RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
        ),
    }
    for words, errors in full.items():
        for error in errors:
            assert words in (explain_oom(error, cfg) or ""), error
    assert "this machine (or the limit" in (explain_oom(RuntimeError(WORKER), cfg) or "")
    for other in (
        RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(2, "No such file"),
        RuntimeError("DataLoader worker (pid 41) is killed by signal: Segmentation fault. "),
        RuntimeError("while loading /dev/shm/a.jpg: IndexError: 3"), ConnectionResetError(104, "reset by peer"),
    ):  # fmt: skip
        assert explain_oom(other, cfg) is None, other


def test_a_cause_counts() -> None:
    """The loop's error names the worker alone; what killed it stands in what it was raised from."""
    try:
        try:
            raise RuntimeError(KILLED)
        except RuntimeError as error:
            raise RuntimeError("DataLoader worker (pid(s) 41) exited unexpectedly") from error
    except RuntimeError as error:
        said = explain_oom(error, load_config(PT)) or ""
    assert "a data worker was killed" in said and said.endswith("killed by signal: Killed.")


def test_the_line() -> None:
    cfg = load_config(PT, ["NUM_GPUS", 4])
    assert explain_oom(torch.OutOfMemoryError(CUDA), cfg) == (
        "out of memory: the memory of the device is full, with 64 samples at once in each process "
        "(TRAIN.BATCH_SIZE 256 over 4). Try MODEL.ACT_CHECKPOINT light, then True (now False); "
        "TRAIN.MICRO_BATCH_SIZE 32 (now 0, all at once); TRAIN.MIXED_PRECISION bf16 (now False). It said: CUDA out of "
        "memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is free. "
        "Process 12 has 78.07 GiB memory in use."
    )


def test_a_test_after_training_has_a_batch_of_its_own() -> None:
    cfg = load_config(FT, ["NUM_GPUS", 4])
    said = explain_oom(torch.OutOfMemoryError(CUDA), cfg, testing=True) or ""
    assert "TEST.BATCH_SIZE" in said and "TEST.MIXED_PRECISION bf16" in said
    assert "MICRO_BATCH_SIZE" not in said and "ACT_CHECKPOINT" not in said


def test_nothing_that_is_set_already_is_advised() -> None:
    error = torch.OutOfMemoryError(CUDA)
    assert all(key in advice(error) for key in SETTINGS)
    assert "MODEL.ACT_CHECKPOINT True (now light)" in advice(error, PT, "MODEL.ACT_CHECKPOINT", "light")
    assert "ACT_CHECKPOINT" not in advice(error, PT, "MODEL.ACT_CHECKPOINT", True)
    assert "MIXED_PRECISION" not in advice(error, PT, "TRAIN.MIXED_PRECISION", "fp16")
    assert "TRAIN.MICRO_BATCH_SIZE 4 (now 8)" in advice(error, PT, "TRAIN.MICRO_BATCH_SIZE", 8)
    assert "MICRO_BATCH_SIZE" not in advice(error, PT, "TRAIN.MICRO_BATCH_SIZE", 1)
    assert "ACT_CHECKPOINT" not in advice(error, R50), "a ResNet refuses it"
    done = ["MODEL.ACT_CHECKPOINT", True, "TRAIN.MICRO_BATCH_SIZE", 1, "TRAIN.MIXED_PRECISION", "bf16"]
    assert advice(error, PT, *done).startswith("a smaller DATA.TRAIN_CROP_SIZE or model")
    assert "NUM_WORKERS" not in advice(error), "workers do not fill a GPU"
    assert "DATA_LOADER.NUM_WORKERS 4 (now 8" in advice(RuntimeError(KILLED))
    assert "NUM_WORKERS" not in advice(MemoryError(), PT, "DATA_LOADER.NUM_WORKERS", 0)
    assert "DATA_LOADER.NUM_WORKERS 0 (now 8" in advice(RuntimeError(BUS))
    test = ["TRAIN.ENABLE", False, "TEST.ENABLE", True, "TEST.BATCH_SIZE", 64]
    finetune = str(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml")
    assert advice(error, finetune, *test, "TEST.MIXED_PRECISION", "bf16") == "TEST.BATCH_SIZE 32"


def test_every_value_advised_is_taken() -> None:
    """Applied one after the other, the advice ends, and each config is a valid one with a smaller step."""
    opts: list[str] = []
    for _ in range(20):
        text = advice(torch.OutOfMemoryError(CUDA), PT, *opts)
        if text.startswith("a smaller"):
            break
        key, value = text.split("; ")[0].split()[:2]
        opts += [key, value.strip(",")]
        load_config(PT, opts)
    assert opts[-2:] == ["TRAIN.MIXED_PRECISION", "bf16"]
    assert [opts[i + 1] for i in range(0, len(opts), 2) if opts[i] == "TRAIN.MICRO_BATCH_SIZE"][-1] == "1"


CHILD = """
import resource, sys
import maskfeat.engine.run
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {room} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(maskfeat.engine.run.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_real_allocation_that_fails(image_data: Path, tmp_path: Path) -> None:
    """40 images of 224 pixels through a ViT of width 768, with 800 MiB."""
    assert resource.RLIMIT_AS
    opts = [*VIT_PT, *images(image_data), "DATA.TRAIN_CROP_SIZE", "224", "DATA.TEST_CROP_SIZE", "224",
            "MVIT.EMBED_DIM", "768", "MVIT.NUM_HEADS", "12", "TRAIN.BATCH_SIZE", "40"]  # fmt: skip
    command = [sys.executable, "-c", CHILD.format(room=800), "--cfg", PT, *opts, "OUTPUT_DIR", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "error: " in line]
    assert "with 40 samples at once in each process" in line and "TRAIN.MICRO_BATCH_SIZE 20" in line
    assert "you tried to allocate" in line
    assert "Traceback" not in done.stdout + done.stderr
    note(14, f"an allocation that fails is said in one line of {len(line.split('error: ')[1])} characters, exit code 2")


def run_and_read(
    monkeypatch: pytest.MonkeyPatch, act: object, opts: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """A run in which `act` is called in the second forward pass; what it says."""
    forward, calls = MaskFeat.forward, []

    def acting(self: MaskFeat, batch: Batch) -> object:
        calls.append(1)
        if len(calls) == 2:
            act()  # type: ignore[operator]
        return forward(self, batch)

    monkeypatch.setattr(MaskFeat, "forward", acting)
    assert main(["--cfg", PT, *opts]) == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "error: " in line]
    return line


def test_a_device_that_is_full(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError(CUDA)

    opts = [*VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path)]
    line = run_and_read(monkeypatch, fail, opts, capsys)
    assert "the memory of the device is full" in line and "Tried to allocate 2.25 GiB" in line
    assert line.split("error: ")[1] in (tmp_path / "stdout.log").read_text(), "it stands in the log, too"


@pytest.mark.slow
@pytest.mark.parametrize("seen", [True, False])
def test_a_data_worker_that_is_killed(
    seen: bool, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch's handler tells it; or a batch that the worker had ready is met first, whose socket nobody answers."""

    def kill() -> None:
        if not seen:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            time.sleep(0.5)  # the next batches are ready
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            os.kill(worker.pid or 0, signal.SIGKILL)

    handler = signal.getsignal(signal.SIGCHLD)
    opts = [*VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path), "DATA_LOADER.NUM_WORKERS", "2"]
    try:
        line = run_and_read(monkeypatch, kill, opts, capsys)
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert "a data worker was killed" in line and "DATA_LOADER.NUM_WORKERS 1 (now 2" in line
    note(14, "a data worker killed with SIGKILL is explained, exit code 2")
