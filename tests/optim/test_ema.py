"""What hangs on steps: the average of the weights, kept, resumed and evaluated; statistics that survive a lost step."""

from pathlib import Path

import pytest
import torch

from maskfeat.batch import Batch
from maskfeat.checkpoint.files import AVERAGE, find_checkpoints
from maskfeat.checkpoint.reading import model_state, read_checkpoint
from maskfeat.engine.run import main
from maskfeat.engine.trainer import Trainer
from maskfeat.models.resnet import ResNet
from maskfeat.objectives.classification import Classification
from maskfeat.objectives.mfm import MFM
from maskfeat.optim.ema import ModelEma
from tests.small import MFM_PT, MFM_RECIPES, MVIT_PT, R50_FT, RECIPES, VIT_FT, VIT_PT, clips, images
from tests.worker import json_stats

RECIPE = {
    "in1k_VIT_B_MaskFeat_PT": (RECIPES, VIT_PT),
    "in1k_VIT_B_MaskFeat_FT": (RECIPES, VIT_FT),
    "k400_MVITv2_S_16x4_MaskFeat_PT": (RECIPES, MVIT_PT),
    "in1k_R50_MFM_PT": (MFM_RECIPES, MFM_PT),
    "in1k_R50_MFM_FT": (MFM_RECIPES, R50_FT),
}


def run(name: str, data: Path, output: Path, *opts: str) -> Path:
    folder, small = RECIPE[name]
    placed = clips(data) if name.startswith("k400") else images(data)
    arguments = ["--cfg", str(folder / f"{name}.yaml"), *small, *placed, "TRAIN.EMA", "0.8", "TRAIN.EVAL_PERIOD", "1"]
    assert main([*arguments, *opts, "OUTPUT_DIR", str(output)]) == 0
    return output


def test_formula_for_parameters_and_running_statistics() -> None:
    objective = Classification(ResNet(depth=10), num_classes=3, mean_pooling=True)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01)
    average = ModelEma(objective, decay=0.75)
    expected: dict[str, torch.Tensor] = {}
    for _ in range(4):
        objective.train()(Batch(torch.randn(4, 3, 32, 32), label=torch.tensor([0, 1, 2, 0]))).loss.backward()
        optimizer.step()
        average.update(torch.zeros(()))
        for name, value in objective.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * value if name in expected else value.clone()
    found = average.module.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert any(name.endswith("running_var") for name in expected)
    assert not any(p.requires_grad for p in average.module.parameters())
    assert not torch.equal(found["head.projection.weight"], objective.head.projection.weight)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["off", "fp16"])
def test_a_lost_step_leaves_statistics_and_average_alone(precision: str) -> None:
    """An infinity in one batch: everything is as it was before, and the run goes on with finite numbers."""
    objective = MFM(ResNet(depth=10, image_size=(32, 32)), mean=(0.4,) * 3, std=(0.2,) * 3, radius=6.0).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, fused=True)
    average = ModelEma(objective, 0.5)
    trainer = Trainer(objective, optimizer, lambda epoch: 1e-3, precision=precision, micro_batch=2, ema=average)
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=2.0**8)
    skipped = []
    for step in range(4):
        before = [{name: value.clone() for name, value in o.state_dict().items()} for o in (objective, average.module)]
        clip = torch.randn(4, 3, 32, 32)
        if step in (0, 2):  # also in the first step, from which the average would begin
            clip[1, 0, 0, 0] = float("inf")
        trainer.train_step(Batch(clip, hidden=torch.ones(4, 1, 1, dtype=torch.bool)))
        skipped.append(trainer.metrics.read()["skipped"])
        after = [o.state_dict() for o in (objective, average.module)]
        for was, now in zip(before, after, strict=True):
            floats = [name for name in was if was[name].is_floating_point()]
            assert all(torch.isfinite(now[name]).all() for name in floats)
            same = [torch.equal(was[name], now[name]) for name in floats]
            assert all(same) if step in (0, 2) else sum(same) < 0.2 * len(same), step
        if step == 1:
            for name, value in objective.state_dict().items():
                torch.testing.assert_close(average.module.state_dict()[name], value)
    assert [count > 0 for count in skipped] == [True, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPE)
def test_kept_resumed_and_evaluated(name: str, image_data: Path, clip_data: Path, tmp_path: Path) -> None:
    data = clip_data if name.startswith("k400") else image_data
    whole = run(name, data, tmp_path / "whole")
    first, last = find_checkpoints(whole, "ssl_eval" if name.endswith("FT") else "ssl")
    content = read_checkpoint(last)
    assert list(content[AVERAGE]) == list(content["model_state"])
    validated = json_stats(whole, "val_epoch")[-1]
    key = "top1" if name.endswith("FT") else "loss"
    assert {key, f"ema_{key}"} <= set(validated)
    if key == "loss":
        assert float(validated["loss"]) != float(validated["ema_loss"])

    last.unlink()
    run(name, data, whole)
    again = read_checkpoint(last)
    for part in ("model_state", AVERAGE):
        for parameter, value in model_state(content, part).items():
            assert torch.equal(value, again[part][parameter]), f"{part} {parameter}"
    assert any(not torch.equal(value, content["model_state"][n]) for n, value in content[AVERAGE].items())


@pytest.mark.slow
def test_tested_after_training_and_alone(image_data: Path, tmp_path: Path) -> None:
    out = run("in1k_R50_MFM_FT", image_data, tmp_path, "SOLVER.MAX_EPOCH", "1")
    (after,) = json_stats(out, "test_final_ema")
    run("in1k_R50_MFM_FT", image_data, tmp_path, "TRAIN.ENABLE", "False")
    alone = json_stats(out, "test_final_ema")[-1]
    assert (alone["top1"], alone["top5"]) == (after["top1"], after["top5"])
    assert {p.name for p in out.glob("test_results*")} == {"test_results_1x1.json", "test_results_1x1_ema.json"}


@pytest.mark.slow
def test_fine_tuning_from_an_average(image_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("in1k_R50_MFM_PT", image_data, tmp_path / "pt")
    given = find_checkpoints(tmp_path / "pt", "ssl")[-1]
    opts = ["TRAIN.CHECKPOINT_FILE_PATH", str(given), "TRAIN.CHECKPOINT_AVERAGE", "True", "SOLVER.BASE_LR", "0.0"]
    out = run(
        "in1k_R50_MFM_FT", image_data, tmp_path / "ft", *opts, "SOLVER.WARMUP_START_LR", "0.0", "TRAIN.EMA", "0.0"
    )
    assert "averaged weights from" in (out / "stdout.log").read_text()
    tuned = read_checkpoint(find_checkpoints(out, "ssl_eval")[-1])["model_state"]
    content = read_checkpoint(given)
    assert torch.equal(tuned["conv1.weight"], content[AVERAGE]["conv1.weight"])
    assert not torch.equal(tuned["conv1.weight"], content["model_state"]["conv1.weight"])
    # A file that has none says so.
    opts[1] = str(find_checkpoints(out, "ssl_eval")[-1])
    with pytest.raises(AssertionError):
        run("in1k_R50_MFM_FT", image_data, tmp_path / "again", *opts)
    assert "has no average of the weights (ema_state): set TRAIN.CHECKPOINT_AVERAGE False" in capsys.readouterr().out


@pytest.mark.slow
def test_an_average_is_never_resumed_but_started_from(image_data: Path, tmp_path: Path) -> None:
    """Of the same model, and though the position is not to be reset: what goes on is the average, from epoch 0."""
    run("in1k_R50_MFM_PT", image_data, tmp_path / "first", "SOLVER.MAX_EPOCH", "2")
    given = find_checkpoints(tmp_path / "first", "ssl")[-1]
    opts = ["TRAIN.CHECKPOINT_FILE_PATH", str(given), "TRAIN.CHECKPOINT_AVERAGE", "True", "SOLVER.BASE_LR", "0.0"]
    opts += ["SOLVER.WARMUP_START_LR", "0.0", "TRAIN.CHECKPOINT_EPOCH_RESET", "False", "SOLVER.MAX_EPOCH", "1"]
    out = run("in1k_R50_MFM_PT", image_data, tmp_path / "second", *opts)
    (written,) = find_checkpoints(out, "ssl")
    again, content = read_checkpoint(written), read_checkpoint(given)
    assert again["epoch"] == 0
    assert torch.equal(again["model_state"]["conv1.weight"], content[AVERAGE]["conv1.weight"])
    assert not torch.equal(content["model_state"]["conv1.weight"], content[AVERAGE]["conv1.weight"])


@pytest.mark.slow
def test_switched_on_later_it_starts_with_the_weights(image_data: Path, tmp_path: Path) -> None:
    run("in1k_R50_MFM_PT", image_data, tmp_path, "SOLVER.MAX_EPOCH", "1", "TRAIN.EMA", "0.0")
    (first,) = find_checkpoints(tmp_path, "ssl")
    before = read_checkpoint(first)
    assert AVERAGE not in before
    run("in1k_R50_MFM_PT", image_data, tmp_path, "TRAIN.EMA", "0.999999")
    after = read_checkpoint(find_checkpoints(tmp_path, "ssl")[-1])
    for name, value in before["model_state"].items():
        if name.endswith("weight"):
            torch.testing.assert_close(after[AVERAGE][name], value, atol=1e-4, rtol=1e-4)
    assert any((after["model_state"][n] - v).abs().max() > 1e-3 for n, v in before["model_state"].items())
