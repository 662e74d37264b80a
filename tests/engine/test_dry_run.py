"""What a run would do, said without starting it: what is there, what is missing, and that nothing is written."""

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from maskfeat.config import load_config
from maskfeat.config.recipes import recipe_names
from maskfeat.engine import dry_run
from maskfeat.engine.run import main
from tests.engine.test_recipes_run import FAMILIES, OTHERS, commands, synthetic
from tests.small import MFM_PT, R50_FT, REPO, VIT_FT, VIT_PT, images

__all__ = ["synthetic"]  # a fixture

PT, FT = "masked_ssl/in1k_VIT_B_MaskFeat_PT", "masked_ssl/in1k_VIT_B_MaskFeat_FT"
Dry = Callable[..., tuple[int, str]]


def content(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime) for path in folder.rglob("*")}


@pytest.fixture
def dry(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Dry:
    """Runs a command with --dry-run; its exit code and what it says."""

    def run(*argv: object) -> tuple[int, str]:
        caplog.clear()
        package = logging.getLogger("maskfeat")  # a run before, in this process, has left its handlers
        monkeypatch.setattr(package, "propagate", True)
        monkeypatch.setattr(package, "handlers", [])
        with caplog.at_level("INFO"):
            code = main([*map(str, argv), "--dry-run"])
        return code, "\n".join(record.getMessage() for record in caplog.records)

    return run


def test_a_run_that_would_start(dry: Dry, image_data: Path, tmp_path: Path) -> None:
    before = content(image_data)
    out = tmp_path / "deep" / "out"
    opts = [*VIT_PT, *images(image_data), "TRAIN.EVAL_PERIOD", "1", "OUTPUT_DIR", out, "SOLVER.BASE_LR", "0.5"]
    code, said = dry("--cfg", PT, *opts, "--dry-steps", "2")
    assert code == 0 and said.endswith("The run would start.")
    for line in (
        "SOLVER.BASE_LR 0.5 (the recipe's: 0.0002)",
        f"{out}, to be made in {tmp_path}",
        "train: folder",
        "40 samples, 4 classes",
        "16 samples, 4 classes",
        "none: training starts from random weights",
        "2 epochs of 5 steps",
        "AdamW, 2 groups",
        "2 checkpoints of about",
        "2 steps of one process, after a first one",
    ):
        assert line in said, line
    assert re.search(r"learning rate: [▁-█]{60} from 0.5 to 0.5 \(epoch 0\) and 1e-06 \(epoch 2\)", said)
    assert re.search(r"[\d.e-]+ s a step, \d+ % of it waiting for data\n", said)
    assert re.search(r"an epoch: 0:00:\d\d, what is left of the run: 0:00:\d\d", said)
    assert list(tmp_path.iterdir()) == [] and content(image_data) == before, "nothing was written"


def test_what_is_missing_is_said_all_at_once(dry: Dry, tmp_path: Path) -> None:
    opts = [*VIT_FT, *images(tmp_path / "none"), "TRAIN.CHECKPOINT_FILE_PATH", tmp_path / "no.pyth", "NUM_GPUS", "64"]
    opts += ["TRAIN.BATCH_SIZE", "64", "TEST.BATCH_SIZE", "64", "TEST.ENABLE", "True", "OUTPUT_DIR", tmp_path / "out"]
    code, said = dry("--cfg", FT, *opts)
    assert code == 1
    for problem in (
        "NUM_GPUS is 64, but this machine shows",
        "DATA.PATH_TO_DATA_DIR must hold train/ and val/",
        f"there is no checkpoint at {tmp_path / 'no.pyth'}: see TRAIN.CHECKPOINT_FILE_PATH",
    ):
        assert said.count(problem) >= 2, "where it was met, and at the end"
    assert "The run would not start: 5 problems" in said and "No step was computed, because of the problems" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_are_reported(dry: Dry, image_data: Path, tmp_path: Path) -> None:
    """Of a run that goes on, of one that starts from another's file, and of a test."""
    out, data = tmp_path / "pt", images(image_data)
    pretraining = ["--cfg", PT, *VIT_PT, *data, "OUTPUT_DIR", str(out), "SOLVER.MAX_EPOCH", "1"]
    assert main(pretraining) == 0
    file, before = out / "checkpoints" / "ssl_checkpoint_epoch_00001.pyth", content(out)
    code, said = dry(*pretraining)
    assert code == 0 and f"resumed from {file}, after epoch 1" in said
    assert "what is left of the run: 0:00:00" in said
    code, said = dry(*pretraining, "MVIT.EMBED_DIM", "48")
    assert code == 1 and "MVIT.EMBED_DIM was 24 and is 48" in said
    assert content(out) == before

    start = ["TRAIN.CHECKPOINT_FILE_PATH", file, "OUTPUT_DIR", tmp_path / "ft"]
    code, said = dry("--cfg", FT, *VIT_FT, *data, *start, "--dry-steps", "0")
    assert code == 0 and f"weights from {file}" in said and "fresh       4  norm.weight, norm.bias" in said
    assert "No step was computed." in said

    test = ["TRAIN.ENABLE", "False", "TEST.ENABLE", "True", "TEST.CHECKPOINT_FILE_PATH", file]
    code, said = dry("--cfg", FT, *VIT_FT, *data, *test, "OUTPUT_DIR", tmp_path / "ft")
    assert code == 1 and "would be random" in said and "Optimizer" not in said and "Data: train" not in said
    assert not (tmp_path / "ft").exists()


def test_a_folder_in_use(dry: Dry, image_data: Path, tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from maskfeat.engine.owner import owned\n"
        "with owned(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", hold, str(tmp_path)]
    arguments = ["--cfg", PT, *VIT_PT, *images(image_data), "OUTPUT_DIR", tmp_path, "--dry-steps", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stdout.readline()
        code, said = dry(*arguments)
        process.kill()
    assert code == 1
    assert f"OUTPUT_DIR {tmp_path} is in use by another run ({socket.gethostname()}, process {process.pid}" in said
    assert dry(*arguments)[0] == 0


def test_pre_training_without_a_validation_set(dry: Dry, image_data: Path, tmp_path: Path) -> None:
    """As the run itself, which says it and goes on."""
    opts = [*VIT_PT, *images(image_data / "train"), "TRAIN.EVAL_PERIOD", "1", "OUTPUT_DIR", tmp_path / "out"]
    code, said = dry("--cfg", PT, *opts, "--dry-steps", "0")
    assert code == 0 and "nothing is validated, TRAIN.EVAL_PERIOD has no effect" in said


@pytest.mark.slow
def test_a_test_of_some_of_the_classes(dry: Dry, image_data: Path, tmp_path: Path) -> None:
    """Classes are numbered as the checkpoint that is tested has them, also where the data has fewer folders."""
    some, out = tmp_path / "some", tmp_path / "out"
    opts = [*VIT_FT, "SOLVER.MAX_EPOCH", "1", "OUTPUT_DIR", str(out)]
    assert main(["--cfg", FT, *opts, *images(image_data), "TEST.ENABLE", "False"]) == 0
    shutil.copytree(image_data / "val", some / "val")
    shutil.rmtree(sorted((some / "val").iterdir())[0])
    code, said = dry("--cfg", FT, *opts, *images(some), "TRAIN.ENABLE", "False", "TEST.ENABLE", "True")
    first = sorted(path.name for path in (image_data / "val").iterdir())[0]
    assert code == 0 and f"12 samples, 3 of 4 classes (no sample of {first})" in said, said


def test_a_folder_that_cannot_be_made(dry: Dry, image_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, said = dry(
        "--cfg", PT, *VIT_PT, *images(image_data), "OUTPUT_DIR", tmp_path / "file" / "x", "--dry-steps", "0"
    )
    assert code == 1 and f"cannot be made or written, because of {tmp_path / 'file'}" in said


@pytest.mark.slow
def test_too_little_memory_or_disk(dry: Dry, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--cfg", "mfm/in1k_R50_MFM_PT", *MFM_PT, *images(image_data), "OUTPUT_DIR", tmp_path]
    monkeypatch.setattr(dry_run, "_free_memory", lambda: 1_000_000)
    code, said = dry(*arguments)
    assert code == 1 and "this machine has 1.0 MiB free: set TRAIN.MICRO_BATCH_SIZE 4 or less" in said
    assert "No step was computed, because of the problems" in said
    monkeypatch.setattr(dry_run, "_free_memory", lambda: 0)
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    code, said = dry(*arguments, "--dry-steps", "0")
    assert code == 1 and re.search(r"a checkpoint takes [\d.]+ MiB, and 0.0 MiB is free: give another OUTPUT_DIR", said)


def test_errors_of_a_step_are_problems(
    dry: Dry, image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("maskfeat.engine.trainer.Trainer.begin_step", full)
    code, said = dry("--cfg", PT, *VIT_PT, *images(image_data), "OUTPUT_DIR", tmp_path)
    assert code == 1 and "out of memory: the memory of this machine" in said


def test_one_value_for_batch_norm(dry: Dry, image_data: Path, tmp_path: Path) -> None:
    crop = ["DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32", "TRAIN.BATCH_SIZE", "1"]
    code, said = dry("--cfg", "mfm/in1k_R50_MFM_FT", *R50_FT, *images(image_data), *crop, "OUTPUT_DIR", tmp_path)
    assert code == 1 and "batch norm needs more than one value a channel" in said


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (["--dry-steps", "-1"], "--dry-steps is -1: give 0 or more"),
        (["SOLVER.BASE_LR", "x"], "SOLVER.BASE_LR"),
        (["TRAIN.ENABLE", "False"], "there is nothing to do"),
    ],
)
def test_a_wrong_command_is_one(opts: list[str], said: str, dry: Dry, tmp_path: Path) -> None:
    """As without --dry-run."""
    code, text = dry("--cfg", PT, *VIT_PT, "OUTPUT_DIR", tmp_path / "x", *opts)
    assert code == 2 and said in text and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, OTHERS])
def test_every_recipe_small(
    family: str, dry: Dry, synthetic: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the commands of the guide: with data they would start; without, that is said."""
    monkeypatch.chdir(REPO)
    for there in (True, False):
        where = [str(folder if there else tmp_path / "none") for folder in synthetic]
        for command in commands(family, {"IMAGES": where[0], "CLIPS": where[1], "RUNS": str(tmp_path / "runs")}):
            cfg = load_config(command[1], command[2:])
            code, said = dry(*command, "--dry-steps", "1")
            lacks = not there or not cfg.TRAIN.ENABLE or cfg.TRAIN.CHECKPOINT_FILE_PATH.startswith(str(tmp_path))
            assert code == lacks, said
            assert ("DATA.PATH_TO_DATA_DIR" in said.partition("The run would not start")[2]) != there
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------- --print-config


@pytest.mark.parametrize("how", ["yaml", "keys", "diff"])
@pytest.mark.parametrize("recipe", ["masked_ssl/k400_MVITv2_S_16x4_MaskFeat_FT", "mfm/in1k_R50_MFM_paper_PT"])
def test_a_printed_config_is_a_recipe(
    how: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = ["OUTPUT_DIR", "$$HOME/a: b #c", "SOLVER.BASE_LR=3.5e-3", "TASK", "- x\n", "DATA.MEAN", "[0.1, 0.2, 0.3]"]
    assert main(["--cfg", recipe, *opts, "--print-config", how]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == load_config(recipe, opts)
    assert yaml.safe_load(path.read_text())


def test_print_config_takes_no_override_for_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config", "RNG_SEED", "7", "--cfg", PT]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["RNG_SEED"] == 7
    assert main(["--cfg", PT, "--print-config", "diff", "RNG_SEED=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "RNG_SEED: 7  # default 1, not the recipe's" in lines
    assert "AUG.ENABLE: true  # default false" in lines and not any(line.startswith("AUG.REPEATS") for line in lines)


@pytest.mark.slow
def test_every_recipe_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for name in recipe_names():
        assert main(["--cfg", name, "--print-config", "diff"]) == 0
        assert "# default " in capsys.readouterr().out
