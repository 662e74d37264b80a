"""Explain out-of-memory errors: which memory was full, what a process holds at once, and the keys that reduce it."""

import errno
import math
import re
import traceback

import torch
from yacs.config import CfgNode

from maskfeat.engine.batch_arithmetic import StepSize, step_size
from maskfeat.registry import backbone_spec

_QUOTED = 400  # characters of the original message
_DEVICE = re.compile(r"out of memory|ALLOC(ATION)?_FAILED", re.I)
_HERE = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory|bad_alloc|\bMemoryError\b")
_SHARED = re.compile(r"bus error|shared memory|unable to mmap", re.I)
_KILLED = re.compile(r"DataLoader worker .*killed by signal: Killed")
_GONE = re.compile(r"DataLoader worker .*exited unexpectedly")


def _texts(error: BaseException) -> list[str]:
    """Return the messages of an error and of its causes, the first cause last."""
    texts, seen = [], set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        texts.append(f"{type(current).__name__}: {current}" if isinstance(current, MemoryError) else str(current))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return texts


def _lost_worker(error: BaseException) -> bool:
    """Return whether a data worker was gone while a batch was received from it: its socket is closed then."""
    if not isinstance(error, ConnectionError | EOFError) or "DataLoader worker" in str(error):
        return False
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith("torch.utils.data") for name in frames) and "torch.multiprocessing.reductions" in frames


def _kind(error: BaseException, text: str) -> str | None:
    """Return which memory was full, "device", "shared", "worker" or "machine"; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if _lost_worker(error):
        return "worker"
    if isinstance(error, OSError):  # such as a worker that cannot be started
        return "machine" if error.errno == errno.ENOMEM else None
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    for kind, pattern in (("shared", _SHARED), ("worker", _KILLED), ("machine", _HERE), ("device", _DEVICE)):
        if pattern.search(text):
            return kind
    # Where the signal that ended a worker is not known, it was most likely the out-of-memory killer's.
    return "worker" if _GONE.search(text) and "killed by signal" not in text else None


def _quoted(texts: list[str]) -> str:
    """Return the line of the original message that has the numbers, shortened."""
    patterns = (_KILLED, _SHARED, _HERE, _DEVICE, _GONE)
    # Of a worker's error, the traceback's last line; causes before what follows from them.
    lines = [line.strip() for text in reversed(texts) for line in text.strip().splitlines()[::-1]]
    told = [line for pattern in patterns for line in lines if pattern.search(line)]
    line = " ".join((told or lines)[0].split())
    return line if len(line) <= _QUOTED else f"{line[:_QUOTED]} ..."


def _compute(cfg: CfgNode, step: StepSize) -> list[str]:
    """Return the keys that reduce the memory of a step and are not set yet; those that change no number come first."""
    tries = []
    recomputes = cfg.MODEL.ACT_CHECKPOINT
    if backbone_spec(cfg).act_checkpoint and recomputes is not True:
        values = "True" if recomputes == "light" else "light, then True"
        tries.append(f"MODEL.ACT_CHECKPOINT {values} (now {recomputes})")
    if step.forward > 1:
        now = f"now {cfg.TRAIN.MICRO_BATCH_SIZE}" + ("" if cfg.TRAIN.MICRO_BATCH_SIZE else ", all at once")
        tries.append(f"TRAIN.MICRO_BATCH_SIZE {math.ceil(step.forward / 2)} ({now})")
    if cfg.TRAIN.MIXED_PRECISION in (False, "off"):
        tries.append(f"TRAIN.MIXED_PRECISION bf16 (now {cfg.TRAIN.MIXED_PRECISION})")
    return tries


def _workers(cfg: CfgNode, none: bool) -> list[str]:
    """Return advice to use fewer data workers; `none`: no workers at all."""
    now = cfg.DATA_LOADER.NUM_WORKERS
    if not now:
        return []
    return [f"DATA_LOADER.NUM_WORKERS {0 if none else now // 2} (now {now}, never more than there are cores)"]


def explain_oom(error: BaseException, cfg: CfgNode, processes: int | None = None, testing: bool = False) -> str | None:
    """Explain an error in one line if it means that memory ran out; None for any other error.

    Args:
        error: a failed allocation on a device or in host memory, MemoryError, or the error after a data worker was
            killed.
        processes: on this machine, where they differ from NUM_GPUS.
        testing: whether the run has come to its test; it has where it does not train.
    """
    texts = _texts(error)
    kind = _kind(error, "\n".join(texts))
    if kind is None:
        return None
    step = step_size(cfg, processes)
    if cfg.TRAIN.ENABLE and not testing:
        batch = f"{step.forward} samples at once in each process (TRAIN.BATCH_SIZE {step.batch} over {step.processes})"
        tries = _compute(cfg, step)
    else:
        share = math.ceil(cfg.TEST.BATCH_SIZE / step.processes)
        batch = f"{share} views at once in each process (TEST.BATCH_SIZE {cfg.TEST.BATCH_SIZE} over {step.processes})"
        smaller = max(cfg.TEST.BATCH_SIZE // 2 // step.processes, 1) * step.processes
        tries = [f"TEST.BATCH_SIZE {smaller}"] if smaller < cfg.TEST.BATCH_SIZE else []
        if cfg.TEST.MIXED_PRECISION in (False, "off"):
            tries.append(f"TEST.MIXED_PRECISION bf16 (now {cfg.TEST.MIXED_PRECISION})")
    if kind == "shared":
        what = "the shared memory of this machine (/dev/shm, through which data workers hand over batches)"
        tries = ["a larger /dev/shm (in a container: --shm-size)", *_workers(cfg, none=True)]
    elif kind == "worker":
        what = "a data worker was killed, most likely by the system, because the memory of this machine"
        tries = [*_workers(cfg, none=False), "a job with more memory"]
    elif kind == "machine":
        what = "the memory of this machine (or the limit on this job)"
        tries = [*tries, *_workers(cfg, none=False)]
    else:
        what = "the memory of the device"
    advice = "; ".join(tries) or "a smaller DATA.TRAIN_CROP_SIZE or model: every key that saves memory is set"
    return f"out of memory: {what} is full, with {batch}. Try {advice}. It said: {_quoted(texts)}"
