"""Processes that were given different configs or data say so, instead of training on wrong labels or waiting."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from yacs.config import CfgNode

from maskfeat.checkpoint import files
from maskfeat.config import load_config
from maskfeat.distributed.launch import launch
from maskfeat.distributed.world import World
from maskfeat.engine.run import work
from maskfeat.engine.setup import CommandLine
from tests.small import RECIPES, VIT_FT, VIT_PT, images
from tests.worker import json_stats

FT, PT = (RECIPES / f"in1k_VIT_B_MaskFeat_{kind}.yaml" for kind in ("FT", "PT"))


def second_differs(world: World, init_method: str, cfg: CfgNode, given: CommandLine, changes: list[object]) -> int:
    """A whole run, whose second process is given these overrides as well."""
    if world.rank == 1:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(changes)
        cfg.freeze()
    return work(world, init_method, cfg, given)


def run(
    data: Path, output: Path, *changes: object, recipe: Path = FT, small: Sequence[str] = VIT_FT
) -> tuple[int, str]:
    """Exit code and log of two processes."""
    opts = [*small, *images(data), "SOLVER.MAX_EPOCH", "1", "NUM_GPUS", "2", "DIST_BACKEND", "gloo"]
    cfg = load_config(recipe, [*opts, "TEST.ENABLE", "False", "OUTPUT_DIR", str(output)])
    code = launch(second_differs, (cfg, CommandLine("", ()), list(changes)), processes=2)
    return code, (output / "stdout.log").read_text()


@pytest.mark.slow
def test_copies_that_differ(image_data: Path, tmp_path: Path) -> None:
    lacking, short = tmp_path / "lacking", tmp_path / "short"
    for copy in (lacking, short):
        shutil.copytree(image_data, copy)
    for split in ("train", "val"):
        classes = sorted((lacking / split).iterdir())
        for image in classes[0].iterdir():  # as many samples, of one class fewer
            shutil.copyfile(image, classes[1] / f"more_{image.name}")
        shutil.rmtree(classes[0])
    next((short / "train").rglob("*.jpg")).unlink()
    code, said = run(image_data, tmp_path / "out2", "DATA.PATH_TO_DATA_DIR", str(lacking))
    first = classes[0].name
    assert code == 2 and "not have the same samples of train" in said and f"class {first} 0 and None" in said
    assert "DATA.PATH_TO_DATA_DIR" in said and not json_stats(tmp_path / "out2", "train_iter")
    code, said = run(image_data, tmp_path / "out3", "DATA.PATH_TO_DATA_DIR", str(short))
    assert code == 2 and "samples 40 and 39" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_copy_without_a_validation_set(image_data: Path, tmp_path: Path) -> None:
    """Pre-training does without one, if all processes do."""
    shutil.copytree(image_data / "train", tmp_path / "lacking" / "train")
    opts = ["DATA.PATH_TO_DATA_DIR", str(tmp_path / "lacking")]
    small = [*VIT_PT, "TRAIN.EVAL_PERIOD", "1"]
    code, said = run(image_data, tmp_path / "out", *opts, recipe=PT, small=small)
    assert code == 2 and "not have the same samples of val" in said and "samples 16 and 0" in said, said
    code, said = run(tmp_path / "lacking", tmp_path / "none", recipe=PT, small=small)
    assert code == 0 and "nothing is validated" in said


@pytest.mark.slow
def test_configs_that_differ(image_data: Path, tmp_path: Path) -> None:
    code, said = run(image_data, tmp_path / "out", "SOLVER.BASE_LR", 0.5)
    assert code == 2 and "do not have the same config" in said and "and 0.5" in said and "SOLVER.BASE_LR" in said


def blind(world: World, init_method: str, cfg: CfgNode, given: CommandLine) -> int:
    """A test whose second process sees no checkpoint: those of the first are not there yet, or are gone again."""
    if world.rank == 1:
        files.latest_checkpoint = lambda *_: None  # type: ignore[assignment]
    return work(world, init_method, cfg, given)


@pytest.mark.slow
def test_all_processes_test_the_same_checkpoint(image_data: Path, tmp_path: Path) -> None:
    shutil.copytree(image_data, tmp_path / "same")  # each machine may have its own paths and number of workers
    code, said = run(image_data, tmp_path, *images(tmp_path / "same"), "DATA_LOADER.NUM_WORKERS", 1)
    assert code == 0, said
    opts = [*VIT_FT, *images(image_data), "SOLVER.MAX_EPOCH", "1", "NUM_GPUS", "2", "DIST_BACKEND", "gloo"]
    cfg = load_config(FT, [*opts, "TRAIN.ENABLE", "False", "TEST.ENABLE", "True", "OUTPUT_DIR", str(tmp_path)])
    assert launch(blind, (cfg, CommandLine("", ())), processes=2) == 0
    assert len(json_stats(tmp_path, "test_final")) == 1
