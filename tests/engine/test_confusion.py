"""What a test says of each class."""

import builtins
import csv
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from maskfeat.checkpoint.files import find_checkpoints, open_checkpoint
from maskfeat.engine import confusion
from maskfeat.engine.confusion import Confusion, write_class_results
from maskfeat.engine.run import main
from tests.small import MVIT_FT, RECIPES, clips

Row = dict[str, Any]


def details(rows: list[tuple[int, list[int], bool]]) -> str:
    samples = [{"index": i, "label": a, "predicted": b, "read": c} for i, (a, b, c) in enumerate(rows)]
    return json.dumps({"top1": 0, "samples": samples})


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def drawn(classes: int, number: int) -> list[tuple[int, list[int], bool]]:
    rng = np.random.default_rng(0)
    best = [rng.permutation(classes)[:5].tolist() for _ in range(number)]
    return [(int(rng.integers(classes)), top, bool(rng.random() < 0.8)) for top in best]


def test_the_matrix_is_that_of_scikit_learn() -> None:
    rows = drawn(7, 300)
    found = Confusion(details(rows), 7, None)
    read = [(label, top[0]) for label, top, ok in rows if ok]
    assert np.array_equal(found.matrix, confusion_matrix(*zip(*read, strict=True), labels=range(7)))
    lines = table(found.matrix_table())
    assert [[int(line[str(k)]) for k in range(7)] for line in lines] == found.matrix.tolist()
    assert [line["class"] for line in lines] == [str(k) for k in range(7)]


def test_unreadable_samples_count_as_wrong() -> None:
    rows = [(0, [0, 1], True), (0, [0, 1], False), (0, [1, 0], True), (0, [1, 2], True), (1, [1, 0], True)]
    zero, one, two = table(Confusion(details(rows), 3, ["a, b", "c"]).class_table())
    assert zero == {
        "number": "0", "class": "a, b", "samples": "4", "top1": "25.00", "top5": "50.00", "unreadable": "1",
        "most_often_taken_for": "c", "times": "2",
    }  # fmt: skip
    assert (one["class"], one["top1"], one["most_often_taken_for"]) == ("c", "100.00", "")
    assert (two["class"], two["samples"], two["top1"]) == ("2", "0", ""), "a class without a name or a sample"


def test_the_pairs_that_are_confused_most() -> None:
    rows = [(label, [taken], True) for label, taken in [(2, 0), (1, 0), (2, 0), (0, 1), (1, 1), (1, 1), (1, 1)]]
    assert Confusion(details(rows), 3, None).confused() == [(2, 0, 2), (0, 1, 1), (1, 0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("classes", [3, 100])
def test_the_picture_shows_the_matrix(classes: int) -> None:
    """Dark squares stand where samples were taken for a class: on the diagonal, where all are right."""
    rows = [(k, [k], True) for k in range(classes)]
    right = Confusion(details(rows), classes, ["$x_1$", "\u65e5", *map(str, range(2, classes))]).picture("title")
    wrong = Confusion(details([(k, [0], True) for k in range(classes)]), classes, None).picture("title")
    assert right is not None and wrong is not None
    shares = []
    for png in (right, wrong):
        pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)
        dark = (np.abs(pixels - (8, 48, 107)).max(axis=2) < 3)[: int(len(pixels) * 0.8)]  # the last colour of "Blues"
        rows_, columns = np.nonzero(dark)
        shares.append(np.corrcoef(rows_, columns)[0, 1] if columns.std() else 0.0)
    assert shares[0] > 0.8 and abs(shares[1]) < 0.2


def test_files_with_and_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Confusion(details(drawn(3, 20)), 3, ["a", "b", "c\udcff"])
    said = write_class_results(str(tmp_path), "2x1_ema", found)
    files = {"test_classes_2x1_ema.csv", "test_confusion_2x1_ema.csv", "test_confusion_2x1_ema.png"}
    assert {path.name for path in tmp_path.iterdir()} == files and all(name in said for name in files)
    whole = builtins.__import__

    def without(name: str, *given: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return whole(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "bare").mkdir()
    said = write_class_results(str(tmp_path / "bare"), "2x1", found)
    assert "pip install '.[plots]'" in said and "png" not in said and len(list((tmp_path / "bare").iterdir())) == 2
    monkeypatch.setattr(confusion, "LARGEST", 2)
    (tmp_path / "many").mkdir()
    said = write_class_results(str(tmp_path / "many"), "2x1", found)
    assert "no matrix of more than 2 classes" in said
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["test_classes_2x1.csv"]


@pytest.mark.slow
def test_a_run_names_the_classes_of_a_list(clip_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From classes.txt into the checkpoint, and from there into the results of a test without that file."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val", "test"):
        (data / f"{split}.csv").write_text((clip_data / f"{split}.csv").read_text())
    (data / "classes.txt").write_text("left\nright\nup, or so\n")
    opts = [*MVIT_FT, *clips(data), "DATA.PATH_PREFIX", str(clip_data), "MODEL.NUM_CLASSES", "3"]
    opts += ["SOLVER.MAX_EPOCH", "1", "TRAIN.EVAL_PERIOD", "0", "OUTPUT_DIR", str(tmp_path / "out")]
    recipe = str(RECIPES / "k400_MVITv2_S_16x4_FT.yaml")
    assert main(["--cfg", recipe, *opts, "TEST.ENABLE", "False"]) == 0
    path = find_checkpoints(tmp_path / "out", "ssl_eval")[-1]
    assert open_checkpoint(path)["classes"] == ["left", "right", "up, or so"]
    (data / "classes.txt").unlink()
    tested = [*opts, "TRAIN.ENABLE", "False", "TEST.ENABLE", "True", "TEST.CHECKPOINT_FILE_PATH", str(path)]
    assert main(["--cfg", recipe, *tested, "OUTPUT_DIR", str(tmp_path / "test")]) == 0
    lines = table((tmp_path / "test" / "test_classes_2x1.csv").read_text())
    assert [line["class"] for line in lines] == ["left", "right", "up, or so"]
    assert [line["samples"] for line in lines] == ["2", "2", "2"]
    results = json.loads((tmp_path / "test" / "test_results_2x1.json").read_text())
    assert np.mean([float(line["top1"]) for line in lines]) == pytest.approx(results["top1"], abs=0.01)
    (data / "classes.txt").write_text("left\nright\n")
    capsys.readouterr()
    assert main(["--cfg", recipe, *tested, "OUTPUT_DIR", str(tmp_path / "test")]) == 2
    assert "classes.txt" in capsys.readouterr().out
