"""Caltech-101 laid out as folders: from the official archive, every third photograph held out, nothing obeyed."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskfeat.demos.caltech101 import prepare
from maskfeat.demos.shares import PARTS

INNER = "101_ObjectCategories.tar.gz"


def photograph(seed: int, height: int = 150, width: int = 200) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def official(number: int = 12) -> dict[str, bytes]:
    names = ("BACKGROUND_Google", "ant", "car_side")
    return {
        f"101_ObjectCategories/{name}/image_{n:04d}.jpg": photograph(n) for name in names for n in range(1, number + 1)
    }


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


@pytest.mark.parametrize("form", ["zip", "tar.gz", "folder"])
def test_the_official_archive(form: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if form == "zip":
        with zipfile.ZipFile(source / "caltech-101.zip", "w") as archive:
            archive.writestr(f"caltech-101/{INNER}", tar_of(official()))
        source = source / "caltech-101.zip"
    elif form == "tar.gz":
        (source / INNER).write_bytes(tar_of(official()))  # and the folder is given
    else:
        for name, content in official().items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    root = prepare(source, tmp_path / "out")
    names = set(files_of(root / "all"))
    held = {f"val/{name}/image_{n:04d}.jpg" for name in ("ant", "car_side") for n in (3, 6, 9, 12)}
    assert {name for name in names if name.startswith("val/")} == held
    assert len(names) == 24 and not any("BACKGROUND" in name for name in names)
    with Image.open(root / "all" / "train" / "ant" / "image_0001.jpg") as image:
        assert image.size == (171, 128)
    before = files_of(root)
    assert files_of(prepare(tmp_path / "not there", root)) == before, "a complete folder is left as it is"
    assert {path.name for path in root.iterdir()} == {*PARTS, "complete"}


@pytest.mark.slow
def test_parts_hold_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / INNER).write_bytes(tar_of(official(60)))
    root = prepare(tmp_path / INNER, tmp_path / "out")
    parts = {part: set(files_of(root / part)) for part in PARTS}
    train = {name for name in parts["all"] if name.startswith("train/")}
    few = {name for name in parts["few"] if name.startswith("train/")}
    held = {name.replace("val/", "train/") for name in parts["few_tuning"] if name.startswith("val/")}
    assert len(few) == 2 * 5 and few < train and len(held) == 2 * 8 and held < train and not few & held
    fitted = {name for name in parts["all_tuning"] if name.startswith("train/")}
    assert fitted | held == train and not fitted & held and few < fitted
    assert {name for name in parts["few"] if name.startswith("val/")} == parts["all"] - train


def test_a_split_that_is_given_is_kept(tmp_path: Path) -> None:
    small = {
        f"{split}/{name}/{n}.jpg": photograph(n, 40, 50) for split in ("train", "val") for name in "ab" for n in (1, 2)
    }
    (tmp_path / "caltech101.tar").write_bytes(tar_of(small))
    root = prepare(tmp_path, tmp_path / "out")
    assert files_of(root / "all") == small, "small photographs are not encoded again"


@pytest.mark.parametrize(
    "name", ["train/../image.jpg", "../train/a/../../image.jpg", "/train/a/.hidden.jpg", "train/./image.jpg"]
)
def test_names_that_lead_elsewhere_are_left_out(name: str, tmp_path: Path) -> None:
    (tmp_path / INNER).write_bytes(tar_of({name: photograph(0), **official()}))
    root = prepare(tmp_path / INNER, tmp_path / "out" / "deeper")
    assert len(files_of(root / "all")) == 24
    assert set(files_of(tmp_path)) == {f"out/deeper/{inside}" for inside in files_of(root)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no "),
        (b"nothing of the kind", "cannot be read"),
        (tar_of(official())[:2000], "cannot be read"),
        (tar_of({"101_ObjectCategories/ant/image_0001.jpg": photograph(0)}), "holds no photographs of classes"),
        (tar_of({**official(), "101_ObjectCategories/ant/image_9999.jpg": b"no picture"}), "ant/image_9999.jpg cannot"),
    ],
)
def test_what_is_no_caltech_101(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / INNER).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path / INNER, tmp_path / "out")
    assert not (tmp_path / "out" / "all").exists()


def test_what_another_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out" / "few").mkdir(parents=True)
    with pytest.raises(ValueError, match="few exists and was not laid out here to its end"):
        prepare(tmp_path, tmp_path / "out")
