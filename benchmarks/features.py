"""Extracting features, against reading the files alone and against the network alone."""

import gc
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.cases import VIT_B, Options, image_data
from benchmarks.measure import NotTheSame, Row, Run, Seconds, synchronise
from maskfeat.analysis.extraction import compute_parts, make_plan, outputs
from maskfeat.analysis.feature_files import Features
from maskfeat.analysis.inputs import Inputs, find_inputs, input_loader
from maskfeat.analysis.model import Model
from maskfeat.build import build_objective
from maskfeat.checkpoint.weights import LoadReport
from maskfeat.distributed.world import available_cores

FILES, DIFFERENT = 2000, 200
ASKED = 0.95
NETWORKS: dict[str, tuple[int, list[str]]] = {
    "a small ViT (48 wide, 2 blocks)": (
        1,
        ["MVIT.EMBED_DIM", "48", "MVIT.DEPTH", "2", "MVIT.NUM_HEADS", "2", "MASK.PRETRAIN_DEPTH", "[1]"],
    ),
    "ViT-B": (20, []),
}
"""By name: one in how many of the files is read, and overrides."""


def _network(options: Options, overrides: list[str]) -> Model:
    cfg = options.recipe(VIT_B, 32, *overrides)
    return Model(build_objective(cfg), cfg, "random weights", "pre-trained", LoadReport()).to(options.device)


def _timed(run: Run, device: torch.device) -> Seconds:
    """One run: processor time with that of worker processes that have ended, and the clock's."""

    def processors() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    gc.collect()
    synchronise(device)
    cpu, wall = processors(), time.perf_counter()
    run()
    gc.collect()  # ends the workers
    synchronise(device)
    return Seconds(processors() - cpu, time.perf_counter() - wall)


def _row(name: str, model: Model, inputs: Inputs, options: Options) -> Row:
    workers = available_cores()
    plan = make_plan(model, (1, 1), options.batch or 32, "mean", [])
    (first,) = input_loader(model, inputs, 1, plan.batch_size, 0, [0])
    parts = range(plan.parts(len(inputs)))

    def read() -> None:
        for _ in input_loader(model, inputs, 1, plan.batch_size, workers):
            pass

    @torch.no_grad()
    def compute() -> None:
        for begin in range(0, len(inputs), plan.batch_size):
            outputs(model, first.clip[: len(inputs) - begin], "mean", [])["features"].cpu()

    with TemporaryDirectory(dir=options.folder) as folder:

        def extract() -> None:
            compute_parts(model, inputs, plan, Path(folder), parts, workers)

        sides = {"reading": read, "the network": compute, "extracting": extract}
        found: dict[str, list[Seconds]] = {side: [] for side in sides}
        for _ in range(options.repeats):
            for side, run in sides.items():
                found[side].append(_timed(run, options.device))
        rows = torch.cat(
            [
                torch.from_numpy(chunk)
                for chunk in Features(sorted(Path(folder).iterdir()), [], None, None).chunks("features")
            ]
        )
    expected = outputs(model, first.clip, "mean", [])["features"].cpu()
    if not torch.allclose(rows[: len(expected)], expected, rtol=1e-4, atol=1e-5):
        raise NotTheSame(f"{name}: what is extracted is not what the network gives")
    best = {side: Seconds(min(s.cpu for s in all_), min(s.wall for s in all_)) for side, all_ in found.items()}
    slower = max(("reading", "the network"), key=lambda side: best[side].wall)
    ours = best["extracting"]
    both = Seconds(best["reading"].cpu + best["the network"].cpu, best[slower].wall)
    speeds = ", ".join(f"{side} {len(inputs) / best[side].wall:.4g}" for side in sides)
    return Row(
        f"features of {len(inputs)} images by {name}: reading and the network alone",
        both,
        ours,
        asked=f">= {ASKED:.2f} of the slower one, by the clock",
        note=f"images/s by the clock: {speeds}: {both.wall / ours.wall:.2f} of {slower}",
    )


def measure_extract(options: Options) -> Iterator[Row]:
    """Yield a row for a network that is much faster than the reading of files, and for one that is much slower.

    Between them, on a machine whose cores both share, neither has its own speed: the ratio of the row is that of the
    processor time that both take alone to that of extracting.
    """
    total = options.files or FILES
    root = image_data(options, min(total, DIFFERENT))[1]
    paths = find_inputs(Path(root) / "train").paths
    for name, (one_in, overrides) in NETWORKS.items():
        number = max(total // one_in, 1)
        inputs = find_inputs((paths * (number // len(paths) + 1))[:number])
        yield _row(name, _network(options, overrides), inputs, options)
