"""The order of samples, and batches that do not depend on workers, ranks and resuming."""

import gc
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maskfeat.batch import BadSample, Batch, SampleKey
from maskfeat.data.bad_samples import BadSampleLog, TooManyBadSamples, UnreadableSample
from maskfeat.data.collate import collate
from maskfeat.data.datasets.folders import list_class_folders
from maskfeat.data.datasets.imagenet import ImageFolder
from maskfeat.data.device_transforms import DeferredTransform
from maskfeat.data.loader import Loader
from maskfeat.data.resident_loader import ResidentLoader
from maskfeat.data.sample import Sample, unreadable_sample
from maskfeat.data.samplers import EpochSampler
from maskfeat.data.transforms import ImageEvalTransform, ImageTrainTransform
from maskfeat.data.video.decoder import decode_frames
from maskfeat.demos.synthetic import write_video
from maskfeat.errors import UserError, UserFileError
from tests.data.datasets.test_imagenet import draw, make_folder

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def batches(**settings: int | bool) -> list[list[SampleKey]]:
    return list(EpochSampler(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("epoch", [0, 3])
def test_ranks_share_out_the_global_batches_of_one_rank(epoch: int) -> None:
    single = EpochSampler(50, batch_size=8, seed=4)
    single.set_epoch(epoch)
    expected = list(single)
    assert len(expected) == len(single) == 6
    for world in (2, 4):
        ranks = [EpochSampler(50, 8 // world, rank, world, seed=4) for rank in range(world)]
        for sampler in ranks:
            sampler.set_epoch(epoch)
        joined = [sum(parts, []) for parts in zip(*ranks, strict=True)]
        assert joined == expected


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = EpochSampler(40, 4, seed=1)
    first = list(sampler)
    assert first == list(sampler)
    indices = [key.index for batch in first for key in batch]
    assert sorted(indices) == list(range(40)) and indices != sorted(indices)
    assert {key.epoch for batch in first for key in batch} == {0}
    sampler.set_epoch(1)
    assert [key.index for batch in sampler for key in batch] != indices
    assert {key.epoch for batch in sampler for key in batch} == {1}
    assert [key.index for batch in EpochSampler(40, 4, seed=2) for key in batch] != indices


def test_starting_in_the_middle() -> None:
    sampler = EpochSampler(40, 4, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_start(7)
    assert list(sampler) == whole[7:] and len(sampler) == 10
    sampler.set_epoch(3)
    assert len(list(sampler)) == 10


def test_the_epoch_is_fixed_when_the_iteration_begins() -> None:
    sampler = EpochSampler(8, 4)
    iterator = iter(sampler)
    sampler.set_epoch(5)
    assert {key.epoch for batch in iterator for key in batch} == {0}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num, views", [(10, 1), (7, 6), (1, 1), (12, 2)])
def test_evaluation_shows_everything_once(world: int, num: int, views: int) -> None:
    samplers = [EpochSampler(num, 4, r, world, shuffle=False, drop_last=False, views=views) for r in range(world)]
    seen = []
    for sampler in samplers:
        parts = list(sampler)
        assert len(parts) == len(sampler) and all(parts)
        seen += [(key.index, key.view) for part in parts for key in part]
    assert sorted(seen) == [(i, v) for i in range(num) for v in range(views)]
    assert max(map(len, samplers)) - min(map(len, samplers)) <= 1
    if world == 1:
        assert seen == sorted(seen)  # the views of a sample one after the other


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("repeats", [1, 2, 3, 4])
def test_repeated_augmentation(repeats: int, world: int) -> None:
    """An epoch of the same length, of fewer samples, each in `repeats` views; other samples in the next epoch."""
    samplers = [EpochSampler(50, 12 // world, rank, world, seed=2, repeats=repeats) for rank in range(world)]
    epochs = []
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        joined = [sum(parts, []) for parts in zip(*samplers, strict=True)]
        keys = [(key.index, key.view) for part in joined for key in part]
        assert len(joined) == len(samplers[0]) == 4 and len(set(keys)) == len(keys) == 48
        shown = dict.fromkeys(index for index, _ in keys)
        assert len(shown) == 48 // repeats
        assert keys == [(index, view) for index in shown for view in range(repeats)]
        epochs.append(frozenset(shown))
    assert len(set(epochs)) == 3
    whole = EpochSampler(50, 12, seed=2)
    assert [key.index for part in whole for key in part][: 48 // repeats] == list(
        dict.fromkeys(key.index for part in EpochSampler(50, 12, seed=2, repeats=repeats) for key in part)
    )


def test_too_few_samples_names_the_key() -> None:
    with pytest.raises(ValueError, match="15 training samples.*16.*TRAIN.BATCH_SIZE"):
        EpochSampler(15, 8, 0, 2)
    assert len(EpochSampler(16, 8, 0, 2)) == 1


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    return list_class_folders(make_folder(tmp_path_factory.mktemp("images"), {"a": 8, "b": 8}))[0]


def dataset(samples: list[tuple[str, int]], views: int = 1) -> ImageFolder:
    transform = ImageTrainTransform(
        24, (0.3, 1.0), (3 / 4, 4 / 3), MEAN, STD, auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5
    )
    return ImageFolder(samples, transform, seed=3, draw_hidden=draw, num_views=views)


def by_index(loader: Loader) -> dict[int, tuple[Tensor, Tensor]]:
    seen = {}
    for batch in loader:
        assert batch.index is not None and batch.hidden is not None
        for row, index in enumerate(batch.index.tolist()):
            seen[index] = (batch.clip[row], batch.hidden[row])
    return seen


def same(a: dict[int, tuple[Tensor, Tensor]], b: dict[int, tuple[Tensor, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x, y) for index in a for x, y in zip(a[index], b[index], strict=True)
    )


@pytest.mark.slow
def test_samples_do_not_depend_on_workers_ranks_and_resuming(samples: list[tuple[str, int]]) -> None:
    data = dataset(samples)
    here = Loader(data, EpochSampler(16, 4, seed=3))
    there = Loader(data, EpochSampler(16, 4, seed=3), num_workers=2)
    expected = {}
    for epoch in (0, 1):
        here.set_epoch(epoch)
        there.set_epoch(epoch)  # the workers are kept in between
        np.random.rand(), torch.rand(3)
        expected[epoch] = by_index(here)
        assert len(expected[epoch]) == 16
        order = [batch.index.tolist() for batch in here]  # type: ignore[union-attr]
        assert [batch.index.tolist() for batch in there] == order  # type: ignore[union-attr]
        assert same(by_index(there), expected[epoch])
    assert not same(expected[0], expected[1])
    ranks = {}
    for rank in range(2):
        loader = Loader(data, EpochSampler(16, 2, rank, 2, seed=3))
        loader.set_epoch(1)
        ranks.update(by_index(loader))
    assert same(ranks, expected[1])
    there.set_epoch(1)
    there.set_start(2)
    rest = by_index(there)
    assert len(rest) == 8 and same(rest, {index: expected[1][index] for index in rest})


@pytest.mark.slow
def test_loading_does_not_change_the_global_generator(samples: list[tuple[str, int]]) -> None:
    for workers in (0, 1):
        loader = Loader(dataset(samples), EpochSampler(16, 8), num_workers=workers)
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        for _ in loader:
            pass
        assert torch.equal(torch.rand(3), expected)


def test_batches(samples: list[tuple[str, int]]) -> None:
    loader = Loader(dataset(samples, views=2), EpochSampler(16, 4, shuffle=False))
    assert (len(loader), loader.batch_size) == (4, 4)
    batch = next(iter(loader))
    assert batch.clip.shape == (8, 3, 24, 24) and batch.clip.dtype == torch.float32
    assert batch.hidden is not None and batch.hidden.shape == (8, 4, 4) and batch.hidden.dtype == torch.bool
    assert batch.label is not None and batch.label.dtype == torch.int64
    assert batch.index is not None and batch.index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.bad == () and isinstance(batch, Batch)
    assert batch.max_hidden == batch.hidden.flatten(1).sum(1).max()
    (alone,) = loader.iter_samples([1])
    assert torch.equal(alone.clip, batch.clip[2:4]) and alone.max_hidden is not None


def test_batches_come_on_the_device_of_the_loader(samples: list[tuple[str, int]]) -> None:
    loader = Loader(dataset(samples), EpochSampler(16, 4), pin_memory=True, device=torch.device("meta"))
    for batch in (next(iter(loader)), next(loader.iter_samples([3]))):
        assert {t.device.type for t in (batch.clip, batch.label, batch.hidden, batch.index)} == {"meta"}  # type: ignore[union-attr]
        assert batch.max_hidden is not None


def test_collate_lists_each_bad_sample_once() -> None:
    bad = BadSample(1, "p", "c")
    pixels, transform = torch.zeros(2, 2, 3, dtype=torch.uint8), DeferredTransform((3, 2, 2))
    views = [Sample(pixels, transform, 0, None, 2, (bad,)) for _ in range(2)]
    batch = collate([views, [Sample(pixels, transform, 5, None, 3)]]).to_batch(torch.device("cpu"))
    assert batch.max_hidden is None and batch.bad == (bad,) and batch.hidden is None and batch.label is not None
    assert batch.label.tolist() == [0, 0, 5]


def test_datasets_can_be_sent_to_fresh_processes(samples: list[tuple[str, int]]) -> None:
    assert pickle.dumps(dataset(samples))


class Failing(ImageEvalTransform):
    def __call__(self, image: object, rng: object = None) -> Sample:
        raise IndexError("a bug")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_names_the_sample(samples: list[tuple[str, int]], workers: int) -> None:
    broken = ImageFolder(samples, Failing(24, MEAN, STD), seed=0)
    loader = Loader(broken, EpochSampler(16, 4, shuffle=False), num_workers=workers)
    with pytest.raises(RuntimeError, match="0.JPEG.*IndexError: a bug"):
        list(loader)


class Refusing(ImageEvalTransform):
    def __call__(self, image: object, rng: object = None) -> Sample:
        raise UserFileError("a file of yours: set that key")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_user_can_mend_arrives_from_a_worker_as_it_is(
    samples: list[tuple[str, int]], tmp_path: Path, workers: int
) -> None:
    refusing = ImageFolder(samples, Refusing(24, MEAN, STD), seed=0)
    loader = Loader(refusing, EpochSampler(16, 4, shuffle=False), num_workers=workers)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value) == f"{samples[0][0]}: a file of yours: set that key"
    gone = [(str(tmp_path / f"{n}.jpg"), 0) for n in range(8)]
    for loader in (
        Loader(dataset(gone), EpochSampler(8, 4, shuffle=False), num_workers=workers),
        Loader(dataset(gone[:1] * 8), EpochSampler(8, 4), num_workers=workers, pin_memory=True),
    ):
        with pytest.raises(UnreadableSample) as unreadable:
            list(loader)
        assert str(unreadable.value) == f"{gone[0][0]}: no such file; nor can any of the 7 samples after it be read"
        assert unreadable.value.path == gone[0][0] and unreadable.value.cause.startswith("no such file")
    with pytest.raises(UnreadableSample) as unreadable:
        ResidentLoader(dataset(gone), EpochSampler(8, 4), num_workers=workers)
    assert str(unreadable.value).startswith(f"{gone[0][0]}: no such file; nor")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_logged(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    listed, _ = list_class_folders(make_folder(tmp_path / "images", {"a": 8, "b": 8}))
    Path(listed[3][0]).write_bytes(b"")
    Path(listed[9][0]).write_bytes(b"text")
    log = BadSampleLog(tmp_path / "out", 16, 0.2, "train")
    loader = Loader(dataset(listed), EpochSampler(16, 4), log, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        for epoch in range(2):
            loader.set_epoch(epoch)
            shown = [index for batch in loader for index in batch.index.tolist()]  # type: ignore[union-attr]
            assert len(shown) == 16 and 3 not in shown and 9 not in shown
    assert log.indices == {3, 9}
    assert len((tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()) == 2
    assert sum("bad sample" in record.message for record in caplog.records) == 2
    strict = Loader(dataset(listed), EpochSampler(16, 4), BadSampleLog(None, 16, 0.0, "train"), num_workers=workers)
    with pytest.raises(TooManyBadSamples, match="DATA.MAX_BAD_FRACTION"):
        list(strict)


class CollectsGarbage(Dataset[list[Sample]]):
    """Collects the garbage of its process."""

    labels = [0] * 4

    def __len__(self) -> int:
        return 4

    def __getitem__(self, key: object) -> list[Sample]:
        gc.collect()
        return [replace(unreadable_sample((3, 1, 1)), index=SampleKey(*key).index)]  # type: ignore[misc]


@pytest.mark.slow
def test_workers_do_not_hang_on_videos_that_the_parent_decoded(tmp_path: Path) -> None:
    """A converter with threads of its own hangs a forked process that garbage-collects it."""
    path = tmp_path / "video.mp4"
    write_video(path, np.zeros((4, 720, 1280, 3), np.uint8), fps=30)
    gc.disable()
    try:
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        images = [frame.to_ndarray(format="rgb24") for frame in frames]
        decode_frames(path, [0, 1])
        cycle: list[object] = [frames]
        cycle.append(cycle)
        del frames, cycle
        loader = Loader(CollectsGarbage(), EpochSampler(4, 2, shuffle=False), num_workers=1)
        assert [batch.index.tolist() for batch in loader] == [[0, 1], [2, 3]]  # type: ignore[union-attr]
    finally:
        gc.enable()
    assert len(images) == 4
