"""ImageNet as it is downloaded, in miniature: official archives, Kaggle's copy, parquet files of the Hub."""

import io
import logging
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from scipy.io import savemat

from maskfeat.analysis.preparation import imagenet
from maskfeat.build import build_loader
from maskfeat.config import load_config
from tests.small import RECIPES, VIT_FT
from tests.small import images as at

SYNSETS = ["n01440764", "n01443537", "n01484850", "n01491361"]
VAL = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 9)]
IDS = [3, 1, 2, 4, 4, 2, 1, 3]
"""ILSVRC2012_ID of each validation image."""
OF_ID = {1: SYNSETS[2], 2: SYNSETS[0], 3: SYNSETS[3], 4: SYNSETS[1]}
"""They are not in the order of the synsets."""


def jpeg(seed: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    """An archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


TRAIN = {
    synset: {f"{synset}_{n}.JPEG": jpeg(100 * place + n) for n in range(3)} for place, synset in enumerate(SYNSETS)
}
VALIDATION = {name: jpeg(1000 + place) for place, name in enumerate(VAL)}


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    source = tmp_path / "downloads"
    source.mkdir()
    inner = {f"{synset}.tar": tar(members) for synset, members in TRAIN.items()}
    (source / imagenet.ARCHIVES["train"]).write_bytes(tar(inner))
    (source / imagenet.ARCHIVES["val"]).write_bytes(tar(VALIDATION))
    meta = io.BytesIO()
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    rows = [(number, synset, "a, b") for number, synset in OF_ID.items()] + [(5, "n00001740", "entity")]
    savemat(meta, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)}, do_compression=True)
    kit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, IDS)).encode(),
    }
    (source / imagenet.DEVKIT).write_bytes(tar(kit, "w:gz"))
    return tmp_path


def run(root: Path, *words: str) -> int:
    return imagenet.main([str(root / "downloads"), str(root / "out"), *(words or ("--workers", "0"))])


def check_layout(out: Path) -> None:
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.glob("*/*/*")}
    expected = {
        f"train/{synset}/{name}": content for synset, members in TRAIN.items() for name, content in members.items()
    }
    expected |= {f"val/{OF_ID[number]}/{name}": VALIDATION[name] for number, name in zip(IDS, VAL, strict=True)}
    assert found == expected


@pytest.mark.parametrize("workers", ["0", "2"])
def test_archives(archives: Path, workers: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert run(archives, "--workers", workers) == 0
    check_layout(archives / "out")
    assert "12 images of 4 classes; ImageNet-1K has 1281167 of 1000" in caplog.text
    cfg = load_config(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", [*VIT_FT, *at(archives / "out")])
    assert build_loader(cfg, "train").classes == SYNSETS


def test_it_goes_on(archives: Path) -> None:
    assert run(archives) == 0
    cut, gone, kept = (archives / "out" / "train" / SYNSETS[0] / f"{SYNSETS[0]}_{n}.JPEG" for n in range(3))
    cut.write_bytes(cut.read_bytes()[:99])
    gone.unlink()
    changed = kept.stat().st_mtime_ns
    assert run(archives) == 0
    check_layout(archives / "out")
    assert kept.stat().st_mtime_ns == changed


def write_solution(path: Path) -> None:
    lines = [f"{name[:-5]},{OF_ID[number]} 1 2 3 4 " for number, name in zip(IDS, VAL, strict=True)]
    path.write_text("ImageId,PredictionString\n" + "\n".join(lines) + "\n")


def test_archives_with_the_list_of_kaggle_need_no_scipy(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (archives / "downloads" / imagenet.DEVKIT).unlink()
    write_solution(archives / "downloads" / imagenet.SOLUTION)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert run(archives) == 0
    check_layout(archives / "out")


def test_kaggle(tmp_path: Path) -> None:
    images = tmp_path / "downloads" / "ILSVRC" / "Data" / "CLS-LOC"
    for synset, members in TRAIN.items():
        (images / "train" / synset).mkdir(parents=True)
        for name, content in members.items():
            (images / "train" / synset / name).write_bytes(content)
    (images / "val").mkdir()
    for name, content in VALIDATION.items():
        (images / "val" / name).write_bytes(content)
    write_solution(tmp_path / "downloads" / imagenet.SOLUTION)
    for _ in range(2):
        assert run(tmp_path) == 0
        check_layout(tmp_path / "out")
    assert (tmp_path / "out" / "train").is_symlink()
    assert len(list((images / "val").iterdir())) == 8, "nothing is moved"
    (images / "val" / VAL[0]).unlink()
    assert run(tmp_path) == 2


def write_parquet(path: Path, rows: list[tuple[str | None, bytes, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": content, "path": name} for name, content, _ in rows]
    table = pyarrow.table({"image": images, "label": [label for *_, label in rows]})
    pyarrow.parquet.write_table(table, path)


def test_parquet(tmp_path: Path) -> None:
    data = tmp_path / "downloads" / "data"
    rows = [
        (f"{name[:-5]}_{synset}.JPEG", content, place)
        for place, (synset, members) in enumerate(TRAIN.items())
        for name, content in members.items()
    ]
    write_parquet(data / "train-00000-of-00002.parquet", rows[:5])
    write_parquet(data / "train-00001-of-00002.parquet", rows[5:])
    held_out = [
        (f"{name[:-5]}_{OF_ID[number]}.JPEG", VALIDATION[name], SYNSETS.index(OF_ID[number]))
        for number, name in zip(IDS, VAL, strict=True)
    ]
    write_parquet(data / "validation-00000-of-00001.parquet", held_out)
    write_parquet(data / "test-00000-of-00001.parquet", [("ILSVRC2012_test_00000001.JPEG", b"x", -1)])
    assert run(tmp_path, "--workers", "2") == 0
    check_layout(tmp_path / "out")


def test_parquet_without_synsets(tmp_path: Path) -> None:
    """Folders are then named by numbers, in whose order they are sorted."""
    write_parquet(tmp_path / "downloads" / "train-0.parquet", [(None, jpeg(1), 11), ("../../x.JPEG", jpeg(2), 2)])
    assert run(tmp_path) == 0
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").glob("*/*/*"))
    assert found == [
        "train/class_0002/train_train-0_000001.JPEG",
        "train/class_0011/train_train-0_000000.JPEG",
    ]


def test_members_are_written_nowhere_else(tmp_path: Path) -> None:
    source = tmp_path / "downloads"
    source.mkdir()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("../../n01440764_1.JPEG", "/tmp/n01440764_2.JPEG", "evil.sh"):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"data"))
        link = tarfile.TarInfo("n01440764_3.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    outer = tar({"n01440764.tar": content.getvalue(), "../n00000001.tar": b""})
    (source / imagenet.ARCHIVES["train"]).write_bytes(outer)
    assert run(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "ILSVRC2012_img_train.tar",
        "n01440764_1.JPEG",
        "n01440764_2.JPEG",
    ]
    assert len(list((tmp_path / "out" / "train" / "n01440764").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nothing", "holds neither ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar, nor Kaggle's"),
        ("cut_train", "is damaged"),
        ("cut_val", "cannot be unpacked into"),
        ("few_val", "lacks 5 of 8 images"),
        ("no_kit", "has neither ILSVRC2012_devkit_t12.tar.gz nor LOC_val_solution.csv"),
        ("other_kit", "is damaged, or not the development kit"),
        ("other_list", "LOC_val_solution.csv, line 2 is not an image and its class"),
        ("long_field", "LOC_val_solution.csv is no CSV file of UTF-8 text: field larger"),
        ("columns", "has the columns a; image and label are needed"),
        ("no_parquet", "cannot be read as parquet"),
    ],
)
def test_bad_input(change: str, said: str, archives: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = archives / "downloads"
    train, val, kit = (source / name for name in (*imagenet.ARCHIVES.values(), imagenet.DEVKIT))
    if change in ("nothing", "columns", "no_parquet"):
        for path in (train, val, kit):
            path.unlink()
    if change == "columns":
        pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), source / "train-0.parquet")
    if change == "no_parquet":
        (source / "train-0.parquet").write_bytes(b"PAR1 but no more")
    if change == "cut_train":
        train.write_bytes(train.read_bytes()[: train.stat().st_size * 2 // 3])
    if change == "cut_val":
        val.write_bytes(val.read_bytes()[: val.stat().st_size // 2 - 100])
    if change == "few_val":
        val.write_bytes(tar({name: VALIDATION[name] for name in VAL[:3]}))
    if change == "no_kit":
        kit.unlink()
    if change == "other_kit":
        kit.write_bytes(tar({"data/meta.mat": b"MATLAB"}, "w:gz"))
    if change == "other_list":
        (source / imagenet.SOLUTION).write_text("ImageId,PredictionString\nx,y\n")
    if change == "long_field":
        (source / imagenet.SOLUTION).write_text("ImageId,PredictionString\n" + "x" * 200_000 + ",y\n")
    assert run(archives) == 2
    assert said in caplog.text
