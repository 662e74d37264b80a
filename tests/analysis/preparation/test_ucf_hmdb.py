"""Lists of UCF-101, HMDB51, JHMDB and folders of one's own."""

import logging
import re
import shutil
from pathlib import Path

import pytest

from maskfeat.analysis.preparation.ucf_hmdb import hold_out, listing_of, main, source_video
from maskfeat.data.datasets.sample_list import read_sample_list
from tests.data.media import write_video

UCF = ("Archery", "BodyWeight")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("film") / "one.mp4", frames=6)


def lay_out(root: Path, film: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(film, root / name)
    return root


def listed(path: Path) -> list[tuple[str, int]]:
    return read_sample_list(path)


@pytest.fixture
def ucf(tmp_path: Path, film: Path) -> Path:
    names = [f"{label}/v_{label}_g{g:02d}_c{c:02d}.mp4" for label in UCF for g in (1, 2, 8) for c in (1, 2)]
    lay_out(tmp_path / "UCF-101", film, *names)
    splits = tmp_path / "ucfTrainTestlist"
    splits.mkdir()
    # The official files name .avi files, and number classes from 1 in the training list.
    lines = [(name.replace(".mp4", ".avi"), 1 + UCF.index(name.split("/")[0])) for name in names]
    (splits / "trainlist01.txt").write_text("".join(f"{n} {c}\r\n" for n, c in lines if "_g01_" not in n))
    (splits / "testlist01.txt").write_text("".join(f"{n}\r\n" for n, c in lines if "_g01_" in n))
    return tmp_path


def test_ucf(ucf: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert (
        main([str(ucf / "UCF-101"), str(ucf / "out"), "--splits", str(ucf / "ucfTrainTestlist"), "--workers", "0"]) == 0
    )
    train = listed(ucf / "out" / "train.csv")
    assert len(train) == 8 and ("Archery/v_Archery_g02_c01.mp4", 0) in train and {label for _, label in train} == {0, 1}
    assert [name for name, _ in listed(ucf / "out" / "val.csv")] == [
        f"{label}/v_{label}_g01_c0{c}.mp4" for label in UCF for c in (1, 2)
    ]
    assert (ucf / "out" / "test.csv").read_text() == (ucf / "out" / "val.csv").read_text()
    assert (ucf / "out" / "classes.txt").read_text() == "Archery\nBodyWeight\n"
    assert "train.csv: 8 videos of 2 classes; the published list has 8" in caplog.text
    assert "MODEL.NUM_CLASSES 2" in caplog.text


def test_missing_and_unreadable_videos(ucf: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [str(ucf / "UCF-101"), str(ucf / "out"), "--splits", str(ucf / "ucfTrainTestlist"), "--workers", "0"]
    (ucf / "UCF-101" / "Archery" / "v_Archery_g02_c01.mp4").unlink()
    (ucf / "UCF-101" / "Archery" / "v_Archery_g02_c02.mp4").write_bytes(b"x" * 900)
    assert main(words) == 2
    assert "1 of 8 videos of train are not in" in caplog.text and "Archery/v_Archery_g02_c01; --allow" in caplog.text
    assert main([*words, "--allow-missing"]) == 0
    assert len(listed(ucf / "out" / "train.csv")) == 6
    assert "6 videos of 2 classes, 1 missing, 1 unreadable" in caplog.text
    assert (ucf / "out" / "missing.txt").read_text() == "Archery/v_Archery_g02_c01\n"
    assert "v_Archery_g02_c02.mp4: not a video" in (ucf / "out" / "unreadable.txt").read_text()


def test_hmdb(tmp_path: Path, film: Path) -> None:
    """0 is neither trained nor tested on; names may have spaces and brackets."""
    lay_out(tmp_path / "v", film, "run/a (1).mp4", "run/b.mp4", "run/c.mp4", "wave hand/d.mp4", "wave hand/e.mp4")
    splits = tmp_path / "testTrainMulti_7030_splits"
    splits.mkdir()
    (splits / "run_test_split2.txt").write_text("a (1).avi 1 \nb.avi 2 \nc.avi 0 \n")
    (splits / "wave hand_test_split2.txt").write_text("d.avi 1 \ne.avi 2 \n")
    words = [str(tmp_path / "v"), str(tmp_path / "out"), "--splits", str(splits), "--split", "2", "--workers", "0"]
    assert main(words) == 0
    assert listed(tmp_path / "out" / "train.csv") == [("run/a (1).mp4", 0), ("wave hand/d.mp4", 1)]
    assert listed(tmp_path / "out" / "val.csv") == [("run/b.mp4", 0), ("wave hand/e.mp4", 1)]


def test_names_that_no_list_can_hold_are_left_out(tmp_path: Path, film: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{label}/{n}.mp4" for label in ("na\udcefve", "run", "wave") for n in (1, 2)]
    lay_out(tmp_path / "v", film, *names, "run/caf\udce9.mp4", "run/two\nlines.mp4")
    assert main([str(tmp_path / "v"), str(tmp_path / "out"), "--short-side", "32", "--workers", "0"]) == 0
    found = [one for split in ("train", "val") for one in listed(tmp_path / "out" / f"{split}.csv")]
    assert sorted(found) == [("run/1.mp4", 1), ("run/2.mp4", 1), ("wave/1.mp4", 2), ("wave/2.mp4", 2)]
    unreadable = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    cause = "its name is not UTF-8 text in one line, which a list takes: rename it"
    lost = ["na\\udcefve/1.mp4", "na\\udcefve/2.mp4", "run/caf\\udce9.mp4", "run/two\\nlines.mp4"]
    assert sorted(unreadable) == [f"{name}: {cause}" for name in lost]
    assert (tmp_path / "out" / "classes.txt").read_text() == "na\\udcefve\nrun\nwave\n"
    encoded = [path.name for path in (tmp_path / "out" / "videos").rglob("*.mp4")]
    assert sorted(encoded) == ["1.mp4", "1.mp4", "2.mp4", "2.mp4"] and "unreadable: run/caf" in caplog.text


def test_films() -> None:
    assert source_video("v_Archery_g08_c01") == "v_Archery_g08"
    jhmdb = "Aussie_Brunette_Brushing_Long_Hair_brush_hair_u_nm_np1_ba_med_3"
    assert source_video(jhmdb) == "Aussie_Brunette_Brushing_Long_Hair_brush_hair"
    assert source_video("holiday 3") == "holiday 3"


def test_no_film_is_held_out_in_part() -> None:
    names = [f"{label}/v_{label}_g{g:02d}_c{c:02d}.avi" for label in "abc" for g in range(25) for c in range(2 + g % 5)]
    held = hold_out(names, 0.3, seed=0)
    for label in "abc":
        of_class = [name for name in names if name[0] == label]
        assert abs(len([name for name in of_class if name in held]) / len(of_class) - 0.3) < 0.05
    films = {source_video(Path(name).stem) for name in held}
    assert all((source_video(Path(name).stem) in films) == (name in held) for name in names)
    assert hold_out(names, 0.3, 0) == held != hold_out(names, 0.3, 1)
    assert len(hold_out(["a/1.mp4", "a/2.mp4"], 0.01, 0)) == len(hold_out(["a/1.mp4", "a/2.mp4"], 0.99, 0)) == 1


@pytest.mark.parametrize(
    ("names", "splits", "said"),
    [
        ([], None, "there is no folder .*v: it must hold the videos"),
        (["a.txt"], None, "has no video .*, it holds 1 .txt file"),
        (["a.mp4", "b/c.mp4"], None, "must hold a folder for each class; a.mp4 lies directly in it"),
        (["a/1.mp4", "b/2.mp4"], None, "all videos of class 'a' are of one film"),
        (["a/1.mp4"], {}, "neither trainlist01.txt and testlist01.txt"),
        (["a/1.mp4"], {"a_test_split1.txt": "1.avi 3"}, "'1.avi 3' is not a video and 0, 1 or 2"),
        (["a/1.mp4"], {"a_test_split1.txt": "2.avi 1"}, "1 of 1 videos of train are not in"),
    ],
)
def test_bad_input(
    names: list[str], splits: dict[str, str] | None, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / name).touch()
    words = [str(tmp_path / "v"), str(tmp_path / "out")]
    if splits is not None:
        (tmp_path / "splits").mkdir()
        for name, text in splits.items():
            (tmp_path / "splits" / name).write_text(text)
        words += ["--splits", str(tmp_path / "splits")]
    with caplog.at_level(logging.ERROR):
        assert main(words) == 2
    assert re.search(said, caplog.text)


def test_jhmdb_from_its_folder_of_classes_alone(shared: Path) -> None:
    listing = listing_of(shared / "data" / "jhmdb" / "videos", None, 1, 0.3, 0)
    train, val = ({name for name, _ in listing.splits[part]} for part in ("train", "val"))
    assert len(listing.classes) == 21 and len(train) + len(val) == 928 and abs(len(val) / 928 - 0.3) < 0.03
    assert not {source_video(Path(name).stem) for name in train} & {source_video(Path(name).stem) for name in val}
