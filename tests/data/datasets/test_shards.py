"""Data sets in tar archives give what the folders give that they were made from; what is wrong with one is named."""

import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskfeat.analysis.checks.collect import collect
from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.data.bad_samples import UnreadableSample, open_regular_file
from maskfeat.data.datasets.base import DatasetRequest, NoValidation, Split
from maskfeat.data.datasets.classes import describe_split
from maskfeat.data.datasets.layouts import find_split
from maskfeat.data.image_reader import read_image
from maskfeat.data.loader import BatchLoader
from maskfeat.data.shards import members
from maskfeat.data.shards.index import ENDING, cache_folder, read_indices
from maskfeat.data.shards.members import Member
from maskfeat.data.video.decoder import decode_frames
from maskfeat.distributed.world import World
from maskfeat.errors import UserError
from tests.data.media import write_video
from tests.data.shards import shards_of_folder, write_samples, write_tar
from tests.small import MVIT_FT, MVIT_PT, RECIPES, VIT_FT, VIT_PT, images

PT, FT = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"
CLIPS_PT, CLIPS_FT = RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", RECIPES / "k400_MVITv2_S_16x4_FT.yaml"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def packed(image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards_of_folder(image_data, tmp_path_factory.mktemp("packed"))


def loader_of(root: Path, split: str, labelled: bool, *opts: str, world: World | None = None) -> BatchLoader:
    recipe, small = (FT, VIT_FT) if labelled else (PT, VIT_PT)
    return build_loader(load_config(recipe, [*small, *images(root), *opts]), split, world)


def find(
    root: Path, split: str = "train", labelled: bool = True, *opts: str, classes: list[str] | None = None
) -> Split:
    recipe, small = (FT, VIT_FT) if labelled else (PT, VIT_PT)
    cfg = load_config(recipe, [*small, *images(root), *opts])
    return find_split(cfg, DatasetRequest(split, augmented=split == "train", classes=classes), "image")


def shown(loader: BatchLoader, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
    loader.set_epoch(epoch)
    loader.set_start(start)
    for batch in loader:
        hidden = torch.zeros(0) if batch.hidden is None else batch.hidden
        assert not batch.bad
        yield batch.clip, batch.label, batch.index, hidden


def same(one: list[tuple[Tensor, ...]], other: list[tuple[Tensor, ...]]) -> bool:
    return len(one) == len(other) > 0 and all(
        torch.equal(a, b) for batches in zip(one, other, strict=True) for a, b in zip(*batches, strict=True)
    )


# ------------------------------------------------------------------------------------------------ as the folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_batches_of_a_classifier_are_those_of_the_folder(
    split: str, workers: str, image_data: Path, packed: Path
) -> None:
    folder = loader_of(image_data, split, True, "DATA_LOADER.NUM_WORKERS", workers)
    shards = loader_of(packed, split, True, "DATA_LOADER.NUM_WORKERS", workers)
    assert shards.classes == folder.classes and shards.labels == folder.labels
    for epoch in (0, 1):
        assert same([*shown(folder, epoch)], [*shown(shards, epoch)])


@pytest.mark.parametrize("backend", ["pil", "simplejpeg"])
def test_the_batches_of_pre_training_are_those_of_the_folder(backend: str, image_data: Path, packed: Path) -> None:
    opts = ("DATA_LOADER.IMAGE_BACKEND", backend)
    assert same(
        [*shown(loader_of(image_data, "train", False, *opts))], [*shown(loader_of(packed, "train", False, *opts))]
    )


def test_they_go_on_with_another_number_of_processes(image_data: Path, packed: Path) -> None:
    """Two steps by one process, the rest of the epoch by two: together what one process reads of the folder."""
    whole = [*shown(loader_of(image_data, "train", True), 3)]
    first = [*shown(loader_of(packed, "train", True), 3)][:2]
    worlds = [World(rank, 2, rank, 2) for rank in (0, 1)]
    rest = [[*shown(loader_of(packed, "train", True, world=world), 3, start=2)] for world in worlds]
    assert same(first, whole[:2]) and len(whole) == 5
    for batch, parts in zip(whole[2:], zip(*rest, strict=True), strict=True):
        index = torch.cat([part[2] for part in parts])
        order = torch.cat([(index == number).nonzero()[:, 0] for number in batch[2]])
        assert sorted(index.tolist()) == sorted(batch[2].tolist())
        assert torch.equal(torch.cat([part[0] for part in parts])[order], batch[0])


def test_a_tar_of_class_folders(image_data: Path, tmp_path: Path) -> None:
    """As `tar` writes it, in any order, with the split's folder or without."""
    files = sorted(image_data.glob("train/*/*"), key=lambda path: path.name[::-1])
    half = len(files) // 2
    write_tar(tmp_path / "train/a.tar", [(f"./{p.parts[-2]}/{p.name}", p.read_bytes()) for p in files[:half]])
    write_tar(tmp_path / "train/b.tar", [(f"set/train/{p.parts[-2]}/{p.name}", p.read_bytes()) for p in files[half:]])
    write_tar(
        tmp_path / "val.tar", [(f"val/{p.parts[-2]}/{p.name}", p.read_bytes()) for p in image_data.glob("val/*/*")]
    )
    for split in ("train", "val"):
        folder, shards = (loader_of(root, split, True) for root in (image_data, tmp_path))
        assert folder.classes == shards.classes and folder.labels == shards.labels
    write_tar(tmp_path / "train/b.tar", [(f"./{p.parts[-2]}/{p.name}", p.read_bytes()) for p in files[half:]])
    # Now the names of both archives sort as those of the folder do.
    assert same([*shown(loader_of(image_data, "train", True))], [*shown(loader_of(tmp_path, "train", True))])


def test_clips(clip_data: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        lines = [line.rsplit(" ", 1) for line in (clip_data / f"{split}.csv").read_text().splitlines()]
        samples = [(name, (clip_data / name).read_bytes(), int(label)) for name, label in lines]
        write_samples(tmp_path / split, "clips", list(samples), 5)
    for recipe, small, split in (
        (CLIPS_FT, MVIT_FT, "train"),
        (CLIPS_FT, MVIT_FT, "test"),
        (CLIPS_PT, MVIT_PT, "train"),
    ):
        opts = [*small, "DATA.PATH_PREFIX", str(clip_data), "TRAIN.BATCH_SIZE", "4"]
        folder, shards = (
            [*shown(build_loader(load_config(recipe, [*opts, *images(root)]), split))] for root in (clip_data, tmp_path)
        )
        assert same(folder, shards)


def test_a_video_is_read_as_from_its_file(tmp_path: Path) -> None:
    """Containers of which FFmpeg looks at the ending, or seeks to the end."""
    for name in ("a.mp4", "b.mkv", "c.mpg", "d.ts"):
        codec = "mpeg2video" if name.endswith("mpg") else "libx264"
        video = write_video(tmp_path / name, frames=12, codec=codec)
        shard = write_tar(tmp_path / "x.tar", [("pad.jpg", b"x" * 1000), (name, video.read_bytes())])
        (index,) = read_indices([str(shard)])
        entry = index.entries[1]
        member = Member(str(shard), entry.name, index.stamp, (entry.first, entry.second))
        one, other = (decode_frames(path, [0, 7, 11])[0] for path in (str(video), member))
        assert (one == other).all()


def test_a_tar_is_a_source_beside_folders(image_data: Path, packed: Path, tmp_path: Path) -> None:
    shard = packed / "train-000001.tar"
    given = f"[['{image_data}', 1], ['{shard}', 2]]"
    cfg = load_config(PT, [*VIT_PT, "DATA.SOURCES", given])
    found = find_split(cfg, DatasetRequest("train", augmented=True), "image")
    assert [number for number, _ in found.mixture] == [40, 7] and f"1 shard of {shard}" in found.place
    assert found.samples[40][0].startswith(f"{shard}::")
    assert len(find_split(cfg, DatasetRequest("val", augmented=False), "image").samples) == 16


def test_what_is_said_of_a_split(packed: Path, tmp_path: Path) -> None:
    found = loader_of(packed, "train", True).dataset
    assert describe_split("train", found, 4) == f"train: 6 shards of {packed}, 40 samples, 4 classes"
    assert "(there are no shards of a test set)" in find(packed, "test").place


# ------------------------------------------------------------------------------------------------ what a tar may hold


JPEG = b"\xff\xd8 not read here"


def entries(tmp_path: Path, *files: tuple[str, bytes]) -> list[tuple[str, int | str | None]]:
    (index,) = read_indices([str(write_tar(tmp_path / "train.tar", files))])
    return [(entry.name, entry.label) for entry in index.entries]


def test_classes_beside_a_sample(tmp_path: Path) -> None:
    """In .cls or .json, before it or after it; further images of a key are no samples."""
    found = entries(
        tmp_path,
        ("0.cls", b"3\n"),
        ("0.jpg", JPEG),
        ("a.b/1.json", b'{"label": 2, "caption": "x"}'),
        ("a.b/1.jpg", JPEG),
        ("2.png", JPEG),
        ("2.json", b'{"cls": "cat"}'),
        ("2.cls", b"dog"),
        ("2.seg.png", JPEG),
        ("3.x.jpg", JPEG),
        ("3.x.cls", b"0"),
        ("4.jpg", JPEG),
        ("4.json", b'{"caption": "x"}'),
        ("5.mp4", JPEG),
        ("5.jpg", JPEG),
        ("5.cls", b"7"),
        ("._6.jpg", JPEG),
        ("readme.txt", b"x"),
    )
    assert found == [
        ("0.jpg", 3),
        ("a.b/1.jpg", 2),
        ("2.png", "dog"),
        ("3.x.jpg", 0),
        ("4.jpg", None),
        ("5.mp4", 7),
        ("5.jpg", 7),
    ]


def test_names_of_classes_beside_samples_are_sorted(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [("0.jpg", JPEG), ("0.cls", b"dog"), ("1.jpg", JPEG), ("1.cls", b"cat")])
    write_tar(tmp_path / "val-0.tar", [("0.jpg", JPEG), ("0.cls", b"dog")])
    opts = ("MODEL.NUM_CLASSES", "2")
    found = find(tmp_path, "train", True, *opts)
    assert found.classes == ["cat", "dog"] and [label for _, label in found.samples] == [1, 0]
    assert [label for _, label in find(tmp_path, "val", True, *opts).samples] == [1]
    assert [label for _, label in find(tmp_path, "test", True, *opts, classes=["bird", "dog"]).samples] == [1]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000000.tar", "train"),
        ("imagenet1k-validation-00.tar", "val"),
        ("train/part_0.tar", "train"),
        ("val/train-x.tar", "val"),
        ("data/test-00000-of-00028.parquet", "test"),
        ("trainer/0.tar", ""),
    ],
)
def test_the_split_of_a_shard(name: str, split: str) -> None:
    from maskfeat.data.datasets.shard_sets import split_of

    assert split_of(name) == split


def test_pre_training_takes_any_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("x/0.jpg", JPEG), ("1.jpg", JPEG), ("0.txt", b"a dog")])
    write_tar(tmp_path / "test.tar", [("2.jpg", JPEG)])
    found = find(tmp_path, "train", False)
    assert [label for _, label in found.samples] == [-1, -1] and found.left_out == "1 .txt file"
    with pytest.raises(NoValidation, match="holds no shards of val"):
        find(tmp_path, "val", False)
    write_tar(tmp_path / "in/deep/train-0.tar", [("3.jpg", JPEG)])
    (only,) = find(tmp_path, "train", False, "DATA.FORMAT", "tar").samples
    assert only[0].endswith("train-0.tar::3.jpg")


def test_auto_reads_folders_where_there_are_some(tmp_path: Path, image_data: Path) -> None:
    """An archive beside the folders that it was unpacked into is no shard, unless DATA.FORMAT says so."""
    (tmp_path / "train").symlink_to(image_data / "train")
    write_tar(tmp_path / "train.tar", [("a/0.jpg", JPEG)])
    assert find(tmp_path).place == f"folder {tmp_path / 'train'}"
    assert find(tmp_path, "train", True, "DATA.FORMAT", "tar").place == f"1 shard of {tmp_path}"
    with pytest.raises(UserError, match="no .parquet file below .*, and DATA.FORMAT is 'parquet'"):
        find(tmp_path, "train", True, "DATA.FORMAT", "parquet")


@pytest.mark.parametrize(("loose", "shard"), [("a.jpg", "scans.tar"), ("train/a.png", "train.tar"), ("a.mp4", "x.tar")])
def test_auto_takes_neither_shards_nor_the_files_beside_them(loose: str, shard: str, tmp_path: Path) -> None:
    """Either alone would leave the other out without a word; DATA.FORMAT says which is meant."""
    write_tar(tmp_path / shard, [("0.jpg", JPEG)])
    (tmp_path / loose).parent.mkdir(exist_ok=True)
    (tmp_path / loose).touch()
    ending = loose[-4:]
    for labelled in (False, True):
        with pytest.raises(
            UserError, match=rf"holds 1 .tar file and 1 {ending} file, .*: set DATA.FORMAT to 'folder' or 'tar'"
        ):
            find(tmp_path, "train", labelled)
    assert len(find(tmp_path, "train", False, "DATA.FORMAT", "tar").samples) == 1
    if not loose.endswith("mp4"):
        ((path, _),) = find(tmp_path, "train", False, "DATA.FORMAT", "folder").samples
        assert path == str(tmp_path / loose)


def test_lists_are_taken_for_the_set_whatever_lies_beside_them(tmp_path: Path) -> None:
    """A check of the data looks at what training reads."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    write_tar(tmp_path / "backup.tar", [("0.jpg", JPEG)])
    (tmp_path / "train.csv").write_text(f"{tmp_path}/a.jpg 0\n")
    assert len(find(tmp_path, "train", False).samples) == 1
    assert [sample.path for sample in collect(str(tmp_path), None).samples] == [f"{tmp_path}/a.jpg"]


# ------------------------------------------------------------------------------------------------ the index


def test_the_index_is_made_once(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG)])
    first = read_indices([str(shard)])
    assert Path(f"{shard}{ENDING}").is_file()
    monkeypatch.setattr("maskfeat.data.shards.index.INDEXERS", {})
    assert read_indices([str(shard)]) == first
    os.utime(shard, ns=(0, 1))
    with pytest.raises(KeyError):
        read_indices([str(shard)])


def test_the_index_of_an_older_shard_is_made_again(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG)])
    read_indices([str(shard)])
    write_tar(shard, [("b.jpg", JPEG)])
    os.utime(shard, ns=(0, 1))
    (index,) = read_indices([str(shard)])
    assert [entry.name for entry in index.entries] == ["b.jpg"] and index.stamp.changed == 1


@pytest.mark.parametrize("change", ["name", "place", "label", "entries", "json"])
def test_an_index_that_cannot_be_right_is_made_again(change: str, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.cls", b"1")])
    good = read_indices([str(shard)])
    path = Path(f"{shard}{ENDING}")
    content = json.loads(path.read_text())
    wrong = {"name": [1, 0, 1, 1], "place": ["a.jpg", 0, 1 << 20, 1], "label": ["a.jpg", 0, 1, True], "entries": 3}
    content["entries"] = [wrong[change]] if change in wrong else 3
    path.write_text("{" if change == "json" else json.dumps(content))
    assert read_indices([str(shard)]) == good


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The index goes into the cache folder or, where that cannot be written either, is made in each start."""
    caplog.set_level("INFO", "maskfeat")
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG)])
    Path(f"{shard}{ENDING}").mkdir()  # as root, any folder can be written
    first = read_indices([str(shard)])
    (kept,) = cache_folder().iterdir()
    before = kept.stat().st_mtime_ns
    assert read_indices([str(shard)]) == first and kept.stat().st_mtime_ns == before
    kept.unlink()
    cache_folder().rmdir()
    cache_folder().write_text("")
    assert read_indices([str(shard)]) == first
    assert "could be kept neither beside them nor in" in caplog.text


def test_a_shard_that_changes_in_a_run_is_no_bad_sample(tmp_path: Path, image_data: Path) -> None:
    root = shards_of_folder(image_data, tmp_path / "set")
    loader = loader_of(root, "train", True)
    os.utime(root / "train-000000.tar", ns=(0, 1))
    with pytest.raises(UserError, match=r"train-000000.tar has changed since its index was made: start the run again"):
        list(shown(loader))


def test_members_are_picklable_and_handles_few(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members._handle.cache_clear()
    found = find(packed).samples
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: (opened.append(str(path)), real(path, *rest))[1])
    for path, _ in [*found, *found]:
        again = pickle.loads(pickle.dumps(path))
        assert again == path and isinstance(again, Member)
        with open_regular_file(again) as file:
            assert file.read(2) == b"\xff\xd8" or file.name.endswith(".png")
    assert len(opened) == len(set(opened)) == 6


def test_bad_samples_are_named_by_shard_and_member(tmp_path: Path, image_data: Path) -> None:
    good = next(image_data.glob("train/*/*")).read_bytes()
    files = [(f"{number}.jpg", good, number % 4) for number in range(20)]
    files[3] = ("3.jpg", b"\xff\xd8 broken", 3)
    files[4] = ("4.jpg", b"", 0)
    write_samples(tmp_path / "set", "train", files, 30)
    loader = loader_of(tmp_path / "set", "train", True, "OUTPUT_DIR", str(tmp_path / "out"))
    loader.set_epoch(0)
    found = {bad.path: bad.cause for batch in loader for bad in batch.bad}
    shard = tmp_path / "set/train-000000.tar"
    listed = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    assert {line["path"] for line in listed} == set(found) <= {f"{shard}::3.jpg", f"{shard}::4.jpg"} and found
    assert found.get(f"{shard}::4.jpg", "the file is empty") == "the file is empty"
    with pytest.raises(UnreadableSample, match=r"train-000000.tar::3.jpg: (not a JPEG|damaged)"):
        read_image(loader.dataset.path(3))


# ------------------------------------------------------------------------------------------------ bad input


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (special("../out.jpg", tarfile.REGTYPE), r"the member '../out.jpg' does not lie in the archive's own folder"),
        (special("a/../../out.jpg", tarfile.REGTYPE), "does not lie in"),
        (special("/etc/passwd", tarfile.REGTYPE), "the member '/etc/passwd' does not lie in"),
        (special("b.jpg", tarfile.SYMTYPE, "/etc/passwd"), "the member 'b.jpg' is a link: pack files as they are"),
        (special("b.jpg", tarfile.LNKTYPE, "a.jpg"), "the member 'b.jpg' is a link"),
        (special("b.jpg", tarfile.FIFOTYPE), "the member 'b.jpg' is no plain file"),
        (special("a.jpg", tarfile.REGTYPE), "has the member 'a.jpg' twice"),
        (special("a.png", tarfile.REGTYPE), "'a.jpg' and 'a.png' share the class of 'a.cls'"),
    ],
)
def test_members_that_are_refused(member: tarfile.TarInfo, said: str, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("a.cls", b"0")])
    with tarfile.open(shard, "a") as archive:
        archive.addfile(member)
    with pytest.raises(UserError, match=said) as raised:
        read_indices([str(shard)])
    assert str(shard) in str(raised.value) and not Path(f"{shard}{ENDING}").exists()


@pytest.mark.parametrize("size", [0, 100, 512, 600, 1024, 1536, 2048, 2500, 3072, 3500])
def test_a_tar_that_is_cut_short(size: int, tmp_path: Path) -> None:
    """At the border of a header, of content, in both, and before the end mark."""
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("b.jpg", b"x" * 600)])
    content = shard.read_bytes()
    shard.write_bytes(content[:size])
    if size > 2560:
        assert len(read_indices([str(shard)])[0].entries) == 2, "all but the padding is there"
        return
    with pytest.raises(
        UserError, match=r"x.tar (cannot be read: the file is empty|is damaged, cut short|is cut short)"
    ):
        read_indices([str(shard)])


def test_other_damage(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", JPEG), ("b.jpg", b"x" * 600)])
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1024] + b"#" * 512 + whole[1536:])  # the header of the second member
    with pytest.raises(UserError, match="after 'a.jpg' with what is no member: it is damaged, or archives were joined"):
        read_indices([str(shard)])
    shard.write_bytes(whole + whole)
    with pytest.raises(UserError, match=r"after 'b.jpg' with what is no member"):
        read_indices([str(shard)])
    with tarfile.open(shard, "w:gz") as archive:
        archive.addfile(special("a.jpg", tarfile.REGTYPE))
    with pytest.raises(UserError, match="x.tar is damaged, cut short or not a tar archive .*must not be compressed"):
        read_indices([str(shard)])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.cls", b"\xff\xfe", "no class can be read from 'a.cls'"),
        ("a.cls", b"", "'a.cls' has the class ''"),
        ("a.cls", b"99999999999", "has the class 99999999999"),
        ("a.json", b"{", "no class can be read from 'a.json'"),
        ("a.json", b'{"label": 1.5}', "'a.json' has the class 1.5, which is no number of 0 or more and no name"),
        ("a.json", b'{"label": true}', "has the class True"),
        ("a.json", b"[" * 100_000, "no class can be read"),
        ("a.cls", b"1" * (1 << 21), "should hold a class, and has 2097152 bytes"),
    ],
)
def test_classes_that_cannot_be_read(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        entries(tmp_path, ("a.jpg", JPEG), (name, content))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train-0.tar": ["Dog/0.jpg", "dog/1.jpg"]}, "has the classes 'Dog' and 'dog', which differ in case alone"),
        ({"train-0.tar": ["cat/0.jpg"], "val-0.tar": ["Cat/0.jpg"]}, "classes 'Cat' and 'cat', which differ in case"),
        ({"train-0.tar": ["cat/0.jpg"], "val-0.tar": ["bird/0.jpg"]}, "has 1 class that the training set lacks: bird"),
        (
            {"train-0.tar": ["a/0.jpg", "1.jpg"], "val-0.tar": ["a/0.jpg"]},
            "1 image of train have no class, such as '1.jpg'",
        ),
        ({"0.tar": ["a/0.jpg"]}, r"holds 1 shard, none of train: they must lie in train/, or have it in their names"),
        ({"train-0.tar": ["a/0.mp4"]}, r"no image \(.jpg.*\) in .*train-0.tar, which hold 1 .mp4 file"),
        ({"train-0.tar": [f"{n}/0.jpg" for n in range(5)]}, "has 5 classes and MODEL.NUM_CLASSES is 4: set MODEL.NUM"),
        (
            {"train-0.tar": ["a/0.jpg"], "val-0.parquet": []},
            "holds 1 .tar files, 1 .parquet files: DATA.FORMAT says which",
        ),
    ],
)
def test_sets_that_are_refused(files: dict[str, list[str]], said: str, tmp_path: Path) -> None:
    for shard, names in files.items():
        write_tar(tmp_path / shard, [(name, JPEG) for name in names])
    with pytest.raises(UserError, match=said):
        for split in ("train", "val"):
            find(tmp_path, split)


def test_numbers_and_names_do_not_mix(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", [("0.jpg", JPEG), ("0.cls", b"1"), ("1.jpg", JPEG), ("1.cls", b"dog")])
    with pytest.raises(UserError, match=r"has classes that are numbers, and others that are names \(dog\)"):
        find(tmp_path)
