"""Lists of Kinetics from official annotations, archives and class folders; and of Something-Something v2."""

import gzip
import json
import logging
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from maskfeat.analysis.preparation import kinetics, ssv2
from maskfeat.data.datasets.sample_list import read_sample_list
from maskfeat.data.video.decoder import open_video
from tests.data.media import write_video

CLIPS = {
    "train": [("abseiling", "-3B32lodo2M", 59), ("air drumming", "a_b", 4), ("abseiling", "gone0000000", 0)],
    "val": [("air drumming", "__val", 100), ("abseiling", "short", 7)],
    "test": [("abseiling", "tested", 1)],
}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("film") / "one.mp4", frames=6)


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    folder = tmp_path / "annotations"
    folder.mkdir()
    for split, rows in CLIPS.items():
        lines = [f"{label},{name},{start},{start + 10},{split},0" for label, name, start in rows]
        (folder / f"{split}.csv").write_text(
            "label,youtube_id,time_start,time_end,split,is_cc\n" + "\n".join(lines) + "\n"
        )
    return tmp_path


def lay_out(root: Path, film: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(film, root / name)
    return root


def listed(root: Path, split: str) -> list[tuple[str, int]]:
    return read_sample_list(root / "out" / f"{split}.csv")


def run(root: Path, *words: str) -> int:
    return kinetics.main([str(root / "videos"), str(root / "out"), "--workers", "0", *words])


def test_annotations(annotated: Path, film: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Videos in any folders; one of a clip in its own split goes first; one without times is taken for any."""
    names = ["part_1/train/-3B32lodo2M_000059_000069.mp4", "a_b_000004_000014.mkv", "val/__val_000100_000110.mp4"]
    lay_out(annotated / "videos", film, *names, "short.mp4", "test/tested_000001_000011.mp4", "other/unknown.mp4")
    lay_out(annotated / "videos", film, "a/__val_000100_000110.mp4")
    words = ["--annotations", str(annotated / "annotations")]
    assert run(annotated, *words) == 0
    assert listed(annotated, "train") == [(names[0], 0), (names[1], 1)]
    assert listed(annotated, "val") == listed(annotated, "test") == [(names[2], 1), ("short.mp4", 0)]
    assert (annotated / "out" / "missing.txt").read_text() == "train/gone0000000_000000_000010\n"
    assert (annotated / "out" / "classes.txt").read_text() == "abseiling\nair drumming\n"
    assert "train.csv: 2 videos of 2 classes, 1 missing; the published list has 3" in caplog.text
    assert run(annotated, *words, "--official-test", "--short-side", "32") == 0
    assert listed(annotated, "test") == [("test/tested_000001_000011.mp4", 0)]
    assert listed(annotated, "train")[1] == ("a_b_000004_000014.mp4", 1), "encoded"
    assert (annotated / "out" / "videos" / "a_b_000004_000014.mp4").is_file()


def test_what_replaces_a_corrupted_video_goes_first(annotated: Path, film: Path) -> None:
    replaced = "replacement/replacement_for_corrupted_k400/a_b_000004_000014.mp4"
    names = ["train/-3B32lodo2M_000059_000069.mp4", "val/__val_000100_000110.mp4", replaced]
    lay_out(annotated / "videos", film, *names)
    (annotated / "videos" / "train" / "a_b_000004_000014.mp4").write_bytes(b"corrupted")
    assert run(annotated, "--annotations", str(annotated / "annotations")) == 0
    assert listed(annotated, "train") == [(names[0], 0), (replaced, 1)]


def archive(path: Path, film: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            tar.add(film, name)
    return path


def test_archives(annotated: Path, film: Path) -> None:
    """Also such as would write elsewhere: a member's name alone is used, and links are left out."""
    train = annotated / "videos" / "train"
    archive(train / "part_0.tar.gz", film, "./-3B32lodo2M_000059_000069.mp4")
    archive(train / "part_1.tgz", film, "../../a_b_000004_000014.mp4", "notes.txt", "x/._a_b_000004_000014.mp4")
    with tarfile.open(annotated / "videos" / "val.tar", "w") as tar:
        tar.add(film, "/tmp/__val_000100_000110.mp4")
        link = tarfile.TarInfo("short_000007_000017.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    words = ["--annotations", str(annotated / "annotations"), "--unpack", str(annotated / "unpacked")]
    assert run(annotated, *words) == 0
    assert [name for name, _ in listed(annotated, "train")] == [
        "train/part_0/-3B32lodo2M_000059_000069.mp4",
        "train/part_1/a_b_000004_000014.mp4",
    ]
    assert listed(annotated, "val") == [("val/__val_000100_000110.mp4", 1)]
    files = sorted(path.name for path in annotated.rglob("*.mp4"))
    assert len(files) == 3 and not list(annotated.parent.glob("*.mp4"))
    # An archive that is done is not read again; another one is, from where it stopped.
    archive(train / "part_0.tar.gz", film, "other.mp4")
    (annotated / "unpacked" / "val.unpacked").unlink()
    assert run(annotated, *words) == 0
    assert sorted(path.name for path in (annotated / "unpacked").rglob("*.mp4")) == files


@pytest.mark.parametrize(
    ("left", "packed"), [(0.5, True), (0.5, False), (0.99, True), ("members", True), ("members", False)]
)
def test_a_truncated_archive(
    annotated: Path, film: Path, left: float | str, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In a member, in the end mark, and between two members, where tarfile sees nothing missing."""
    content = archive(annotated / "whole.tar.gz", film, *(f"{n}.mp4" for n in range(20))).read_bytes()
    content = gzip.decompress(content)
    if left == "members":
        content = content[: 10 * (512 + -(-film.stat().st_size // 512) * 512)]
    content = gzip.compress(content) if packed else content
    (annotated / "videos").mkdir()
    path = annotated / "videos" / "train.tar"
    path.write_bytes(content if left == "members" else content[: int(float(left) * len(content))])
    assert run(annotated, "--annotations", str(annotated / "annotations"), "--unpack", str(annotated / "u")) == 2
    assert "train.tar cannot be unpacked into" in caplog.text


def test_class_folders(tmp_path: Path, film: Path) -> None:
    names = ["train/b c/1.mp4", "train/a/2.mp4", "validate/a/3.mp4"]
    lay_out(tmp_path / "videos", film, *names)
    assert run(tmp_path) == 0
    assert listed(tmp_path, "train") == [("train/a/2.mp4", 0), ("train/b c/1.mp4", 1)]
    assert listed(tmp_path, "val") == listed(tmp_path, "test") == [("validate/a/3.mp4", 0)]


def test_videos_of_another_size_are_not_taken(tmp_path: Path, film: Path, caplog: pytest.LogCaptureFixture) -> None:
    lay_out(tmp_path / "videos", film, "train/a/1.mp4", "train/b/2.mp4", "val/a/3.mp4")
    assert run(tmp_path, "--short-side", "32") == 0
    encoded = tmp_path / "out" / "videos" / "train" / "a" / "1.mp4"
    before = encoded.stat().st_mtime_ns
    assert run(tmp_path, "--short-side", "48") == 2
    assert "holds videos of --short-side 32, and --short-side 48 is given: give 32, another OUTPUT" in caplog.text
    assert run(tmp_path, "--short-side", "32") == 0 and encoded.stat().st_mtime_ns == before
    shutil.rmtree(tmp_path / "out" / "videos")
    assert run(tmp_path, "--short-side", "48") == 0
    with open_video(encoded) as video:
        assert video.info.height == 48


@pytest.mark.parametrize(
    ("files", "words", "said"),
    [
        ({"videos/train/a.mp4": ""}, [], "train/a.mp4 lies in no class folder: give --annotations"),
        ({"videos/train/a/a.mp4": ""}, [], "has no folder val/"),
        ({"videos/train/a/a.mp4": "", "videos/val/b/a.mp4": ""}, [], r"has classes that train/ lacks: b"),
        ({"videos/a.mp4": "", "c/x.csv": ""}, ["--annotations", "{}/c"], "has no train.csv and no val.csv"),
        (
            {"videos/a.mp4": "", "c/train.csv": "a b c\n", "c/val.csv": ""},
            ["--annotations", "{}/c"],
            "must have the columns label, youtube_id, time_start, time_end; its first line is 'a b c'",
        ),
        (
            {"videos/a.mp4": "", "c/train.csv": "label,youtube_id,time_start,time_end\nx,y,z,1\n", "c/val.csv": ""},
            ["--annotations", "{}/c"],
            "train.csv, line 2: time_start and time_end must be seconds",
        ),
        (
            {"videos/a.mp4": "", "c/train.csv": b"label,youtube_id,time_start,time_end\n\xff,y,1,2\n", "c/val.csv": ""},
            ["--annotations", "{}/c"],
            "train.csv is no CSV file of UTF-8 text: .* can't decode byte 0xff",
        ),
        ({"videos/a.mp4": ""}, ["--unpack", "{}/u"], "has no archive"),
        ({"videos/a.tar": "no tar"}, ["--unpack", "{}/u"], "a.tar cannot be unpacked"),
    ],
)
def test_bad_input(
    files: dict[str, str | bytes], words: list[str], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with caplog.at_level(logging.ERROR):
        assert run(tmp_path, *(word.format(tmp_path) for word in words)) == 2
    assert re.search(said, caplog.text)


def test_annotations_of_an_unlabelled_test_set(annotated: Path, film: Path, caplog: pytest.LogCaptureFixture) -> None:
    lay_out(annotated / "videos", film, "-3B32lodo2M_000059_000069.mp4", "__val_000100_000110.mp4")
    (annotated / "annotations" / "test.csv").write_text("youtube_id,time_start,time_end\ntested,1,11\n")
    words = ["--annotations", str(annotated / "annotations")]
    assert run(annotated, *words) == 0
    assert run(annotated, *words, "--official-test") == 2
    assert "rows without one: ''; leave out --official-test" in caplog.text


# ------------------------------------------------------------------------------------------- Something-Something v2


@pytest.fixture
def something(tmp_path: Path, film: Path) -> Path:
    lay_out(tmp_path / "videos", film, *(f"{n}.mp4" for n in (2, 3, 4)))
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "labels.json").write_text(json.dumps({"Holding something": "0", "Moving something up": "1"}))
    entries = [{"id": "2", "label": "holding pen", "template": "Holding [something]", "placeholders": ["pen"]}]
    (labels / "something-something-v2-train.json").write_text(
        json.dumps([*entries, {"id": "4", "template": "Moving [something] up"}])
    )
    (labels / "validation.json").write_text(json.dumps([{"id": "3", "template": "Moving [something] up"}]))
    return tmp_path


def run_ssv2(root: Path, *words: str) -> int:
    return ssv2.main(
        [str(root / "videos"), str(root / "out"), "--labels", str(root / "labels"), "--workers", "0", *words]
    )


def test_something(something: Path) -> None:
    assert run_ssv2(something) == 0
    assert listed(something, "train") == [("2.mp4", 0), ("4.mp4", 1)]
    assert listed(something, "val") == listed(something, "test") == [("3.mp4", 1)]
    assert (something / "out" / "classes.txt").read_text() == "Holding something\nMoving something up\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("labels.json", "[1]", "must give each template a number"),
        ("labels.json", '{"a": "1"}', "must give each template a number"),
        ("validation.json", "{", "validation.json is no JSON file"),
        ("validation.json", '[{"id": "3", "template": "Else"}]', "must list objects with an id and a template"),
        ("validation.json", '{"id": 3}', "must list objects with an id and a template"),
        ("validation.json", '[{"id": "9", "template": "Holding something"}]', "1 of 1 videos of val are not in"),
        ("validation.json", None, "has neither validation.json nor something-something-v2-validation.json"),
    ],
)
def test_bad_lists_of_something(
    name: str, text: str | None, said: str, something: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = something / "labels" / name
    path.unlink() if text is None else path.write_text(text)
    assert run_ssv2(something) == 2
    assert said in caplog.text
