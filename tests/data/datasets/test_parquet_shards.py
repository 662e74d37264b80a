"""Images in parquet files, as the Hugging Face Hub has them, give what their folder gives."""

import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.data.bad_samples import UnreadableSample, open_regular_file
from maskfeat.data.datasets.base import DatasetRequest, Split
from maskfeat.data.datasets.layouts import find_split
from maskfeat.data.loader import BatchLoader
from maskfeat.data.shards import parquet
from maskfeat.data.shards.index import read_indices
from maskfeat.data.shards.members import Member
from maskfeat.distributed.world import World
from maskfeat.errors import UserError
from tests.small import MVIT_FT, RECIPES, VIT_FT, VIT_PT, images

PT, FT = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"
Row = tuple[str | None, bytes | None, int | None]


def write_rows(path: Path, rows: list[Row], group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pyarrow.array(
        [{"bytes": content, "path": name} for name, content, _ in rows],
        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    )
    label = pyarrow.array([label for _, _, label in rows], pyarrow.int64())
    pyarrow.parquet.write_table(pyarrow.table({"image": image, "label": label}), path, row_group_size=group)
    return path


@pytest.fixture(scope="module")
def hub(image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as it is downloaded: data/train-00000-of-00002.parquet and so on, of a test set without labels, too."""
    root = tmp_path_factory.mktemp("hub")
    classes = sorted(path.name for path in (image_data / "train").iterdir())
    for split, name, shards in (("train", "train", 3), ("val", "validation", 1)):
        files = [path for folder in classes for path in sorted((image_data / split / folder).iterdir())]
        rows: list[Row] = [(path.name, path.read_bytes(), classes.index(path.parts[-2])) for path in files]
        for number in range(shards):
            part = rows[number * len(rows) // shards : (number + 1) * len(rows) // shards]
            write_rows(root / f"data/{name}-{number:05d}-of-{shards:05d}.parquet", part)
    write_rows(root / "data/test-00000-of-00001.parquet", [("x.JPEG", b"x", -1)])
    (root / "README.md").write_text("of the set")
    return root


def loader_of(root: Path, split: str, labelled: bool, *opts: str, world: World | None = None) -> BatchLoader:
    recipe, small = (FT, VIT_FT) if labelled else (PT, VIT_PT)
    return build_loader(load_config(recipe, [*small, *images(root), *opts]), split, world)


def find(root: Path, split: str = "train", labelled: bool = True) -> Split:
    recipe, small = (FT, VIT_FT) if labelled else (PT, VIT_PT)
    return find_split(load_config(recipe, [*small, *images(root)]), DatasetRequest(split, augmented=True), "image")


def clips(loader: BatchLoader, epoch: int = 0, start: int = 0) -> list[torch.Tensor]:
    loader.set_epoch(epoch)
    loader.set_start(start)
    return [batch.clip for batch in loader]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "labelled", "workers"),
    [("train", True, "0"), ("train", True, "2"), ("val", True, "2"), ("test", True, "0"), ("train", False, "2")],
)
def test_the_batches_are_those_of_the_folder(
    split: str, labelled: bool, workers: str, image_data: Path, hub: Path
) -> None:
    folder = loader_of(image_data, split, labelled, "DATA_LOADER.NUM_WORKERS", workers)
    shards = loader_of(hub, split, labelled, "DATA_LOADER.NUM_WORKERS", workers)
    assert shards.labels == folder.labels
    assert same(clips(folder), clips(shards)) and same(clips(folder, 1), clips(shards, 1))


def test_they_go_on_with_another_number_of_processes(image_data: Path, hub: Path) -> None:
    whole = clips(loader_of(image_data, "train", False), 1)
    parts = [clips(loader_of(hub, "train", False, world=World(rank, 2, rank, 2)), 1, start=1) for rank in (0, 1)]
    for batch, pair in zip(whole[1:], zip(*parts, strict=True), strict=True):
        both = torch.cat(pair)
        assert {clip.numpy().tobytes() for clip in both} == {clip.numpy().tobytes() for clip in batch}


def test_what_is_said_and_how_rows_are_named(hub: Path) -> None:
    found = find(hub)
    assert found.place == f"3 shards of {hub} (row groups of up to 4 images)" and found.left_out == ""
    assert found.samples[14][0].startswith(f"{hub}/data/train-00001-of-00003.parquet::1/")
    assert "(the shards of the test set have no classes)" in find(hub, "test").place


def test_samples_in_order_read_each_row_group_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    real = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda self, group, **keys: (read.append((id(self), group)), real(self, group, **keys))[1],
    )
    parquet._group.cache_clear()
    for path, _ in find(hub).samples:
        open_regular_file(path).close()
    assert len(read) == len(set(read)) == 3 * 4


def test_rows_without_an_image_are_bad_samples(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.parquet", [("a.jpg", b"x", 0), (None, None, 1), (None, b"", 1)])
    samples = find(tmp_path).samples
    for number in (1, 2):
        with pytest.raises(UnreadableSample, match=f"train.parquet::{number}: the row has no image"):
            open_regular_file(samples[number][0])


def test_a_file_that_changes_in_a_run(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.parquet", [("a.jpg", b"x", 0)])
    ((member, _),) = find(tmp_path).samples
    os.utime(path, ns=(0, 1))
    parquet._file.cache_clear()
    parquet._group.cache_clear()
    assert isinstance(member, Member)
    with pytest.raises(UserError, match="train.parquet has changed since its index was made"):
        open_regular_file(member)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": ["x"]}, r"has the columns text \(string\); expected are image \(a struct of bytes, and maybe path\)"),
        ({"image": [b"x"], "label": [0]}, r"has the columns image \(binary\), label \(int64\); expected"),
        ({"image": [{"bytes": "x", "path": "y"}]}, "has the columns image"),
        ({"image": [{"bytes": b"x"}], "label": ["dog"]}, r"label \(string\); expected .* and label \(whole numbers"),
        ({"image": [{"bytes": b"x"}], "label": [-7]}, "row 0 has the label -7, which is no number of 0 or more"),
    ],
)
def test_another_schema(columns: dict[str, list[object]], said: str, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=said) as raised:
        find(tmp_path, labelled=False)
    assert "train.parquet" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet" * 100])
def test_damage(content: bytes, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.parquet", [("a.jpg", b"x" * 100, 0)])
    for damaged in (content, path.read_bytes()[:-20]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train.parquet is damaged, cut short or not a parquet file: "):
            read_indices([str(path)])


def test_labels_are_asked_for_where_classes_are_learned(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.parquet", [("a.jpg", b"x", None), ("b.jpg", b"x", 1)])
    assert [label for _, label in find(tmp_path, labelled=False).samples] == [-1, -1]
    with pytest.raises(UserError, match=r"1 image of train have no class, such as '0/a.jpg' in .*train.parquet"):
        find(tmp_path)


def test_videos_are_not_in_parquet_files(hub: Path) -> None:
    cfg = load_config(RECIPES / "k400_MVITv2_S_16x4_FT.yaml", [*MVIT_FT, *images(hub)])
    with pytest.raises(UserError, match="parquet files are read for images, and the recipe takes videos"):
        find_split(cfg, DatasetRequest("train", augmented=True), "video")


def test_without_pyarrow(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"parquet files need pyarrow, .*: pip install '.\[parquet\]'"):
        parquet.index_parquet(str(hub / "data/train-00000-of-00003.parquet"))
