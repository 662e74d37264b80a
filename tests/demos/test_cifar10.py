"""CIFAR-10 laid out as folders: every pixel as it was, a tenth by class, and nothing of a strange archive obeyed."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskfeat.data.datasets.folders import list_class_folders
from maskfeat.demos.cifar10 import ARCHIVE, CLASSES, prepare
from maskfeat.errors import UserError

TRAIN = [f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)]
TEST = "cifar-10-batches-bin/test_batch.bin"
RECORD = 3073


def records(each: int, seed: int) -> bytes:
    """`each` images of noise a class, in no order, as the official files hold them."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), each))
    return np.concatenate([label[:, None], rng.integers(0, 256, (len(label), 3072), np.uint8)], axis=1).tobytes()


def official(each: int = 4) -> dict[str, bytes]:
    """Five files to train with `each` images a class, one to test with three."""
    return {name: records(each, seed) for seed, name in enumerate(TRAIN)} | {TEST: records(3, 9)}


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pixels_by_class(files: list[bytes]) -> dict[str, list[np.ndarray]]:
    """(32, 32, 3) images in order, by the definition of the format: a label, then red, green and blue planes."""
    found = defaultdict(list)
    for data in files:
        for start in range(0, len(data), RECORD):
            planes = [data[start + 1 + 1024 * c : start + 1 + 1024 * (c + 1)] for c in range(3)]
            image = np.stack([np.frombuffer(plane, np.uint8).reshape(32, 32) for plane in planes], axis=-1)
            found[CLASSES[data[start]]].append(image)
    return found


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_every_pixel_of_the_archive(tmp_path: Path) -> None:
    members = official()
    write_archive(tmp_path / ARCHIVE, members)
    root = prepare(tmp_path, tmp_path / "out")
    assert root == tmp_path / "out" and (root / "complete").is_file()
    expected = {"train": pixels_by_class([members[name] for name in TRAIN]), "val": pixels_by_class([members[TEST]])}
    for split, classes in expected.items():
        assert sorted(folder.name for folder in (root / "all" / split).iterdir()) == sorted(CLASSES)
        for name, images in classes.items():
            folder = root / "all" / split / name
            assert sorted(file.name for file in folder.iterdir()) == [f"{n:04d}.png" for n in range(len(images))]
            for number, image in enumerate(images):
                with Image.open(folder / f"{number:04d}.png") as picture:
                    assert picture.format == "PNG" and picture.mode == "RGB"
                    assert np.array_equal(np.asarray(picture), image)
    samples, names = list_class_folders(root / "all" / "train")
    assert names == sorted(CLASSES) == list(CLASSES) and len(samples) == 200


def test_the_tenth_is_every_tenth_of_a_class(tmp_path: Path) -> None:
    root = prepare(write_archive(tmp_path / "given.tar.gz", official(each=5)), tmp_path / "out")
    for name in CLASSES:
        folder = root / "tenth" / "train" / name
        assert sorted(file.name for file in folder.iterdir()) == ["0000.png", "0010.png", "0020.png"]
        for file in folder.iterdir():
            assert file.read_bytes() == (root / "all" / "train" / name / file.name).read_bytes()
    assert (
        files_of(root / "tenth" / "val") == files_of(root / "all" / "val") and len(files_of(root / "all" / "val")) == 30
    )


def test_without_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_archive(tmp_path / ARCHIVE, official(1))
    linked = files_of(prepare(source, tmp_path / "linked"))

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert files_of(prepare(source, tmp_path / "copied")) == linked


def test_a_complete_folder_is_left_as_it_is(tmp_path: Path) -> None:
    source = write_archive(tmp_path / ARCHIVE, official(1))
    root = prepare(source, tmp_path / "out")
    changed = root / "all" / "train" / "cat" / "0000.png"
    changed.write_bytes(b"mine")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    source.unlink()
    assert prepare(source, root) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before and changed.read_bytes() == b"mine"


@pytest.mark.slow
def test_what_was_interrupted_is_done_again(tmp_path: Path) -> None:
    whole = write_archive(tmp_path / ARCHIVE, official())
    content = whole.read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.tar.gz cannot be read"):
        prepare(cut, tmp_path / "out")
    assert files_of(tmp_path / "out") and not (tmp_path / "out" / "complete").exists()
    assert files_of(prepare(whole, tmp_path / "out")) == files_of(prepare(whole, tmp_path / "anew"))


def test_a_folder_that_holds_something_else_stays(tmp_path: Path) -> None:
    source = write_archive(tmp_path / ARCHIVE, official())
    (tmp_path / "out" / "all").mkdir(parents=True)
    (tmp_path / "out" / "all" / "mine").write_text("stays")
    with pytest.raises(ValueError, match="not laid out here to its end"):
        prepare(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == {"all/mine": b"stays"}


def test_a_full_disk_is_not_the_sources_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    source = write_archive(tmp_path / ARCHIVE, official())
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="out cannot be written: No space left on device"):
        prepare(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({TRAIN[2]: records(1, 0)[:-1]}, "data_batch_3.bin does not consist of records of 3073 bytes"),
        ({TRAIN[0]: b""}, "data_batch_1.bin does not consist"),
        ({TEST: b"\x0a" + records(1, 0)[1:]}, "test_batch.bin has a label 10, expected 0 to 9"),
        ({TRAIN[4]: b"\xff" + records(1, 0)[1:]}, "data_batch_5.bin has a label 255"),
        ({TEST: None}, "has no picture of test/airplane, test/automobile"),
    ],
)
def test_damaged_files_in_the_archive(tmp_path: Path, changes: dict[str, bytes | None], message: str) -> None:
    members = {name: content for name, content in (official(1) | changes).items() if content is not None}
    with pytest.raises(ValueError, match=message):
        prepare(write_archive(tmp_path / ARCHIVE, members), tmp_path / "out")
    assert not (tmp_path / "out" / "complete").exists()


@pytest.mark.slow
def test_a_file_of_more_records_than_the_official_ones_is_not_read_whole(tmp_path: Path) -> None:
    members = official(1) | {TEST: bytes(10_001 * RECORD)}
    with pytest.raises(ValueError, match="test_batch.bin does not consist"):
        prepare(write_archive(tmp_path / ARCHIVE, members), tmp_path / "out")


@pytest.mark.slow
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    plain = b"".join(bytes([label]) + bytes(range(256)) * 12 for label in range(10))  # unlike noise, compressible
    content = write_archive(tmp_path / "a.tar.gz", {TRAIN[0]: plain, TEST: plain}).read_bytes()
    zips = tmp_path / "zips"
    write_zips(zips)
    zipped = (zips / "train.zip").read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for turn in range(60):
        data = bytearray((content, zipped)[turn % 2])
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        source = zips if turn % 2 else tmp_path / "a.tar.gz"
        (zips / "train.zip" if turn % 2 else source).write_bytes(data)
        try:
            prepare(source, tmp_path / "out" / str(turn))
        except UserError as error:
            outcomes.add(str(error).removeprefix(f"{source} cannot be read: ").split("(")[0])
    for kind in ("Error -3 while decompressing", "CRC check failed", "Bad CRC-32"):
        assert any(outcome.startswith(kind) for outcome in outcomes), (kind, outcomes)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_single_wrong_bit_in_the_pixels_of_the_archive(tmp_path: Path, place: float) -> None:
    path = write_archive(tmp_path / ARCHIVE, official(5))
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="CRC check failed"):
        prepare(path, tmp_path / "out")
    assert not (tmp_path / "out" / "complete").exists()


def escaping(archive: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    content = records(1, 0) if kind == tarfile.REGTYPE else b""
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def test_members_of_other_names_and_kinds_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(records(1, 5))
    with tarfile.open(tmp_path / ARCHIVE, "w:gz") as archive:
        for name in (
            "../escaped.bin", str(tmp_path / "absolute.bin"), "cifar-10-batches-bin/../../data_batch_1.bin",
            "cifar-10-batches-bin/data_batch_6.bin", "cifar-10-batches-bin/data_batch_1.bin.html", "data_batch_1.bin",
        ):  # fmt: skip
            escaping(archive, name)
        escaping(archive, TRAIN[0], tarfile.SYMTYPE, str(tmp_path / "secret.bin"))
        escaping(archive, TRAIN[1], tarfile.LNKTYPE, "../secret.bin")
        escaping(archive, TRAIN[2], tarfile.FIFOTYPE)
        escaping(archive, TRAIN[3], tarfile.DIRTYPE)
    before = set(files_of(tmp_path))
    with pytest.raises(ValueError, match="has no picture of train/airplane"):
        prepare(tmp_path, tmp_path / "deep" / "out")
    assert set(files_of(tmp_path)) == before, "nothing was written"


# ------------------------------------------------------------------ zips


def write_zips(folder: Path, extra: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """train.zip with 12 images a class, test.zip with 2; what they hold by name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    held = {}
    for split, each in (("train", 12), ("test", 2)):
        with zipfile.ZipFile(folder / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in CLASSES:
                for number in rng.permutation(each):
                    file = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file, ("PNG", "JPEG")[number % 2])
                    path = f"{split}/{name}/{number + 1:04d}.{('png', 'jpg')[number % 2]}"
                    held[path] = file.getvalue()
                    archive.writestr(path, held[path])
            for path, content in (extra or {}).items():
                if split == "train":
                    archive.writestr(path, content)
    return held


def test_zips_are_taken_as_they_are(tmp_path: Path) -> None:
    held = write_zips(tmp_path / "source")
    root = prepare(tmp_path / "source", tmp_path / "out")
    expected = {path.replace("test/", "val/"): content for path, content in held.items()}
    assert files_of(root / "all") == expected
    tenth = {path: content for path, content in expected.items() if path[-8:-4] in ("0001", "0011") or "val/" in path}
    assert files_of(root / "tenth") == tenth, "the first and the eleventh by name"


def test_zips_cannot_write_outside(tmp_path: Path) -> None:
    names = [
        "train/cat/../../../../escaped.png", "../train/cat/escaped.png", "/train/cat/escaped.png", "train/../cat/a.png",
        "train/cat/..\\escaped.png", "train/zebra/a.png", "val/cat/a.png", "train/cat/a.gif", "train/cat/deep/a.png",
        "train/cat/", "train/cat/.png", "train/cat/a b.png", "train/cat/a.png\n", "labels.txt",
    ]  # fmt: skip
    held = write_zips(tmp_path / "deep" / "source", dict.fromkeys(names, b"escaped"))
    prepare(tmp_path / "deep" / "source", tmp_path / "deep" / "out")
    found = files_of(tmp_path)
    assert not [path for path, content in found.items() if content == b"escaped" or "escaped" in path]
    assert len(found) == len(held) + 2 * 10 + 2 * 10 + 2 + 1, "all and tenth, the zips, the mark"
    bad = tmp_path / "bad"
    bad.mkdir()
    for split in ("train", "test"):
        with zipfile.ZipFile(bad / f"{split}.zip", "w") as archive:
            archive.writestr(f"{split}/cat/../../../escaped.png", b"escaped")
    with pytest.raises(ValueError, match="has no picture of train/airplane"):
        prepare(bad, tmp_path / "out")
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_file_too_large_for_its_pixels_is_refused(tmp_path: Path) -> None:
    write_zips(tmp_path, {"train/cat/huge.png": bytes(300_000)})
    with pytest.raises(ValueError, match="train/cat/huge.png claims 300000 bytes"):
        prepare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "all" / "train" / "cat" / "huge.png").exists()


@pytest.mark.slow
def test_a_false_claim_unpacks_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zips(tmp_path, {"train/cat/huge.png": bytes(50_000_000)})
    content = (tmp_path / "train.zip").read_bytes()
    (tmp_path / "train.zip").write_bytes(content.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 1000)))
    unpacked: list[int] = []
    inner = zipfile.ZipExtFile._read1

    def counted(file: zipfile.ZipExtFile, number: int) -> bytes:
        unpacked.append(number)
        return inner(file, number)

    monkeypatch.setattr(zipfile.ZipExtFile, "_read1", counted)
    with pytest.raises(ValueError, match="Bad CRC-32 for file 'train/cat/huge.png'"):
        prepare(tmp_path, tmp_path / "out")
    assert max(unpacked) <= 200_001


def test_what_this_zip_reader_does_not_read(tmp_path: Path) -> None:
    write_zips(tmp_path)
    content = (tmp_path / "train.zip").read_bytes()
    place = content.index(b"PK\x01\x02")  # the directory: flags stand 8 bytes further, the method 10
    for at, value, message in ((8, 1, "is encrypted"), (10, 99, "cannot be read: That compression method")):
        data = bytearray(content)
        data[place + at] = value
        (tmp_path / "train.zip").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path, tmp_path / "out")


# ------------------------------------------------------------------ sources


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10.zip", "data_batch_1"])
def test_other_sources_are_refused(tmp_path: Path, name: str) -> None:
    write_archive(tmp_path / name, official(1))
    for source in (tmp_path / name, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{source.name}: expected {ARCHIVE}.*'for Python' is a pickle"):
            prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ValueError, match=f"{tmp_path.name} cannot be read"):
        prepare(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_tool(tmp_path: Path, repo: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(repo / "tools" / "prepare_cifar10.py"), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "80"}
        )

    shown = run("--help")
    assert shown.returncode == 0 and "SOURCE DIR" in shown.stdout and "cifar-10-binary.tar.gz" in shown.stdout
    source = write_archive(tmp_path / ARCHIVE, official(2))
    done = run(source, tmp_path / "out")
    assert done.returncode == 0 and "100 training and 30 test images" in done.stderr, done.stderr
    assert len(files_of(tmp_path / "out")) == 100 + 10 + 2 * 30 + 1
    again = run(source, tmp_path / "out")
    assert again.returncode == 0 and "is there already" in again.stderr
    failed = run(tmp_path / "nowhere", tmp_path / "other")
    assert failed.returncode == 2 and "error: " in failed.stderr and "Traceback" not in failed.stderr
