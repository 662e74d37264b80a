"""Whole runs of pre-training on folders without labels, lists or classes."""

import shutil
from pathlib import Path

import pytest
import torch

from maskfeat.checkpoint.files import find_checkpoints, open_checkpoint
from maskfeat.engine.run import main
from tests.small import RECIPES, VIT_PT, images

PT = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")


@pytest.fixture(scope="module")
def flat(image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders without classes, of 30 and 10 images."""
    root = tmp_path_factory.mktemp("flat")
    for number, path in enumerate(sorted(image_data.glob("train/*/*"))):
        target = root / ("many" if number % 4 else "few") / f"{number:02d}{path.suffix}"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return root


def weights(output: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = open_checkpoint(find_checkpoints(output, "ssl")[-1])["model_state"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.slow
def test_a_flat_folder_trains_and_is_not_validated(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opts = [*images(flat), "TRAIN.EVAL_PERIOD", "1", "VIS.PERIOD", "1"]
    assert main(["--cfg", PT, *VIT_PT, "OUTPUT_DIR", str(tmp_path), *opts]) == 0
    said = capsys.readouterr()
    text = said.out + said.err
    assert f"train: folder {flat} at any depth (40 .jpg in 2 folders), 40 samples, no labels" in text
    assert "nothing is validated, TRAIN.EVAL_PERIOD has no effect: there is no" in text
    assert list((tmp_path / "pictures").glob("*.png")), "of the training set"


@pytest.mark.slow
def test_sources_resume_to_the_bit(flat: Path, tmp_path: Path) -> None:
    """Within an epoch, and as other processes would share it: the order is one of seed and epoch."""
    opts = ["DATA.SOURCES", f"[['{flat}/many', 1], ['{flat}/few', 1]]", "SOLVER.MAX_EPOCH", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["--cfg", PT, *VIT_PT, *opts, "OUTPUT_DIR", str(whole)]) == 0
    assert main(["--cfg", PT, *VIT_PT, *opts, "OUTPUT_DIR", str(cut)]) == 0
    find_checkpoints(cut, "ssl")[-1].unlink()
    assert main(["--cfg", PT, *VIT_PT, *opts, "OUTPUT_DIR", str(cut)]) == 0
    assert same(weights(whole), weights(cut))
