"""Packing into tar archives: nothing is lost, changed or moved, and an interrupted call goes on."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfeat.analysis.preparation import shards
from maskfeat.analysis.preparation.shards import MANIFEST, main, size_option
from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.data.shards.index import ENDING, read_indices
from maskfeat.distributed.preemption import INTERRUPTED
from maskfeat.errors import UserError
from tests.data.datasets.test_parquet_shards import write_rows
from tests.data.shards import write_tar
from tests.small import MVIT_FT, RECIPES, VIT_FT, VIT_PT, images

PT, FT = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"
CLIPS_FT = RECIPES / "k400_MVITv2_S_16x4_FT.yaml"


def made(source: Path, output: Path, *options: str) -> Path:
    assert main([str(source), str(output), "--workers", "0", *options]) == 0
    return output


def same(folder: Path, packed: Path, recipe: Path, opts: list[str], split: str = "train") -> bool:
    """Whether pixels and labels of an epoch are the same, to the bit, and what a classifier calls the classes."""
    one, other = (build_loader(load_config(recipe, [*opts, *images(root)]), split) for root in (folder, packed))
    assert recipe == PT or one.classes == other.classes
    pairs = list(zip(one, other, strict=True))
    return len(pairs) > 0 and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in ("clip", "label", "index")
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.tar")}


@pytest.mark.slow
def test_class_folders(image_data: Path, tmp_path: Path) -> None:
    packed = made(image_data, tmp_path / "packed", "--size", "20K")
    assert sum(path.name.startswith("train-") for path in packed.iterdir()) > 4, "archives and their indices"
    for split in ("train", "val"):
        assert same(image_data, packed, FT, VIT_FT, split)
    assert same(image_data, packed, PT, VIT_PT)
    again = tmp_path / "again"
    assert main([str(image_data), str(again), "--workers", "2", "--size", "20K"]) == 0
    assert contents(packed) == contents(again), "the same bytes, by any number of processes"
    assert all(Path(f"{path}{ENDING}").is_file() for path in packed.glob("[!.]*.tar"))
    assert not [path for path in packed.iterdir() if path.name.startswith(".")]


def picture(seed: int, size: tuple[int, int] = (40, 36)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_names_that_are_alike(tmp_path: Path) -> None:
    """Several dots, one name with two endings, classes whose order is not that of their paths."""
    root = tmp_path / "set"
    names = ("dog/x.1.png", "dog/x.2.png", "dog/x_1.png", "dog/y.png", "dog/y.jpg", "dog-2/a.png", "dog-2/in/.d/b.png")
    for number, name in enumerate((*names, "cat/A.png", "cat/a.png")):
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    packed = made(root, tmp_path / "packed")
    opts = ["MODEL.NUM_CLASSES", "3", "TRAIN.BATCH_SIZE", "4"]
    assert same(root, packed, FT, [*VIT_FT, *opts]) and same(root, packed, PT, [*VIT_PT, *opts])


def test_folders_without_classes(image_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for number, path in enumerate(sorted(image_data.glob("train/*/*"))[:20]):
        target = root / ("deep/er" if number % 3 else "val.x") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(image_data / "val", root / "val")
    packed = made(root, tmp_path / "packed", "--size", "30K")
    assert same(root, packed, PT, VIT_PT)
    assert not (packed / "classes.txt").exists()


@pytest.mark.slow
def test_lists_of_clips(clip_data: Path, tmp_path: Path) -> None:
    packed = made(clip_data, tmp_path / "packed", "--size", "30K", "--prefix", str(clip_data))
    opts = [*MVIT_FT, "DATA.PATH_PREFIX", str(clip_data), "TRAIN.BATCH_SIZE", "4"]
    for split in ("train", "val", "test"):
        assert same(clip_data, packed, CLIPS_FT, opts, split)


def test_parquet_files_become_archives(tmp_path: Path) -> None:
    rows = [(f"n{number % 4}_{number}.JPEG", picture(number), number % 4) for number in range(12)]
    write_rows(tmp_path / "hub/train-0.parquet", list(rows))
    write_rows(tmp_path / "hub/test-0.parquet", [(None, picture(0), -1)])
    packed = made(tmp_path / "hub", tmp_path / "packed")
    assert same(tmp_path / "hub", packed, FT, VIT_FT)
    (index,) = read_indices([str(packed / "test-000000.tar")])
    assert [entry.label for entry in index.entries] == [None]


def test_an_interrupted_call_goes_on(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = made(image_data, tmp_path / "whole", "--size", "20K")
    output = tmp_path / "cut"
    left = iter([True, True, False])
    real = shards.make_shard

    def cut(job: shards.Job) -> int:
        if not next(left):
            raise KeyboardInterrupt
        return real(job)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "make_shard", cut)
        assert main([str(image_data), str(output), "--workers", "0", "--size", "20K"]) == INTERRUPTED
    assert "interrupted: the same command goes on where it stopped" in caplog.text
    (output / ".1.partial.train-000002.tar").write_bytes(b"of a killed process")
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("[!.]*.tar")}
    assert len(before) == 2
    made(image_data, output, "--size", "20K")
    assert contents(output) == contents(whole)
    assert all((output / name).stat().st_mtime_ns == changed for name, changed in before.items())
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_what_is_there_of_something_else(image_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "set"
    shutil.copytree(image_data, root)
    packed = made(root, tmp_path / "packed")
    for options in (["--size", "20K"], ["--side", "32"]):
        assert main([str(root), str(packed), "--workers", "0", *options]) == 2
    os.utime(next(root.glob("train/*/*")), ns=(0, 1))
    assert main([str(root), str(packed), "--workers", "0"]) == 2
    assert caplog.text.count("holds shards of other files, or made with other options: give another OUTPUT") == 3
    (packed / MANIFEST).unlink()
    assert main([str(root), str(packed), "--workers", "0"]) == 2
    assert f"and no {MANIFEST} that says what of" in caplog.text


def test_a_smaller_side(tmp_path: Path) -> None:
    root = tmp_path / "set/train/a"
    root.mkdir(parents=True)
    for name, content in {
        "0.png": picture(0, (80, 40)),
        "1.png": picture(1, (40, 81)),
        "2.png": picture(2, (20, 90)),
        "3.jpg": b"broken",
    }.items():
        (root / name).write_bytes(content)
    packed = made(tmp_path / "set", tmp_path / "packed", "--side", "20", "--quality", "95")
    (index,) = read_indices([str(packed / "train-000000.tar")])
    data = (packed / "train-000000.tar").read_bytes()
    parts = {entry.name: data[entry.first : entry.first + entry.second] for entry in index.entries}
    assert sorted(parts) == ["a/0.jpg", "a/1.jpg", "a/2.png", "a/3.jpg"]
    assert parts["a/2.png"] == picture(2, (20, 90)) and parts["a/3.jpg"] == b"broken"
    assert Image.open(io.BytesIO(parts["a/0.jpg"])).size == (40, 20)
    assert Image.open(io.BytesIO(parts["a/1.jpg"])).size == (20, 40)


def test_a_single_list_keeps_its_labels(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(picture(0))
    (tmp_path / "some.txt").write_text("a.png 0\nb.png 1\nc.png 0\n")
    packed = made(tmp_path / "some.txt", tmp_path / "packed", "--prefix", str(tmp_path))
    (archive,) = packed.glob("[!.]*.tar")
    with tarfile.open(archive) as members:
        found = {member.name: members.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    assert [found[f"{name}.cls"] for name in ("a", "b", "c")] == [b"0", b"1", b"0"]


def test_a_file_without_an_ending_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "photo").write_bytes(picture(0))
    (tmp_path / "some.csv").write_text("photo 0\n")
    words = [str(tmp_path / "some.csv"), str(tmp_path / "packed"), "--prefix", str(tmp_path), "--workers", "0"]
    assert main(words) == 2
    assert "photo has no ending of an image or a video" in caplog.text and "rename it" in caplog.text


def test_what_is_read_back_is_compared(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = shards._add

    def damaged(archive: object, name: str, content: bytes) -> None:
        real(archive, name, content[:-1] + b"#" if name.endswith(".jpg") else content)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "_add", damaged)
    assert main([str(image_data), str(tmp_path / "packed"), "--workers", "0"]) == 2
    assert "is not what is read back" in caplog.text
    assert not contents(tmp_path / "packed")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/Dog/0.png", "train/dog/0.png"], "classes 'Dog' and 'dog', which differ in case alone"),
        (["train/dog/0.png", "val/cat/0.png"], "has classes that train lacks: cat"),
        (["train.txt"], "holds neither images nor videos"),
        (["train/dog/0.png", "train/dog/1.png"], "1.png: the file is empty"),
    ],
)
def test_sets_that_are_refused(names: list[str], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"" if name.endswith("1.png") else picture(0))
    assert main([str(tmp_path / "set"), str(tmp_path / "packed"), "--workers", "0"]) == 2
    assert said in caplog.text and not contents(tmp_path / "packed")


def test_other_bad_input(clip_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--prefix", str(clip_data), "--side", "32"]
    assert main([str(clip_data), str(tmp_path / "packed"), "--workers", "0", *options]) == 2
    assert "--side is for images: maskfeat prepare-kinetics" in caplog.text
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "packed")]) == 2
    assert str(tmp_path / "nowhere") in caplog.text
    assert main([str(clip_data), str(clip_data)]) == 2
    assert f"OUTPUT {clip_data} is SOURCE: give another folder" in caplog.text
    (tmp_path / "list.csv").write_text("gone.jpg,0\n")
    assert main([str(tmp_path / "list.csv"), str(tmp_path / "packed")]) == 2
    assert "gone.jpg cannot be read: No such file" in caplog.text
    write_tar(tmp_path / "set/train.tar", [("../a.jpg", b"x")])
    assert main([str(tmp_path / "set"), str(tmp_path / "packed")]) == 2
    assert "does not lie in the archive's own folder" in caplog.text


@pytest.mark.parametrize(("text", "size"), [("1G", 10**9), ("1.5m", 1_500_000), ("200KB", 200_000), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert size_option(text) == size


@pytest.mark.parametrize("options", [["--size", "big"], ["--size", "0"], ["--quality", "101"], ["--side", "1"]])
def test_options_that_are_refused(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), str(tmp_path / "packed"), *options])
    assert stopped.value.code == 2 and options[0] in capsys.readouterr().err


def test_the_errors_are_user_errors() -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(shards.pack([shards.Sample("/nowhere/a.jpg", "train", 0)], "/nowhere"))
