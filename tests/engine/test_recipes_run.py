"""The commands of docs/all-recipes.md with which all recipes run small: train, save, resume, fine-tune, test."""

import shutil
from pathlib import Path

import pytest
import torch

from maskfeat.build import build_objective
from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.checkpoint.reading import read_checkpoint
from maskfeat.config import load_config
from maskfeat.demos.scenes import MOTIONS
from maskfeat.demos.synthetic import make_clips, make_images
from maskfeat.engine.run import main
from tests.documents import marked_block, read, recorded_commands
from tests.small import MFM_RECIPES, RECIPES, REPO
from tests.worker import json_stats

FAMILIES = ("vit_b", "vit_l", "mvit_s", "mvit_l", "r50_mfm", "vit_b_mfm")
OTHERS = "r50_others"
VIDEOS = "video_ft"
VIDEO_RECIPES = sorted(path.name for path in (REPO / "configs" / "video_ft").glob("*.yaml"))
GUIDE = "docs/all-recipes.md"


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of images (64 to train, 8 to test) and clips (8 and 4)."""
    root = tmp_path_factory.mktemp("synthetic")
    images = make_images(root / "images", train_per_class=8, val_per_class=1)
    clips = make_clips(root / "clips", MOTIONS[:4], train_per_class=2, val_per_class=1, test_per_class=1)
    return images, clips


@pytest.fixture(params=["synthetic", "real"])
def data(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Folders of images and clips; the real photographs and videos only where they lie on this machine."""
    if request.param == "synthetic":
        return request.getfixturevalue("synthetic")
    samples = request.getfixturevalue("shared") / "data"
    return samples / "imagenet_samples", samples / "kinetics_samples"


def commands(family: str, variables: dict[str, str], number: int = 3) -> list[list[str]]:
    """Arguments of run_net.py for pre-training, fine-tuning and testing, as the guide has them."""
    text = read(GUIDE)
    script = marked_block(text, "setup") + marked_block(text, family)
    found = recorded_commands(script, variables)
    assert [command[:2] for command in found] == [["python", "tools/run_net.py"]] * number
    return [command[2:] for command in found]


def run(arguments: list[str]) -> Path:
    """Runs a command in this process; its OUTPUT_DIR."""
    assert main(arguments) == 0
    return Path(arguments[arguments.index("OUTPUT_DIR") + 1])


def log_of(out: Path) -> str:
    return (out / "stdout.log").read_text()


def last_weights(out: Path, task: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(find_checkpoints(out, task)[-1])["model_state"]


def test_the_guide_covers_all_recipes() -> None:
    recipes = {
        argument
        for family in (*FAMILIES, OTHERS)
        for command in commands(family, {"IMAGES": "i", "CLIPS": "c", "RUNS": "r"})
        for argument in command
        if argument.endswith(".yaml")
    }
    # Two of the twelve files are second names of others, and two more of the clips' fine-tuning.
    files = {f"configs/masked_ssl/{path.name}" for path in (REPO / "configs" / "masked_ssl").glob("*.yaml")}
    names = {path for path in files if "_BASE_: _base_/" in (REPO / path).read_text()}
    mfm = {f"configs/mfm/{path.name}" for path in MFM_RECIPES.glob("*.yaml")}
    assert len(names) == 8 and len(mfm) == 7
    assert recipes == names | mfm
    videos = commands(VIDEOS, {"IMAGES": "i", "CLIPS": "c", "RUNS": "r"}, len(VIDEO_RECIPES))
    assert sorted(command[1] for command in videos) == [f"configs/video_ft/{name}" for name in VIDEO_RECIPES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "data"),
    [*((family, "synthetic") for family in FAMILIES), *((family, "real") for family in ("vit_b", "mvit_s", "r50_mfm"))],
    indirect=["data"],  # real files are read by the same code for the larger networks
)
def test_recipe_runs_small(
    family: str, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    images, clips = data
    variables = {"IMAGES": str(images), "CLIPS": str(clips), "RUNS": str(tmp_path / "runs")}
    pretrain, finetune, test = commands(family, variables)
    cfg = load_config(pretrain[1], pretrain[2:])
    task, mfm = cfg.TASK, cfg.MODEL.MODEL_NAME == "MFM"

    # Pre-training: a loss beside its references, which falls (that of MFM depends on which frequencies were drawn, and
    # falls over more steps than these); a checkpoint of each epoch.
    out = run(pretrain)
    steps = json_stats(out, "train_iter")
    assert [stats["epoch"] for stats in steps][-1] == "2/2"
    assert float(steps[-1]["loss"]) > 0
    if mfm:
        assert float(steps[-1]["zero_predictor"]) > 0.1
    else:
        assert float(steps[-1]["loss"]) < float(steps[0]["loss"])
        assert float(steps[-1]["mean_hog_predictor"]) < float(steps[-1]["zero_predictor"]) < 0.12
    first, last = find_checkpoints(out, task)
    whole = last_weights(out, task)
    before = read_checkpoint(first)["model_state"]
    kernels = [name for name, value in before.items() if value.dim() >= 4 and not name.startswith("hogs.")]
    assert kernels and all(not torch.equal(whole[name], before[name]) for name in kernels), "all learn"

    # As if it had been killed in the second epoch: the same command goes on, and to the same bits.
    last.unlink()
    run(pretrain)
    assert f"resumed from {first}, after epoch 1" in log_of(out)
    again = last_weights(out, task)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    run(pretrain)
    assert f"resumed from {last}" in log_of(out) and "nothing left to train" in log_of(out)

    # Fine-tuning starts from that file: everything but norm and classifier comes from it.
    out = run(finetune)
    log = log_of(out)
    assert f"weights from {last}" in log and "resumed" not in log
    report = {line.split()[0]: int(line.split()[1]) for line in log.split("weights from", 1)[1].splitlines()[1:5]}
    # Fresh: the classifier, and the norm before it, which pre-training may have.
    expected = {"r50_mfm": (2, 2), "vit_b_mfm": (4, 4)}.get(family, (4, 7))
    assert (report["fresh"], report["dropped"], report["resized"]) == (*expected, 0)
    others = ("norm.", "pred_head.", "hogs.", "mask_token", "decoder.")
    backbone = [name for name in whole if not name.startswith(others)]
    assert report["loaded"] == len(backbone) > 20
    assert json_stats(out, "train_iter")[-1]["epoch"] == "2/2"
    tested = json_stats(out, "test_final")

    # Testing alone finds the fine-tuned checkpoint; every sample counts, none is unreadable.
    run(test)
    results = json_stats(out, "test_final")[len(tested) :]
    cfg = load_config(test[1], test[2:])
    clips_of = [1] if cfg.DATA.NUM_FRAMES == 1 else cfg.TEST.NUM_TEMPORAL_CLIPS or [cfg.TEST.NUM_ENSEMBLE_VIEWS]
    assert [stats["views"] for stats in results] == [f"{count}x1" for count in clips_of]
    assert all(0 <= float(stats["top1"]) <= float(stats["top5"]) <= 100 for stats in results)
    assert all(stats["unreadable"] == 0 for stats in results)
    if tested:  # the recipe had tested at its end already
        assert [stats["top1"] for stats in tested] == [stats["top1"] for stats in results]
    shutil.rmtree(tmp_path / "runs")  # checkpoints of hundreds of megabytes


@pytest.mark.slow
def test_other_recipes_run_small(data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's variant of MFM, fine-tuning from given weights, and training from scratch."""
    monkeypatch.chdir(REPO)
    variables = {"IMAGES": str(data[0]), "CLIPS": str(data[1]), "RUNS": str(tmp_path / "runs")}
    pretrain, supervised, scratch = commands(OTHERS, variables)
    steps = json_stats(run(pretrain), "train_iter")
    assert all(float(stats["loss"]) > 0 and float(stats["skipped"]) == 0 for stats in steps)
    for command, loaded in ((supervised, True), (scratch, False)):
        out = run(command)
        log = log_of(out)
        assert ("weights from" in log) == loaded
        if loaded:  # all but the classifier, which pre-training has none of
            assert "fresh       2  fc.weight, fc.bias" in log and "resized     0" in log
        (tested,) = json_stats(out, "test_final")
        assert 0 <= float(tested["top1"]) <= float(tested["top5"]) <= 100
    shutil.rmtree(tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", VIDEO_RECIPES)
def test_video_recipe_runs_small(
    recipe: str, synthetic: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the weights of a classifier with the classes of Kinetics, whose head is left out."""
    monkeypatch.chdir(REPO)
    variables = {"CLIPS": str(synthetic[1]), "IMAGES": "", "RUNS": str(tmp_path)}
    found = commands(VIDEOS, variables, len(VIDEO_RECIPES))
    (finetune,) = [command for command in found if command[1].endswith(f"/{recipe}")]
    weights = Path(finetune[finetune.index("TRAIN.CHECKPOINT_FILE_PATH") + 1])
    size = "L" if "mvit_l" in str(weights) else "S"
    shrunk = finetune[2 : finetune.index("TRAIN.CHECKPOINT_FILE_PATH")]
    weights.parent.mkdir(parents=True)
    kinetics = build_objective(load_config(RECIPES / f"k400_MVITv2_{size}_16x4_FT.yaml", shrunk))
    torch.save({"model_state": kinetics.released_state()}, weights)
    out = run(finetune)
    log = log_of(out)
    cfg = load_config(finetune[1], finetune[2:])
    report = {line.split()[0]: int(line.split()[1]) for line in log.split("weights from", 1)[1].splitlines()[1:5]}
    larger = cfg.DATA.TRAIN_CROP_SIZE > 32  # of the same classes: positions are resized, and the classifier is kept
    assert f"weights from {weights}" in log and report["fresh"] == (0 if larger else 2)
    assert (report["resized"] > 0) == larger
    tested = json_stats(out, "test_final")
    clips = cfg.TEST.NUM_TEMPORAL_CLIPS or [cfg.TEST.NUM_ENSEMBLE_VIEWS]
    assert [stats["views"] for stats in tested] == [f"{count}x{cfg.TEST.NUM_SPATIAL_CROPS}" for count in clips]
    assert json_stats(out, "train_iter")[-1]["epoch"] == "2/2" and tested[0]["unreadable"] == 0
    shutil.rmtree(tmp_path)
