"""Reading images from tar archives and parquet files, against the folder that they were made from."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from benchmarks.cases import VIT_B, Options, image_data
from benchmarks.measure import NotTheSame, Row, in_turn
from benchmarks.reading import CPU, IN_THIS_PROCESS, first_epoch, per_second
from maskfeat.analysis.checks.collect import collect
from maskfeat.analysis.preparation.shards import make_shards, ordered
from maskfeat.build import build_loader
from maskfeat.data.shards import parquet

_ROWS = 100
"""Of a row group, as the Hub has ImageNet."""
_STARTED = 10_000
"""Samples of the set whose start is timed."""


def write_parquet(folder: str, output: Path) -> None:
    """Write a folder's training set as the Hub would have it."""
    arrow = parquet.load_pyarrow()
    import pyarrow

    samples = ordered(collect(folder, None))["train"]
    rows = [{"bytes": Path(sample.path).read_bytes(), "path": Path(sample.path).name} for sample in samples]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(rows, kind), "label": [sample.label for sample in samples]})
    output.mkdir(parents=True, exist_ok=True)
    arrow.write_table(table, output / "train-00000-of-00001.parquet", row_group_size=_ROWS)


def measure_shards(options: Options) -> Iterator[Row]:
    """An epoch of a training set from its folder and from shards of it, in this process, files in the page cache."""
    folder = image_data(options, 400)[1]
    root = Path(options.folder)
    make_shards(collect(folder, None), root / "tar", 10**9, 0, 90, 0)
    write_parquet(folder, root / "parquet")
    opened = _count_opened()
    for form in ("tar", "parquet"):
        loaders, batches, counts = [], [], []
        for place in (folder, str(root / form)):
            before = opened()
            cfg = options.recipe(VIT_B, 16, *IN_THIS_PROCESS, "DATA.PATH_TO_DATA_DIR", place)
            loaders.append(build_loader(cfg, "train"))
            loaders[-1].set_epoch(0)
            batches.append([(batch.clip[:, :, ::8].clone(), batch.label) for batch in loaders[-1]])
            counts.append(opened() - before)
        if not all(torch.equal(*both) for pair in zip(*batches, strict=True) for both in zip(*pair, strict=True)):
            raise NotTheSame(f"{form}: other batches than those of the folder that it was made from")
        sides = {"reference": first_epoch(loaders[0]), "ours": first_epoch(loaders[1])}
        with mock.patch.object(parquet, "_group", parquet._group.__wrapped__):
            seconds = in_turn(sides, options.repeats, CPU)
        number = len(loaders[0]) * loaders[0].batch_size
        # pyarrow opens files outside of Python, where they are not counted. Of a large set that is shuffled, hardly any
        # row group is among those that were read last: none is kept here.
        note = f"opens {counts[0]} -> {counts[1]} files" if form == "tar" else f"row groups of {_ROWS}, one an image"
        note = f"same bits; {note}"
        what = f"{number} images in {form}"
        row = Row(what, seconds["reference"], seconds["ours"], asked=">= 0.95x", note=note)
        yield per_second(row, number, "images")
    yield from _start(options)


def _start(options: Options) -> Iterator[Row]:
    """The start of an epoch, up to its first batch: a folder and the same in archives whose index is there."""
    data = Path(options.folder) / "many/train"
    content = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(content, "JPEG")
    for name in ("a", "b"):
        (data / name).mkdir(parents=True, exist_ok=True)
        for number in range(_STARTED // 2):
            (data / name / f"{number:05d}.jpg").write_bytes(content.getvalue())
    target = Path(options.folder) / "many_tar"
    make_shards(collect(str(data.parent), None), target, 2 * 10**6, 0, 90, 0)

    def begin(place: Path) -> Callable[[], None]:
        cfg = options.recipe(VIT_B, 16, *IN_THIS_PROCESS, "DATA.PATH_TO_DATA_DIR", str(place))

        def run() -> None:
            next(iter(build_loader(cfg, "train")))

        return run

    started = time.perf_counter()
    begin(target)()
    clock = time.perf_counter() - started
    seconds = in_turn({"reference": begin(data.parent), "ours": begin(target)}, options.repeats, CPU)
    note = f"{clock:.2f} s by the clock, {len(list(target.glob('*.tar')))} archives"
    what = f"start of {_STARTED} images, to the first batch"
    yield Row(what, seconds["reference"], seconds["ours"], asked="< 2 s", note=note)


def _count_opened() -> Callable[[], int]:
    """Return how many files this process has opened from now on; an audit hook cannot be taken away again."""
    number = [0]

    def hook(event: str, args: tuple[object, ...]) -> None:
        number[0] += event == "open"

    sys.addaudithook(hook)
    return lambda: number[0]
