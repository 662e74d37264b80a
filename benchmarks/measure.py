"""Seconds and bytes of two sides that compute the same, and the check that they do."""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]

GRADIENT_TOLERANCE = 1e-5  # of the largest gradient, in float32
LOSS_TOLERANCE = 1e-5  # relative


class NotTheSame(Exception):
    """Two sides that are to compute the same do not: their times would mean nothing."""


class Seconds(NamedTuple):
    """Of one run: processor time of this process (all threads; on CUDA that of the device), and by the clock."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Row:
    """A line of the table. Times in seconds, minimum over the repeats; memory in MiB above what lay there before.

    Attributes:
        what: what was computed, of how much.
        asked: what is to be reached, in words; "" where nothing was set.
        note: what the check found, or what else is worth knowing.
    """

    what: str
    reference: Seconds
    ours: Seconds
    reference_mib: float | None = None
    ours_mib: float | None = None
    asked: str = ""
    note: str = ""

    @property
    def ratio(self) -> float:
        """Processor time of the reference over ours."""
        return self.reference.cpu / self.ours.cpu

    @property
    def memory_ratio(self) -> float | None:
        """Ours over the reference's, as it is asked for."""
        return None if not self.reference_mib or self.ours_mib is None else self.ours_mib / self.reference_mib

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "what": self.what,
            "reference_s": self.reference.cpu,
            "ours_s": self.ours.cpu,
            "reference_wall_s": self.reference.wall,
            "ours_wall_s": self.ours.wall,
            "ratio": self.ratio,
            "reference_mib": self.reference_mib,
            "ours_mib": self.ours_mib,
            "memory_ratio": self.memory_ratio,
            "asked": self.asked,
            "note": self.note,
        }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Run, device: torch.device) -> Seconds:
    """One run."""
    synchronise(device)
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    synchronise(device)
    seconds = Seconds(time.process_time() - cpu, time.perf_counter() - wall)
    return Seconds(seconds.wall, seconds.wall) if device.type == "cuda" else seconds


def in_turn(sides: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, Seconds]:
    """The minimum of `repeats` runs of each side, the sides in turn, after one run of each that does not count.

    Processor time rather than the clock's, and the minimum rather than the mean: what other work on the machine adds
    is not the side's own. In turn, so that a slow minute meets both.
    """
    for run in sides.values():
        run()
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            gc.collect()  # not in the middle of a run
            found[name].append(timed(run, device))
    return {name: Seconds(min(s.cpu for s in runs), min(s.wall for s in runs)) for name, runs in found.items()}


def busy_seconds(run: Run, device: torch.device) -> float:
    """Seconds in which kernels of a run keep the device busy, waits for their launches left out; on the CPU processor
    time."""
    if device.type != "cuda":
        return timed(run, device).cpu
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        synchronise(device)
    return sum(seconds for _, _, seconds in kernels_of(profiled))


def kernels_of(profiled: profile) -> list[tuple[str, int, float]]:
    """(name, calls, seconds) of each kernel on the device."""
    return [
        (event.key, event.count, event.self_device_time_total / 1e6)
        for event in profiled.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]


def peak_mib(run: Run, device: torch.device) -> float:
    """The most memory that tensors took during a run, above what was there before it, in MiB.

    On CUDA the caching allocator keeps this number. On the CPU the profiler writes down every allocation and release
    of PyTorch's allocator, those inside of operators and of the backward pass included, and the highest level of
    their running sum is taken: it is the same in every run, to the byte. The resident size of the process is not: it
    counts pages that malloc keeps for later and leaves out those not touched yet. What libraries take for themselves
    (scratch space of oneDNN's kernels) goes past the allocator and is not counted, on either side.
    """
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it would report that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        run()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak / 2**20


def compare(
    what: str, sides: Mapping[str, Run], repeats: int, device: torch.device, asked: str = "", note: str = ""
) -> Row:
    """Time and memory of "reference" and "ours"."""
    seconds = in_turn(sides, repeats, device)
    peaks = {name: peak_mib(run, device) for name, run in sides.items()}
    return Row(what, seconds["reference"], seconds["ours"], peaks["reference"], peaks["ours"], asked, note)


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Convolutions in full float32 on CUDA, too: two forms of one sum agree only there."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def check_same(
    what: str,
    ours: Tensor,
    reference: Tensor,
    mine: Sequence[Tensor | None],
    theirs: Sequence[Tensor | None],
    gradient_tolerance: float = GRADIENT_TOLERANCE,
) -> str:
    """Outputs (or losses) and gradients of two sides; in words how far apart they are.

    Raises:
        NotTheSame: where they are further apart than rounding explains.
    """
    scale = reference.abs().max().item()
    out = (ours - reference).abs().max().item() / scale
    if [gradient is None for gradient in mine] != [gradient is None for gradient in theirs]:
        raise NotTheSame(f"{what}: other parameters have gradients than in the reference's form")
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    largest = max(b.abs().max().item() for _, b in pairs)
    apart = max((a - b).abs().max().item() for a, b in pairs) / largest
    # Written so that a NaN fails.
    if not (out <= LOSS_TOLERANCE and apart <= gradient_tolerance):
        raise NotTheSame(
            f"{what}: ours and the reference's form are {out:.1e} apart in what comes out (at most {LOSS_TOLERANCE:g}) "
            f"and {apart:.1e} in gradients (at most {gradient_tolerance:g} of the largest)"
        )
    return f"out {out:.0e}, gradients {apart:.0e} apart"
