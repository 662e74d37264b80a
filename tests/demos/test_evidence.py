"""The evidence at toy size: every run of a suite, once; figures that are those of the runs; controls that control."""

import json
import math
import re
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskfeat.build import build_loader, build_objective
from maskfeat.checkpoint.files import find_checkpoints, open_checkpoint
from maskfeat.config import load_config
from maskfeat.demos.cifar10 import CLASSES
from maskfeat.demos.evidence import main, make_data
from maskfeat.demos.evidence.report import Spread, gain, table
from maskfeat.demos.evidence.runs import Runs, held_out
from maskfeat.demos.evidence.suites import CONFIGS, CONTROLS, SUITES
from maskfeat.engine.metrics_log import read_json_stats
from maskfeat.engine.rng import seed_everything
from maskfeat.objectives.maskfeat import MaskFeat

TOY = ["SOLVER.MAX_EPOCH", "2", "SOLVER.WARMUP_EPOCHS", "0", "TRAIN.EVAL_PERIOD", "1", "TRAIN.CHECKPOINT_PERIOD", "1",
       "TRAIN.BATCH_SIZE", "10", "TEST.BATCH_SIZE", "10", "DATA_LOADER.NUM_WORKERS", "0", "LOG_PERIOD", "2",
       "TRAIN.MIXED_PRECISION", "off"]  # fmt: skip


def zip_of(path: Path, split: str, per_class: int) -> None:
    """Noise with a colour for each class."""
    rng = np.random.default_rng(per_class)
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(CLASSES):
            for k in range(per_class):
                pixels = rng.integers(0, 80, (32, 32, 3)) + 17 * number
                content = BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(content, "JPEG")
                archive.writestr(f"{split}/{name}/{k:04d}.jpg", content.getvalue())


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole suite with two seeds: its folder."""
    root = tmp_path_factory.mktemp("evidence")
    zip_of(root / "train.zip", "train", 20)
    zip_of(root / "test.zip", "test", 3)
    assert main(command(root)) == 0
    return root


def command(root: Path) -> list[str]:
    places = ["--source", str(root), "--output", str(root / "runs"), "--docs", str(root / "docs")]
    return ["--suite", "cifar10", "--seeds", "2", *places, *TOY]


def runs_of(root: Path) -> Runs:
    return Runs(SUITES["cifar10"], "cpu", root / "runs", root / "runs" / "data" / "cifar10", tuple(TOY))


@pytest.mark.slow
def test_the_report_tells_what_the_runs_have_left(suite: Path) -> None:
    runs, text = runs_of(suite), (suite / "docs" / "evidence.md").read_text()
    for seed in (0, 1):
        names = {path.parent.name for path in (runs.root / f"seed{seed}").glob("*/done.json")}
        wanted = {"ViT_random_probe", "ViT_scratch_tenth"}
        for method in runs.methods:
            wanted |= {method.name, f"{method.name}_probe", f"{method.name}_references", f"{method.name}_ft_tenth"}
        if seed == 0:
            wanted |= {"maskfeat_shuffled", "maskfeat_shuffled_probe", "maskfeat_unmasked", "maskfeat_unmasked_probe"}
            wanted |= {"maskfeat_headless_ft_tenth"}
        assert names == wanted
    for name in ("ViT_random_probe", "maskfeat_probe"):
        values = [runs.result(seed, name)["probe"]["tenth"]["linear"] for seed in (0, 1)]
        assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in text
    tops = [float(runs.stats(seed, "maskfeat_ft_tenth", "test_final")[-1]["top1"]) for seed in (0, 1)]
    assert f"| {np.mean(tops):.1f} ± {np.std(tops, ddof=1):.1f} |" in text
    pictures = re.findall(r"\]\((evidence/\S+\.png)\)", text)
    assert len(pictures) == 3
    for picture in pictures:
        pixels = np.asarray(Image.open(suite / "docs" / picture).convert("RGB"))
        assert pixels.std() > 10
    assert "--suite cifar10 --seeds 2" in text


@pytest.mark.slow
def test_a_second_call_trains_nothing(suite: Path) -> None:
    runs = runs_of(suite)
    before = {path: path.read_bytes() for path in runs.root.rglob("*.json*")}
    begin = (suite / "docs" / "evidence.md").read_text()
    (suite / "docs" / "evidence.md").write_text(begin.replace("# Evidence", "Mine stays.\n\n# Evidence"))
    assert main(command(suite)) == 0
    assert {path: path.read_bytes() for path in runs.root.rglob("*.json*")} == before
    after = (suite / "docs" / "evidence.md").read_text()
    assert after.startswith("Mine stays.") and after.count("<!-- begin: cifar10 cpu -->") == 1


@pytest.mark.slow
def test_what_was_broken_off_goes_on(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that ends with an exit code ends the suite with it, and is the next one the time after."""
    runs = runs_of(suite)
    done = runs.folder(1, "maskfeat_ft_tenth") / "done.json"
    kept = json.loads(done.read_text())
    done.unlink()
    monkeypatch.setattr("maskfeat.demos.evidence.runs.run_net", lambda argv: 75)
    assert main(command(suite)) == 75
    assert not done.exists()
    monkeypatch.undo()
    assert main(command(suite)) == 0
    assert json.loads(done.read_text())["seconds"] > kept["seconds"], "earlier attempts count"


@pytest.mark.slow
def test_other_settings_are_not_mixed_in(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither into what is done nor into what was begun."""
    assert main([*command(suite), "SOLVER.BASE_LR", "1e-4"]) == 2
    assert "was made with other settings" in capsys.readouterr().out
    done = runs_of(suite).folder(0, "maskfeat") / "done.json"
    kept = done.read_bytes()
    done.unlink()
    assert main([*command(suite), "SOLVER.BASE_LR", "1e-4"]) == 2
    done.write_bytes(kept)


@pytest.mark.slow
def test_controls(suite: Path) -> None:
    runs = runs_of(suite)
    # With all but the backbone loaded, fine-tuning is training from scratch, to the bit.
    states = [
        open_checkpoint(find_checkpoints(runs.folder(0, name), "ft")[-1])["model_state"]
        for name in ("maskfeat_headless_ft_tenth", "ViT_scratch_tenth", "maskfeat_ft_tenth")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert not all(torch.equal(states[2][name], states[1][name]) for name in states[1])
    # Where nothing is hidden nothing is learned: matrices shrink by weight decay, the rest stays.
    method = runs.methods[0]
    state = open_checkpoint(runs.checkpoint(0, "maskfeat_unmasked"))["model_state"]
    cfg = load_config(CONFIGS / method.pretraining, runs.pretraining(method, 0, "x", CONTROLS[1]))
    seed_everything(cfg.RNG_SEED)
    fresh = build_objective(cfg).released_state()
    for name, value in fresh.items():
        if value.ndim <= 1:
            assert torch.equal(state[name], value), name
        else:
            torch.testing.assert_close(state[name], value, rtol=0.02, atol=0)
    assert {entry["skipped"] for entry in runs.stats(0, "maskfeat_unmasked", "train_iter")} == {0}


@pytest.mark.slow
def test_references_are_the_costs_of_constants(suite: Path) -> None:
    """Against a plain computation: all hidden targets at once, in float64."""
    runs = runs_of(suite)
    method = runs.methods[0]
    cfg = load_config(CONFIGS / method.pretraining, runs.pretraining(method, 0, "x"))
    torch.manual_seed(0)
    objective = build_objective(cfg)
    assert isinstance(objective, MaskFeat)
    found = held_out(objective.eval(), cfg, torch.device("cpu"))
    train = build_loader(cfg, "train")
    everywhere = torch.cat([objective.target(batch.clip) for batch in train]).double()
    zero, mean, place, count = 0.0, 0.0, 0.0, 0
    for batch in build_loader(cfg, "val"):
        target, hidden = objective.target(batch.clip).double(), objective.hidden_tokens(batch)
        zero += float(target[hidden].square().sum())
        mean += float((target - everywhere.mean(dim=(0, 1)))[hidden].square().sum())
        place += float((target - everywhere.mean(dim=0))[hidden].square().sum())
        count += target[hidden].numel()
    wanted = {"zero": zero / count, "mean_hog": mean / count, "mean_hog_of_place": place / count}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert found["model"] > 0


@pytest.mark.slow
def test_the_resnet_of_the_other_budget(suite: Path) -> None:
    """Pre-training and fine-tuning of the method that the smaller budget leaves out."""
    runs = Runs(SUITES["cifar10"], "gpu", suite / "resnet", suite / "runs" / "data" / "cifar10",
                (*TOY, "NUM_GPUS", "0", "TRAIN.COMPILE", "False"))  # fmt: skip
    (method,) = [method for method in runs.methods if method.name == "mfm_resnet"]
    runs.train(0, method.name, method.pretraining, runs.pretraining(method, 0, method.name))
    weights = runs.checkpoint(0, method.name)
    tuned = runs.fine_tuning(method, 0, "tuned", "tenth", weights)
    runs.train(0, "tuned", method.family.fine_tuning, tuned)
    assert "weights from" in (runs.folder(0, "tuned") / "stdout.log").read_text()
    assert 0 <= float(runs.stats(0, "tuned", "test_final")[-1]["top1"]) <= 100


@pytest.mark.slow
def test_clips(tmp_path: Path) -> None:
    """The other suite, with one seed."""
    make_data("shapes", tmp_path / "data", clips=(10, 2, 3))
    places = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    toy = [*TOY, "TRAIN.BATCH_SIZE", "6"]  # a tenth of the clips is one of each motion
    assert main(["--suite", "shapes", "--seeds", "1", *places, *toy]) == 0
    text = (tmp_path / "docs" / "evidence.md").read_text()
    assert "synthetic motions, budget cpu" in text and "mask ratio 0" in text
    tested = read_json_stats(tmp_path / "runs/shapes_cpu/seed0/maskfeat_ft_tenth/stdout.log", "test_final")
    assert int(tested[-1]["samples"]) == 18
    assert (tmp_path / "data" / "tenth" / "train.csv").read_text().count("\n") == 6


def test_a_spread_tells_its_figures() -> None:
    spread = Spread([1.0, 2.0, 6.0])
    assert spread.mean == 3.0 and spread.deviation == pytest.approx(math.sqrt(7)) and spread.shown() == "3.0 ± 2.6"
    assert Spread([2.0]).shown(sign="+") == "+2.0"
    assert (spread - Spread([0.0, 2.0, 4.0])).values == [1.0, 0.0, 2.0]
    assert gain(Spread([1.0, 2.0, 3.0])) == "+2.0 ± 1.0 (+3.5 standard errors)"


def test_a_table() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_cifar10_has_to_come_from_somewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "cifar10", "--output", str(tmp_path)]) == 2
    assert "--source" in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
@pytest.mark.parametrize("name", sorted(SUITES))
def test_every_run_of_every_budget_is_a_valid_config(name: str, budget: str, tmp_path: Path) -> None:
    """Pre-training, fine-tuning and scratch of one family are of one model; the same fine-tuning with and without."""
    runs = Runs(SUITES[name], budget, tmp_path, tmp_path)
    for method in runs.methods:
        pretraining = load_config(CONFIGS / method.pretraining, runs.pretraining(method, 0, "pt"))
        for control in CONTROLS:
            load_config(CONFIGS / method.pretraining, runs.pretraining(method, 0, "pt", control))
        for labels in runs.budget.labels.values():
            tuned, scratch = (
                load_config(CONFIGS / method.family.fine_tuning, runs.fine_tuning(method, 0, "run", labels, weights))
                for weights in (tmp_path / "weights.pyth", None)
            )
            assert pretraining.MVIT.DEPTH == tuned.MVIT.DEPTH and pretraining.RESNET.DEPTH == tuned.RESNET.DEPTH
            assert pretraining.MVIT.PATCH_STRIDE == tuned.MVIT.PATCH_STRIDE
            tuned.defrost()
            tuned.TRAIN.CHECKPOINT_FILE_PATH = ""
            assert tuned == scratch
