"""The quickstart at toy size: every stage, a table whose numbers are those of the runs, a picture; true sentences."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskfeat.config import load_config, save_config
from maskfeat.demos import quickstart as demo
from maskfeat.demos.quickstart import CONFIGS, Outcome, Quickstart, Size, learned, main, play, verdict
from maskfeat.demos.synthetic import make_clips, make_images
from tests.small import REPO

TOY = Size(
    images=4,
    labelled=4,
    image_tests=2,
    clips=4,
    clip_tests=2,
    opts=("SOLVER.MAX_EPOCH", "1", "SOLVER.WARMUP_EPOCHS", "0", "TRAIN.EVAL_PERIOD", "1", "TRAIN.BATCH_SIZE", "4",
          "DATA_LOADER.NUM_WORKERS", "0", "TENSORBOARD.ENABLE", "False", "MASK.HOG_BINS", "3"),
)  # fmt: skip


@pytest.mark.slow
def test_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = Quickstart(tmp_path / "quick start", TOY)
    assert play(quickstart) == 0
    said = capsys.readouterr().out
    for number in range(1, 11):
        assert f"== {number}/10" in said
    assert said.count("python tools/run_net.py --cfg configs/quickstart/") == 9
    table = quickstart.table()
    found = [[float(x) for x in re.findall(r"\d\.\d{4}", line)] for line in table.splitlines()]
    losses = [row for row in found if row]
    assert [len(row) for row in losses] == [4, 4, 4]
    for kind, row in zip(("images", "clips", "mfm"), losses, strict=True):
        held_out = quickstart.last(f"{kind}_pt", "val_epoch")
        assert row[0] == pytest.approx(float(held_out["zero_predictor"]), abs=1e-4)
        assert row[3] == pytest.approx(float(held_out["loss"]), abs=1e-4)
        tested = quickstart.last(f"{kind}_ft", "test_final")
        assert f"{float(tested['top1']):.1f} %" in table
    log = (tmp_path / "quick start" / "images_ft" / "stdout.log").read_text()
    assert "weights from" in log
    assert "weights from" not in (tmp_path / "quick start" / "images_scratch" / "stdout.log").read_text()
    for name in ("hog_predictions.png", "spectrum_predictions.png"):
        pixels = np.asarray(Image.open(tmp_path / "quick start" / name).convert("RGB"))
        assert pixels.shape[0] > 500 and pixels.std() > 10
    # A second time, nothing is trained again.
    assert play(Quickstart(tmp_path / "quick start", TOY)) == 0
    assert capsys.readouterr().out.count("nothing left to train") == 9


@pytest.mark.parametrize(
    ("model", "ridge", "words"),
    [
        (0.05, 0.04, "5.0 % below the mean of each position, 21 % of what a linear model finds"),
        (0.05, 0.06, "5.0 % below the mean of each position."),
        (0.0527, 0.04, "no more than the mean of each position (loss 0.1 % above it)"),
    ],
)
def test_what_a_model_has_learned_follows_from_its_losses(model: float, ridge: float, words: str) -> None:
    assert words in learned({"mean_by_place": 0.05263, "ridge": ridge, "model": model})


@pytest.mark.parametrize(
    ("tuned", "scratch", "words"),
    [
        (Outcome(0.6, 200), Outcome(0.4, 200), "helped"),
        (Outcome(0.4, 200), Outcome(0.6, 200), "did harm"),
        (Outcome(0.45, 200), Outcome(0.4, 200), "no difference beyond the noise"),
    ],
)
def test_the_verdict_follows_from_the_numbers(tuned: Outcome, scratch: Outcome, words: str) -> None:
    assert words in verdict(tuned, scratch)


def test_an_outcome_tells_its_standard_error() -> None:
    assert Outcome(0.5, 100).error == pytest.approx(0.05)
    assert str(Outcome(0.5, 100)) == " 50.0 % +- 5.0"


@pytest.mark.parametrize("name", ["images", "clips", "mfm"])
def test_pre_training_and_fine_tuning_are_of_one_model(name: str) -> None:
    pretraining, finetuning = (load_config(CONFIGS / f"{name}_{kind}.yaml") for kind in ("pt", "ft"))
    for key in ("DEPTH", "EMBED_DIM", "NUM_HEADS", "PATCH_STRIDE", "POOL_Q_STRIDE", "DIM_MUL"):
        assert pretraining.MVIT[key] == finetuning.MVIT[key], key
    assert pretraining.RESNET.DEPTH == finetuning.RESNET.DEPTH
    assert {"mfm": "MFM"}.get(name, "MaskMViT") == pretraining.MODEL.MODEL_NAME
    assert pretraining.DATA.TRAIN_CROP_SIZE == finetuning.DATA.TRAIN_CROP_SIZE


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and a run of an earlier quickstart, and with files of the user; nothing is trained."""
    monkeypatch.setattr(demo, "play", lambda quickstart: 0)
    make_images(tmp_path / "data" / "images", ["disc"], 1, 1, (32, 32))
    make_clips(tmp_path / "data" / "clips_few", ["bob"], 1, 1, 1, num_frames=2, size=(32, 32))
    for name, data in (("images_pt", "images"), ("mfm_scratch", "images_few")):
        opts = ["DATA.PATH_TO_DATA_DIR", str(tmp_path / "data" / data)]
        save_config(None, opts, load_config(None, opts), tmp_path / name)
        (tmp_path / name / "checkpoints").mkdir()
    (tmp_path / "images_ft").mkdir()
    (tmp_path / "images_ft" / "run.lock").touch()  # it ended before it began
    (tmp_path / "data" / "mine").mkdir()
    (tmp_path / "data" / "mine" / "photo.jpg").touch()
    (tmp_path / "data" / "list.csv").touch()
    return tmp_path


def test_a_fresh_start_removes_what_a_quickstart_made_alone(earlier: Path) -> None:
    assert main(["--fresh", "--output", str(earlier)]) == 0
    left = sorted(path.relative_to(earlier).as_posix() for path in earlier.rglob("*"))
    assert left == ["data", "data/list.csv", "data/mine", "data/mine/photo.jpg", "images_ft", "images_ft/run.lock"]


@pytest.mark.parametrize("name", ["data/images_few/photo.jpg", "clips_pt/notes.txt", "mfm_ft"])
def test_a_fresh_start_refuses_to_remove_what_is_of_someone_else(
    name: str, earlier: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (earlier / name).parent.mkdir(exist_ok=True)
    (earlier / name).write_text("mine")
    assert main(["--fresh", "--output", str(earlier)]) == 2
    assert f"error: --fresh would delete {(earlier / name).parent if '/' in name else earlier / name}" in caplog.text
    assert (earlier / name).is_file() and (earlier / "images_pt").is_dir() and (earlier / "data" / "images").is_dir()


def test_a_fresh_start_refuses_a_run_on_other_data(earlier: Path, caplog: pytest.LogCaptureFixture) -> None:
    opts = ["DATA.PATH_TO_DATA_DIR", "/elsewhere/photos"]
    save_config(None, opts, load_config(None, opts), earlier / "images_scratch")
    assert main(["--fresh", "--output", str(earlier)]) == 2
    assert "images_scratch, which no quickstart made: move it away, or give another --output" in caplog.text


def test_the_folder_may_have_a_dollar_in_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, runs = tmp_path / "5$ $HOME", []
    monkeypatch.setattr(Quickstart, "make_data", lambda self: None)
    monkeypatch.setattr(demo, "find_checkpoints", lambda folder, task: [folder / "checkpoints" / "last.pyth"])
    monkeypatch.setattr(demo, "run_net", lambda argv: runs.append(load_config(argv[1], argv[2:])))
    Quickstart(root, Size()).run_all()
    for cfg in runs:
        data = Path(cfg.DATA.PATH_TO_DATA_DIR)
        assert data.parent == root / "data" and cfg.DATA.PATH_PREFIX in ("", str(data))
    assert [cfg.OUTPUT_DIR for cfg in runs[:3]] == [str(root / f"images_{stage}") for stage in ("pt", "ft", "scratch")]
    assert str(root / "images_pt" / "checkpoints" / "last.pyth") == runs[1].TRAIN.CHECKPOINT_FILE_PATH


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--output", "my runs", "NUM_GPUS", "1"], ["--output", "{}/my runs", "NUM_GPUS", "1"]),
        (["--fresh", "--output=../x", "A=--output=b"], ["--fresh", "--output={}/../x", "A=--output=b"]),
        (["--output", "/elsewhere"], ["--output", "/elsewhere"]),
        ([], []),
    ],
)
def test_the_script_writes_into_the_folder_that_it_is_called_from(
    given: list[str], passed: list[str], tmp_path: Path
) -> None:
    """With a program in place of Python that notes what it is given."""
    python, said = tmp_path / "venv" / "bin" / "python", tmp_path / "said.txt"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{said}'\n")
    python.chmod(0o755)
    env = {**os.environ, "MASKFEAT_VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
    script = os.path.relpath(REPO / "tools" / "quickstart.sh", tmp_path)
    subprocess.run(["bash", script, *given], cwd=tmp_path, env=env, check=True, timeout=60)
    assert said.read_text().splitlines() == ["tools/quickstart.py", *(word.format(tmp_path) for word in passed)]
    subprocess.run(["bash", "tools/quickstart.sh", *given], cwd=REPO, env=env, check=True, timeout=60)
    assert said.read_text().splitlines() == ["tools/quickstart.py", *given]


def test_the_script_tells_its_use_from_any_folder() -> None:
    words = ["bash", "../tools/quickstart.sh", "--help"]
    shown = subprocess.run(words, cwd=REPO / "tests", check=True, timeout=60, capture_output=True)
    assert b"bash tools/quickstart.sh --fresh" in shown.stdout


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file" / "q")]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("opts", "said"), [([], "interrupted: the same command goes on where it stopped"), (["--fresh"], "interrupted")]
)
def test_ctrl_c_is_one_line_and_130(
    opts: list[str], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --fresh the same command would start over."""

    def stop(_: Quickstart) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Quickstart, "run_all", stop)
    assert main(["--output", str(tmp_path / "q"), *opts]) == 130
    assert caplog.records[-1].getMessage() == said
