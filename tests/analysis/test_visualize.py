"""The picture of predictions: drawn from a run, for images and clips; errors that say what to give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfeat.analysis import visualize
from maskfeat.analysis.visualize import Drawing, main
from maskfeat.batch import Batch
from maskfeat.engine.run import main as run_main
from maskfeat.models.vit import ViT
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.objectives.predictions import hog_rows
from tests.analysis.saved import PRETRAINED, save_network
from tests.small import MVIT_PT, RECIPES, VIT_FT, VIT_PT, clips, images

VIT = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
MVIT = str(RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml")


def test_rows_show_what_was_hidden_and_predicted() -> None:
    objective = MaskFeat(ViT(image_size=(32, 32), patch=(16, 16), width=24, depth=1, num_heads=2, maskable=True))
    hidden = torch.tensor([[[True, False], [False, False]]])
    batch = Batch(torch.randn(1, 3, 32, 32), hidden=hidden, index=torch.tensor([7]))
    (row,) = hog_rows(objective, batch, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert "7" in row.caption
    assert (row.seen[:16, :16] == row.seen[0, 0]).all(), "the hidden patch is grey"
    assert (row.seen[16:] == row.image[16:]).all() and (row.seen[:, 16:] == row.image[:, 16:]).all()
    prediction, target = objective.predict_hidden(batch)
    # Channel 1, bin 4, row 1 and column 0 of the hidden token's cells.
    place = ((1 * 9 + 4) * 2 + 1) * 2 + 0
    assert row.target[1, 4, 1, 0] == pytest.approx(target[0, place].item())
    assert row.predicted[1, 4, 1, 0] == pytest.approx(prediction[0, place].item())
    assert (row.predicted[:, :, 2:] == 0).all(), "nothing is predicted where nothing was hidden"


@pytest.mark.slow
def test_pictures_of_runs(image_data: Path, clip_data: Path, tmp_path: Path) -> None:
    for recipe, opts, name in (
        (VIT, [*VIT_PT, *images(image_data)], "images"),
        (MVIT, [*MVIT_PT, *clips(clip_data)], "clips"),
    ):
        opts = [*opts, "SOLVER.MAX_EPOCH", "1", "OUTPUT_DIR", str(tmp_path / name)]
        assert run_main(["--cfg", recipe, *opts]) == 0
        picture = tmp_path / f"{name}.png"
        assert main(["--cfg", recipe, "--output", str(picture), "--num", "2", *opts]) == 0
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert pixels.shape[0] > 200 and pixels.std() > 10


def test_errors(image_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = ["OUTPUT_DIR", str(tmp_path)]
    assert main(["--cfg", VIT, *VIT_PT, *images(image_data), *out]) == 2
    assert "TEST.CHECKPOINT_FILE_PATH" in caplog.text
    for number in ("0", "-3"):
        assert main(["--cfg", VIT, *VIT_PT, *images(image_data), *out, "--num", number]) == 2
        assert f"--num must be at least 1; given {number}" in caplog.text
    assert main(["--cfg", str(RECIPES / "in1k_VIT_B_FT.yaml"), *VIT_FT, *images(image_data), *out]) == 2
    assert "MODEL.MODEL_NAME" in caplog.text


def test_overrides_change_the_recipe_that_a_file_is_drawn_by(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    network = save_network(tmp_path / "pt.pyth", PRETRAINED)
    given = ["--checkpoint", str(network), "--input", str(tmp_path / "photo.png"), "--what", "hog"]
    given += ["--output", str(tmp_path / "hog.png")]
    assert main([*given, "--cfg", VIT, *VIT_PT]) == 0 and (tmp_path / "hog.png").is_file()
    assert main([*given, "--cfg", VIT, *VIT_PT, "DATA.TRAIN_CROP_SIZE", "64"]) == 0
    assert "other inputs than it is shown now: DATA.TRAIN_CROP_SIZE was 32 and is 64" in caplog.text
    assert main([*given, "MASK.HOG_BINS", "3"]) == 2
    assert "overrides change the recipe of --cfg, and none is given: MASK.HOG_BINS 3" in caplog.text


def test_a_picture_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process, too, in which Pillow has written nothing before and knows no form yet."""

    class Picture:
        def save(self, path: Path, form: str) -> None:
            path.write_text(form)

    monkeypatch.setattr(Drawing, "name", "drawn.png")
    monkeypatch.setattr(Drawing, "figure", lambda self, title: Picture())
    monkeypatch.setattr(visualize, "drawing", lambda cfg, number: Drawing([], "x.pyth"))
    monkeypatch.setattr(Image, "SAVE", {})
    monkeypatch.chdir(tmp_path)
    assert main(["--cfg", VIT, *VIT_PT]) == 0 and (tmp_path / "drawn.png").read_text() == "PNG"


@pytest.mark.parametrize("name", ["picture", "picture.xyz", "picture.mp4", "folder.png/picture"])
def test_a_picture_of_no_kind_is_refused_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(visualize, "drawing", lambda cfg, number: Drawing([], ""))
    assert main(["--cfg", VIT, *VIT_PT, "--output", str(tmp_path / name)]) == 2
    assert f"--output must end with .png, or as another picture that Pillow writes; given {tmp_path}" in caplog.text
    assert not list(tmp_path.iterdir())


GIVEN = ["--checkpoint", "x.pyth", "--input", "a.png"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cfg", "mfm/in1k_R50_MFM_PT", "--what", "attention"], "--what and --block need --checkpoint and --input"),
        (["--cfg", "mfm/in1k_R50_MFM_PT", "--block", "1"], "--what and --block need --checkpoint and --input"),
        (
            ["--checkpoint", "x.pyth", "--input", "a.png", "--what", "pca", "--block", "1"],
            "--block 1 is of --what attention",
        ),
        (["--checkpoint", "x.pyth", "--input", "a.png", "--output", "a.png"], "--output a.png is what is read (a.png)"),
    ],
)
def test_options_that_would_do_nothing_or_harm(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"a picture")
    assert main(options) == 2 and said in caplog.text
    assert Path("a.png").read_bytes() == b"a picture"
