"""Command lines of a run, as PySlowFast's users and ours write them."""

import json
from pathlib import Path

import pytest

from maskfeat.build import build_loader
from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.config import load_config
from maskfeat.engine.run import main
from tests.small import COMMON, R50_FT, VIT, images


def two_recipes(folder: Path) -> list[str]:
    """A pre-training and a fine-tuning, each with a folder of its own below $PLACE."""
    (folder / "pt.yaml").write_text(
        "_BASE_: masked_ssl/in1k_VIT_B_MaskFeat_PT.yaml\nMASK: {PRETRAIN_DEPTH: [1]}\nOUTPUT_DIR: $PLACE/pt\n"
    )
    (folder / "ft.yaml").write_text(
        "_BASE_: masked_ssl/in1k_VIT_B_MaskFeat_FT.yaml\nOUTPUT_DIR: ${PLACE}/ft\n"
        "TRAIN: {CHECKPOINT_FILE_PATH: $PLACE/pt/checkpoints/ssl_checkpoint_epoch_00001.pyth}\n"
        "TEST: {ENABLE: True, SAVE_RESULTS_PATH: scores.pkl}\n"
    )
    return [str(folder / "pt.yaml"), str(folder / "ft.yaml")]


@pytest.mark.slow
def test_files_run_one_after_another(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path / "out"))
    opts = [*COMMON, *VIT, *images(image_data)]
    command = ["RNG_SEED=3", "--cfg", *two_recipes(tmp_path), "--opts", *opts, "--num_shards", "1"]
    with caplog.at_level("ERROR"):
        assert main([*command, "DATA.MEAN=[120, 120, 120]"]) == 2
    assert "DATA.MEAN must be between 0 and 1" in caplog.text and not (tmp_path / "out").exists()
    assert main(command) == 0
    assert len(find_checkpoints(tmp_path / "out" / "pt", "ssl")) == 2
    assert len(find_checkpoints(tmp_path / "out" / "ft", "ssl_eval")) == 2
    assert "SAVE_RESULTS_PATH" in (tmp_path / "out" / "ft" / "stdout.log").read_text()
    assert "top1" in json.loads((tmp_path / "out" / "ft" / "scores_1x1.json").read_text())
    given = (tmp_path / "out" / "ft" / "config_given.yaml").read_text()
    assert '# override: ["RNG_SEED", "3"]' in given


@pytest.mark.parametrize("size", [["TRAIN.BATCH_SIZE", "1"], ["TRAIN.BATCH_SIZE", "4", "TRAIN.MICRO_BATCH_SIZE", "3"]])
def test_batch_norm_over_one_value_is_refused_before_training(
    size: list[str], image_data: Path, tmp_path: Path
) -> None:
    crop = ["DATA.TRAIN_CROP_SIZE", "32", "DATA.TEST_CROP_SIZE", "32"]
    opts = [*R50_FT, *images(image_data), *crop, "OUTPUT_DIR", str(tmp_path)]
    assert main(["--cfg", "mfm/in1k_R50_MFM_FT", *opts, *size]) == 2
    log = (tmp_path / "stdout.log").read_text()
    assert "error: batch norm needs more than one value a channel" in log and f"set {size[-2]} " in log
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("opts", "side"), [([], 256), (["DATA.IN_VAL_CROP_RATIO", "1"], 224), (["DATA.IN_VAL_CROP_RATIO=0.7"], 320)]
)
def test_crop_ratio_of_evaluation(opts: list[str], side: int, image_data: Path) -> None:
    cfg = load_config("masked_ssl/in1k_VIT_B_MaskFeat_FT", [*opts, *images(image_data), "NUM_GPUS", "0"])
    assert build_loader(cfg, "val").dataset.transform.short_side == side  # type: ignore[attr-defined]
    cfg = load_config("masked_ssl/in1k_VIT_B_MaskFeat_FT", [*opts, *images(image_data), "DATA.TEST_SHORT_SIDE", "230"])
    assert build_loader(cfg, "val").dataset.transform.short_side == 230  # type: ignore[attr-defined]
