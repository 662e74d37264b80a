"""Names and scores of what a classifier sees."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskfeat.analysis.command import exit_code
from maskfeat.analysis.inputs import find_inputs, input_loader
from maskfeat.analysis.model import load_model
from maskfeat.analysis.predict import main
from maskfeat.batch import Batch
from maskfeat.distributed.preemption import INTERRUPTED
from maskfeat.errors import UserError
from tests.analysis.saved import CLIPS, IMAGES, PRETRAINED, said_in, save_network

Printed = pytest.CaptureFixture[str]
Logged = pytest.LogCaptureFixture
NAMES = ["cat", "dog, big", "\u65e5\u672c", "3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("network") / "a.pyth", IMAGES, classes=NAMES)


def run(checkpoint: Path, *opts: object) -> int:
    return main(["--checkpoint", str(checkpoint), "--device", "cpu", "--workers", "0", *map(str, opts)])


def test_all_formats_say_what_the_model_does(
    checkpoint: Path, image_data: Path, tmp_path: Path, capsys: Printed, caplog: Logged
) -> None:
    folder = next((image_data / "val").iterdir())
    paths = sorted(str(path) for path in folder.iterdir())
    expected = load_model(checkpoint, device="cpu").predict(paths, top=2)
    assert run(checkpoint, folder, "--top", 2, "--format", "json", "--output", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert [entry["path"] for entry in found] == paths
    for entry, (_, classes, _) in zip(found, expected, strict=True):
        assert [one["class"] for one in entry["classes"]] == [name for name, _ in classes]
        assert [one["score"] for one in entry["classes"]] == pytest.approx([score for _, score in classes], abs=1e-5)
    assert run(checkpoint, folder, "--top", 2, "--format", "csv", "--output", tmp_path / "a.csv") == 0
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["path"], row["rank"], row["class"]) for row in rows] == [
        (path, str(rank), name) for path, classes, _ in expected for rank, (name, _) in enumerate(classes, start=1)
    ]
    capsys.readouterr()
    assert run(checkpoint, folder, "--top", 2) == 0
    name, score = expected[0].classes[0]
    assert capsys.readouterr().out.splitlines()[:2] == [paths[0], f"  {100 * score:6.2f} %  {name}"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.csv"}


@pytest.mark.parametrize(("opts", "views"), [([], (2, 1)), (["--views", "1x3"], (1, 3)), (["--views", "1"], (1, 1))])
def test_scores_of_views_are_averaged_as_in_a_test(
    opts: list[str], views: tuple[int, int], clip_data: Path, tmp_path: Path
) -> None:
    path = save_network(tmp_path / "a.pyth", CLIPS, "MODEL.NUM_CLASSES", "3", "TEST.NUM_ENSEMBLE_VIEWS", "2")
    model, inputs = load_model(path, device="cpu"), find_inputs(clip_data / "test.csv", "video")
    every = torch.cat([model.objective.predict(Batch(clip=b.clip)) for b in input_loader(model, inputs, views, 4, 0)])
    mean = every.reshape(6, views[0] * views[1], 3).mean(dim=1)
    output = tmp_path / "a.json"
    opts = [*opts, "--format", "json", "--output", str(output), "--batch-size", "4", "--top", "9"]
    assert run(path, clip_data / "test.csv", *opts) == 0
    found = [{int(one["class"]): one["score"] for one in row["classes"]} for row in json.loads(output.read_text())]
    assert torch.allclose(torch.tensor([[row[k] for k in range(3)] for row in found]), mean, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "opts", "start"),
    [
        ("a.csv", [], "path,rank,class,score\n"),
        ("a.JSON", [], "[\n {"),
        ("a.txt", [], "{image}\n  "),
        ("a.csv", ["--format", "table"], "{image}\n  "),
    ],
)
def test_the_ending_says_the_format(
    name: str, opts: list[str], start: str, checkpoint: Path, image_data: Path, tmp_path: Path
) -> None:
    """Where --format does not; and the folder of the file is made."""
    image = next((image_data / "val").rglob("*.jpg"))
    output = tmp_path / "new" / "folder" / name
    assert run(checkpoint, image, "--output", output, *opts) == 0
    assert output.read_text(encoding="utf-8").startswith(start.replace("{image}", str(image)))


def test_names_of_a_file(image_data: Path, tmp_path: Path, capsys: Printed, caplog: Logged) -> None:
    path = save_network(tmp_path / "a.pyth", IMAGES)
    image = next((image_data / "val").rglob("*.jpg"))
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    assert run(path, image) == 0
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]} == set("0123")
    assert run(path, image, "--classes", tmp_path / "names.txt") == 0
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]} == set("abcd")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert run(path, image, "--classes", tmp_path / "names.txt") == 2
    text = said_in(caplog)
    assert "names 3 classes (a, b, c), and the classifier has 4" in text and "--classes" in text


def test_what_is_left_out_is_said(
    checkpoint: Path, image_data: Path, tmp_path: Path, capsys: Printed, caplog: Logged
) -> None:
    shutil.copy(next((image_data / "val").rglob("*.jpg")), tmp_path / "1.jpg")
    (tmp_path / "2.jpg").write_bytes(b"broken")
    (tmp_path / "3.mp4").touch()
    assert run(checkpoint, tmp_path) == 0
    found, log = capsys.readouterr(), said_in(caplog)
    assert "1.jpg" in found.out and "2.jpg" not in found.out
    assert "left out: 1 video" in log and f"cannot be read: {tmp_path / '2.jpg'}: not a JPEG" in log
    assert run(checkpoint, tmp_path / "2.jpg") == 2
    assert "error: none of 1 image can be read" in said_in(caplog)


@pytest.mark.parametrize(
    ("inputs", "opts", "said"),
    [
        (["none.jpg"], [], "there is no file or folder none.jpg"),
        (["empty"], [], "no image in empty"),
        (["film.mp4"], [], "no image in film.mp4, which holds 1 video"),
        (["1.jpg"], ["--output", "empty"], "--output empty is a folder"),
        (["1.jpg"], ["--output", "1.jpg/x.csv"], "--output 1.jpg/x.csv cannot be written: Not a directory"),
        (["1.jpg"], ["--checkpoint", "none.pyth"], "none.pyth"),
        (["1.jpg"], ["--checkpoint", "pretrained.pyth"], "pretrained.pyth does not classify"),
        (["1.jpg"], ["--views", "2x1"], "takes images, which have one view"),
        (["1.jpg"], ["--classes", "none.txt"], "none.txt cannot be read (no such file): see --classes"),
    ],
)
def test_bad_input_is_one_line_and_2(
    inputs: list[str],
    opts: list[str],
    said: str,
    checkpoint: Path,
    image_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Printed,
    caplog: Logged,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("film.mp4").touch()
    shutil.copy(next((image_data / "val").rglob("*.jpg")), "1.jpg")
    if "pretrained.pyth" in opts:
        save_network(Path("pretrained.pyth"), PRETRAINED)
    assert run(checkpoint, *inputs, *opts) == 2
    (line,) = [line for line in said_in(caplog).splitlines() if "error" in line]
    assert line.startswith("error: ") and said in line and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "interrupted"),
        (UserError("a process that read files ended"), "interrupted"),
    ],
)
def test_ctrl_c_is_one_line_and_130(error: BaseException, said: str, caplog: Logged) -> None:
    """Also where a data worker ends with it, which raises an error of its own."""

    def work() -> int:
        try:
            raise KeyboardInterrupt
        finally:
            raise error

    assert exit_code(work) == INTERRUPTED and said_in(caplog) == said
    assert exit_code(work, goes_on=True) == INTERRUPTED
    assert said_in(caplog) == f"{said}: the same command goes on where it stopped"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_ends_it(lines: int, monkeypatch: pytest.MonkeyPatch, caplog: Logged) -> None:
    """As `head -1`, be it noticed while lines are written or when the last of them leave the buffer."""

    def work() -> int:
        sys.stdout.writelines("a line\n" for _ in range(lines))
        return 0

    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert exit_code(work) == 141 and not caplog.text
        stdout.flush()  # as Python does at its end


def test_an_error_that_no_ctrl_c_precedes_is_raised() -> None:
    def work() -> int:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="is killed"):
        exit_code(work)


@pytest.mark.slow
def test_a_name_that_is_no_text_is_printed(checkpoint: Path, image_data: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    shutil.copy(next((image_data / "val").rglob("*.jpg")), name)
    command = [sys.executable, "-m", "maskfeat", "predict", "--checkpoint", str(checkpoint), "--device", "cpu", name]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith(name + b"\n")


def test_scores_that_are_not_finite(image_data: Path, tmp_path: Path, caplog: Logged) -> None:
    path = save_network(tmp_path / "a.pyth", IMAGES)
    content = torch.load(path, weights_only=True)
    # Finite weights whose sums overflow.
    content["model_state"]["head.projection.weight"].fill_(3e38)
    torch.save(content, path)
    assert run(path, next((image_data / "val").rglob("*.jpg")), "--top", 1) == 2
    assert "are not finite" in said_in(caplog)


def test_a_list_is_not_overwritten_by_its_predictions(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "list.csv").write_text("a.jpg\n")
    assert run(checkpoint, tmp_path / "list.csv", "--output", tmp_path / "list.csv") == 2
    assert "is what is read" in caplog.text and (tmp_path / "list.csv").read_text() == "a.jpg\n"
