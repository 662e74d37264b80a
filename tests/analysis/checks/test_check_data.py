"""A check finds what is wrong with a data set and nothing else, and the lists that it writes train."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from maskfeat.analysis.checks import reading
from maskfeat.analysis.checks.collect import collect
from maskfeat.analysis.checks.command import main
from maskfeat.analysis.checks.faults import Recipe, find_faults
from maskfeat.analysis.checks.reading import read_all, read_facts
from maskfeat.analysis.preparation.shards import main as make_shards
from maskfeat.config import load_config
from maskfeat.data.datasets.base import DatasetRequest
from maskfeat.data.datasets.layouts import find_split
from maskfeat.engine.run import main as train
from tests.analysis.checks import planted
from tests.small import MVIT_FT, RECIPES, VIT_FT, VIT_PT
from tests.small import images as at

FT, PT = str(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"), str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
CLIPS_FT = str(RECIPES / "k400_MVITv2_S_16x4_FT.yaml")
CLIPS = Recipe(classes=7, span=(4, 4, 30))


def check(output: Path, *words: str) -> tuple[int, dict]:
    code = main([*words, "--output", str(output), "--workers", "2"])
    return code, json.loads((output / "check.json").read_text())


def find(root: Path, journal: Path, recipe: Recipe) -> list[tuple[str, str, str]]:
    found = collect(str(root), None)
    facts = read_all([sample.path for sample in found.samples], found.noun, journal, 2)
    return planted.reported(root, find_faults(found, facts, recipe))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pictures", "films"), [(200, 50), pytest.param(1700, 300, marks=pytest.mark.slow)], ids=["250", "2000"]
)
def test_planted_faults_are_found_and_nothing_else(pictures: int, films: int, tmp_path: Path) -> None:
    """Two of each kind: 30 among the images, 12 among the videos."""
    expected = planted.images(tmp_path / "images", pictures)
    found = find(tmp_path / "images", tmp_path / "images.jsonl", Recipe())
    assert len(found) == len(set(found)) and set(found) == expected
    expected = planted.videos(tmp_path / "videos", films)
    found = find(tmp_path / "videos", tmp_path / "videos.jsonl", CLIPS)
    assert len(found) == len(set(found)) and set(found) == expected


def test_a_clean_set_has_no_fault(image_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code, result = check(tmp_path, str(image_data))
    assert code == 0 and result["faults"] == []
    assert [(row["split"], row["samples"], row["classes"]) for row in result["splits"]] == [
        ("train", 40, 4),
        ("val", 16, 4),
    ]
    assert set(result["splits"][0]["per_class"].values()) == {10}
    assert result["histograms"]["format"] == [["JPEG", 56]]
    said = caplog.text
    assert "nothing is wrong" in said and re.search(r"train +40 +4 +10 +10 +10", said)


def test_a_check_goes_on_and_reads_what_has_changed(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    shutil.copytree(image_data, root)
    paths = [str(path) for path in sorted(root.glob("*/*/*"))]
    journal = tmp_path / "files.jsonl"
    first = read_all(paths[:30], "image", journal, 0)
    with journal.open("a") as file:
        file.write('["cut off in the mid')
    read: list[str] = []
    plain = reading._image
    monkeypatch.setattr(reading, "_image", lambda facts: read.append(facts.path) or plain(facts))
    journal.write_text(journal.read_text().rstrip("\n") + "\n")
    assert {path: first[path] for path in paths[:30]} == {
        path: facts for path, facts in read_all(paths, "image", journal, 0).items() if path in first
    }
    assert read == paths[30:], "in this process, those that were not read"
    os.utime(paths[0], (1, 1))
    read.clear()
    assert read_all(paths, "image", journal, 0)[paths[0]].digest == first[paths[0]].digest
    assert read == [paths[0]]


@pytest.mark.slow
def test_lists_without_faults_train(tmp_path: Path, image_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the files of the data set are as they were."""
    planted.images(tmp_path / "data", 100)
    before = {path: path.lstat().st_mtime_ns for path in sorted((tmp_path / "data").rglob("*"))}
    opts = ["DATA.PATH_TO_DATA_DIR", str(tmp_path / "data"), "MODEL.NUM_CLASSES", "18"]
    words = ["--cfg", FT, *VIT_FT, *opts, "--fix", str(tmp_path / "clean")]
    code, result = check(tmp_path / "out", *words)
    assert code == 1 and before == {path: path.lstat().st_mtime_ns for path in sorted((tmp_path / "data").rglob("*"))}
    refused = [fault["where"] for fault in result["faults"] if fault["kind"] == "refused"]
    assert len(refused) == 1 and refused[0].startswith("val: ") and "(new0, new1)" in refused[0]
    classes = (tmp_path / "clean" / "classes.txt").read_text().splitlines()
    assert len(classes) == 18 and classes[:4] == ["Big Cat0", "Big Cat1", "big_cat0", "big_cat1"]
    clean = ["DATA.PATH_TO_DATA_DIR", str(tmp_path / "clean"), "MODEL.NUM_CLASSES", "18"]
    code, result = check(tmp_path / "again", "--cfg", FT, *VIT_FT, *clean)
    assert {fault["kind"] for fault in result["faults"]} == {"label gap", "another format", "grey", "tiny"}
    assert train(["--cfg", FT, *VIT_FT, *clean, "SOLVER.MAX_EPOCH", "1", "OUTPUT_DIR", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


@pytest.mark.slow
def test_clean_lists_of_videos(tmp_path: Path) -> None:
    planted.videos(tmp_path / "data", 30)
    root = str(tmp_path / "data")
    opts = [*MVIT_FT, "DATA.PATH_TO_DATA_DIR", root, "DATA.PATH_PREFIX", root, "MODEL.NUM_CLASSES", "7"]
    code, result = check(tmp_path / "out", "--cfg", CLIPS_FT, *opts, "--fix", str(tmp_path / "clean"))
    assert code == 1 and any("labels of train go up to 8" in fault["where"] for fault in result["faults"])
    assert result["speed"]["core"] > 0
    lines = (tmp_path / "clean" / "train.csv").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 26 and not any(name in str(lines) for name in ("gone", "high", "cut"))
    clean = [*MVIT_FT, *at(tmp_path / "clean"), "DATA.PATH_PREFIX", "", "MODEL.NUM_CLASSES", "5"]
    clean += ["TEST.ENABLE", "False", "SOLVER.MAX_EPOCH", "1", "OUTPUT_DIR", str(tmp_path / "run")]
    assert train(["--cfg", CLIPS_FT, *clean]) == 0


@pytest.mark.parametrize("recipe", [True, False])
def test_lists_of_any_folder_are_paths_alone(recipe: bool, tmp_path: Path) -> None:
    """Lines with a class and lines without one in the same list are refused, and pre-training needs none."""
    for place, name in enumerate(("a.png", "b.png", "trip/c.png")):
        planted.picture(tmp_path / "data" / name, place)
    given = ["--cfg", PT, *VIT_PT, *at(tmp_path / "data")] if recipe else [str(tmp_path / "data")]
    assert main([*given, "--output", str(tmp_path / "out"), "--workers", "0", "--fix", str(tmp_path / "clean")]) in (
        0,
        1,
    )
    cfg = load_config(PT, [*VIT_PT, *at(tmp_path / "clean"), "DATA.PATH_PREFIX", ""])
    found = find_split(cfg, DatasetRequest("train", augmented=True), "image")
    listed = [os.path.relpath(path, tmp_path / "data") for path, _ in found.samples]
    assert listed == ["a.png", "b.png", "trip/c.png"] and {label for _, label in found.samples} == {-1}


@pytest.mark.parametrize("unlabelled", [False, True])
def test_lists_have_the_test_that_class_folders_have(unlabelled: bool, image_data: Path, tmp_path: Path) -> None:
    """A test of folders reads val/ where test/ has no class, and a test of lists reads test.csv alone."""
    shutil.copytree(image_data, tmp_path / "data")
    if unlabelled:
        planted.picture(tmp_path / "data" / "test" / "0.png", 0)
    assert (
        main([str(tmp_path / "data"), "--output", str(tmp_path), "--workers", "0", "--fix", str(tmp_path / "clean")])
        == 0
    )
    assert (tmp_path / "clean/test.csv").read_text() == (tmp_path / "clean/val.csv").read_text()
    tested = []
    for root in (tmp_path / "data", tmp_path / "clean"):
        cfg = load_config(FT, [*VIT_FT, *at(root), "DATA.PATH_PREFIX", ""])
        tested.append(find_split(cfg, DatasetRequest("test", augmented=False), "image").samples)
    assert len(tested[0]) == 16 and list(tested[0]) == list(tested[1])


def test_a_test_set_of_its_own_is_listed(image_data: Path, tmp_path: Path) -> None:
    shutil.copytree(image_data, tmp_path / "data")
    planted.picture(tmp_path / "data" / "test" / next(image_data.glob("val/*")).name / "0.png", 0)
    main([str(tmp_path / "data"), "--output", str(tmp_path), "--workers", "0", "--fix", str(tmp_path / "clean")])
    assert len((tmp_path / "clean/test.csv").read_text().splitlines()) == 1


@pytest.mark.parametrize("key", ["DATA.PATH_TO_DATA_DIR", "DATA.SOURCES"])
def test_a_list_is_read_as_pre_training_reads_it(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to its own folder, wherever the command runs, and with any separator."""
    for place in range(3):
        planted.picture(tmp_path / "data" / f"{place}.png", place)
    listing = tmp_path / "data" / "mine.csv"
    listing.write_text("0.png,4\n1.png,5\n2.png,4\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    value = str(listing) if key == "DATA.PATH_TO_DATA_DIR" else f"[['{listing}', 1]]"
    cfg = load_config(PT, [*VIT_PT, key, value])
    expected = [path for path, _ in find_split(cfg, DatasetRequest("train", augmented=True), "image").samples]
    assert [sample.path for sample in collect(str(listing), cfg).samples] == expected
    assert expected == [str(tmp_path / "data" / f"{place}.png") for place in range(3)]


@pytest.mark.slow
def test_the_speed_of_reading_is_compared(image_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code, result = check(tmp_path, "--cfg", PT, *VIT_PT, *at(image_data), "--gpus", "2")
    assert code == 0 and result["speed"]["needed"] == 8000 and result["speed"]["core"] > 1
    assert "2 x GPU take 8,000: " in caplog.text
    check(tmp_path, "--cfg", PT, *VIT_PT, *at(image_data), "--gpus", "2", "--rate", "1")
    assert "2 x GPU take 2: enough" in caplog.text


def test_the_page_needs_no_network_and_escapes_names(tmp_path: Path) -> None:
    planted.picture(tmp_path / "data" / "<b>x" / "tiny&.png", 1, side=8)
    planted.picture(tmp_path / "data" / "y" / "0.png", 2)
    assert check(tmp_path / "out", str(tmp_path / "data"))[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;x/tiny&amp;.png" in page and "<b>x" not in page and "data:image/jpeg;base64," in page
    assert not re.search(r"https?://|<script|<link|url\(", page)


def test_published_totals(image_data: Path) -> None:
    found = collect(str(image_data), None)
    found.folders = {"train": [str(number) for number in range(1000)]}
    faults = find_faults(found, {sample.path: read_facts(sample.path, "image") for sample in found.samples}, Recipe())
    said = [(fault.where, fault.split, fault.detail) for fault in faults if fault.kind == "count"]
    assert ("40 samples, ImageNet-1K has 1281167", "train", "-1281127") in said and len(said) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --cfg RECIPE with overrides, or one folder or list"),
        (["{}/none"], "there is no file or folder"),
        (["{}/empty"], "holds neither images nor videos"),
        (["{}/x.jpg"], "x.jpg, line 1"),
        (["--cfg", PT], "DATA.PATH_TO_DATA_DIR is ''"),
        (
            ["--cfg", PT, "--prefix", "x", "DATA.PATH_TO_DATA_DIR", "{}/empty"],
            "--prefix is 'x', .* give DATA.PATH_PREFIX",
        ),
        (["{}/empty", "--output", "{}/x.jpg/out"], "cannot be written"),
    ],
)
def test_bad_input(words: list[str], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.jpg").write_text("no list\n")
    output = ["--output", str(tmp_path / "out")] if "--output" not in words else []
    assert main([*(word.format(tmp_path) for word in words), *output]) == 2
    assert re.search(said, caplog.text)


def test_names_that_are_not_printable_are_listed(image_data: Path, tmp_path: Path) -> None:
    """Such as those of screenshots on a Mac, with a narrow space, and names with the space of Japanese."""
    root = tmp_path / "set"
    shutil.copytree(image_data, root)
    for name, path in zip(("at 3\u202fPM", "犬\u3000写真"), sorted(root.glob("train/*/*")), strict=False):
        path.rename(path.with_name(f"{name}.jpg"))
    check(tmp_path / "out", str(root), "--fix", str(tmp_path / "clean"))
    listed = (tmp_path / "clean" / "train.csv").read_text()
    assert "at 3\u202fPM.jpg" in listed and "犬\u3000写真.jpg" in listed and len(listed.splitlines()) == 40


def test_a_copy_beside_the_class_folders_costs_no_sample(image_data: Path, tmp_path: Path) -> None:
    """Where classes do not matter, a copy in another folder is a copy."""
    root = tmp_path / "set"
    shutil.copytree(image_data, root)
    first, *_, last = sorted(root.glob("train/*/*"))
    shutil.copy(first, root / "train" / "0 copy.jpg")
    _, result = check(tmp_path / "out", str(root), "--fix", str(tmp_path / "clean"))
    assert [fault["kind"] for fault in result["faults"]] == ["outside"]
    assert str(first) in (tmp_path / "clean" / "train.csv").read_text()
    (root / "train" / "0 copy.jpg").unlink()
    shutil.copy(first, last.with_name("again.jpg"))
    for recipe, kind in (([], "two classes"), (["--cfg", str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")], "duplicate")):
        place = [str(root)] if not recipe else [*recipe, "DATA.PATH_TO_DATA_DIR", str(root), "NUM_GPUS", "0"]
        _, result = check(tmp_path / kind, *place)
        assert kind in [fault["kind"] for fault in result["faults"]]


def test_shards_are_checked_as_folders_are(image_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twice: what the first check noted is known to the second, which draws the odd ones all the same."""
    root = tmp_path / "set"
    shutil.copytree(image_data, root)
    (bad, first, *_), (copy, *_) = (sorted(root.glob(f"{split}/*/*")) for split in ("train", "val"))
    bad.write_bytes(b"no image")
    shutil.copy(first, copy)
    assert make_shards([str(root), str(tmp_path / "shards"), "--workers", "0", "--size", "20K"]) == 0
    for _ in range(2):
        code, result = check(tmp_path, str(tmp_path / "shards"))
        assert code == 1
        assert [(fault["kind"], fault["where"].partition("::")[2]) for fault in result["faults"]] == [
            ("unreadable", os.path.relpath(bad, root / "train")),
            ("in two splits", os.path.relpath(first, root / "train")),
        ]
        assert [(row["split"], row["samples"], row["classes"]) for row in result["splits"]][:1] == [("train", 40, 4)]
    assert "data:image/jpeg" in (tmp_path / "report.html").read_text()
    assert main([str(tmp_path / "shards"), "--output", str(tmp_path), "--fix", str(tmp_path / "clean")]) == 2
    assert "the samples of shards are none" in caplog.text
