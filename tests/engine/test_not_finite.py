"""NaN and infinity never pass in silence: in losses, in what is saved and resumed from, in validation and testing."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskfeat.batch import Batch, StepOutput
from maskfeat.checkpoint.files import Position, find_checkpoints
from maskfeat.checkpoint.reading import read_checkpoint
from maskfeat.config import load_config
from maskfeat.engine.evaluate import multi_view_test, validate
from maskfeat.engine.run import main
from maskfeat.engine.saver import Saver
from maskfeat.engine.trainer import Trainer, build_trainer
from maskfeat.errors import NotFinite
from maskfeat.objectives.classification import Classification
from maskfeat.objectives.mfm import MFM
from tests.small import MFM_PT, MFM_RECIPES, R50_FT, RECIPES, VIT_FT, VIT_PT, images
from tests.worker import json_stats

CPU = torch.device("cpu")
PT, FT = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"), str(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml")
MFM_YAML = str(MFM_RECIPES / "in1k_R50_MFM_PT.yaml")
BAD = (float("nan"), float("inf"))


def trainer(*opts: str) -> Trainer:
    return build_trainer(load_config(MFM_YAML, [*MFM_PT, "TRAIN.EMA", "0.5", *opts]), CPU)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("micro", ["0", "3"])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(value: float, micro: str) -> None:
    training = trainer("TRAIN.MICRO_BATCH_SIZE", micro)
    training.model.train()

    def spoil(_: Any, given: tuple[Batch], out: StepOutput) -> StepOutput:
        if given[0].clip[-1, 0, 0, 0] == 7.0:  # one of the micro-batches
            out.loss = out.loss + value
        return out

    training.objective.register_forward_hook(spoil)
    before = [p.detach().clone() for p in training.objective.parameters()]
    clip = torch.randn(8, 3, 32, 32)
    clip[-1, 0, 0, 0] = 7.0
    training.train_step(Batch(clip))
    assert all(torch.equal(a, b) for a, b in zip(before, training.objective.parameters(), strict=True))
    assert training.metrics.read()["skipped"] == pytest.approx(1) and training.skipped.read() == (1, 0)
    training.train_step(Batch(torch.randn(8, 3, 32, 32)))
    assert training.metrics.read()["skipped"] == 0
    training.check_finite()


WHAT: dict[str, Callable[[Trainer], Tensor]] = {
    "layer1.0.conv1.weight": lambda t: t.objective.released_state()["layer1.0.conv1.weight"],
    "bn1.running_var": lambda t: t.objective.released_state()["bn1.running_var"],
    "ema_state: decoder.0.bias": lambda t: t.ema.module.released_state()["decoder.0.bias"],
    "exp_avg_sq of conv1.weight": lambda t: t.optimizer.state[t.objective.backbone.conv1.weight]["exp_avg_sq"],
}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", WHAT)
def test_what_is_not_finite_is_not_saved(name: str, value: float, tmp_path: Path) -> None:
    cfg = load_config(MFM_YAML, [*MFM_PT, "TRAIN.EMA", "0.5", "OUTPUT_DIR", str(tmp_path)])
    training = build_trainer(cfg, CPU)
    saver = Saver(cfg, training)
    training.train_step(Batch(torch.randn(4, 3, 32, 32)))
    training.position = Position(1)
    saver.save(must=True)
    (good,) = find_checkpoints(tmp_path, cfg.TASK)
    training.position = Position(2)
    with torch.no_grad():
        WHAT[name](training).view(-1)[-1] = value
    with pytest.raises(NotFinite, match=rf"not finite .*epoch 2:\n  {name}\n.*earlier checkpoints stay"):
        saver.save()
    assert find_checkpoints(tmp_path, cfg.TASK) == [good]


def test_a_run_whose_weights_overflow_ends_with_its_last_good_checkpoint(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.train_step

    def overflow(self: Trainer, batch: Batch) -> None:
        step(self, batch)
        if self.position == Position(1, 4):  # the last step of the second epoch
            next(self.objective.parameters()).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(Trainer, "train_step", overflow)
    assert main(["--cfg", PT, *VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "error: 1 weights, or states of the optimizer, are not finite" in said and "Traceback" not in said
    (kept,) = find_checkpoints(tmp_path, "ssl")
    assert kept.name == "ssl_checkpoint_epoch_00001.pyth"


@pytest.mark.parametrize("what", ["model_state", "ema_state", "optimizer_state"])
def test_no_run_resumes_from_what_is_not_finite(
    what: str, image_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--cfg", PT, *VIT_PT, *images(image_data), "TRAIN.EMA", "0.5", "OUTPUT_DIR", str(tmp_path)]
    assert main([*args, "SOLVER.MAX_EPOCH", "1"]) == 0
    (path,) = find_checkpoints(tmp_path, "ssl")
    content = read_checkpoint(path)
    inside = content[what]["state"][3] if what == "optimizer_state" else content[what]
    name, value = next((name, value) for name, value in inside.items() if value.dim())
    value.view(-1)[0] = float("nan")
    torch.save(content, path)
    path.with_name(f"{path.name}.sha256").unlink()
    capsys.readouterr()
    assert main(args) == 2
    said = capsys.readouterr().out
    assert "not finite" in said and name in said and str(path) in said and "Traceback" not in said


class Samples:
    """A loader of 10 samples in batches of 4 with files of their own."""

    labels: Sequence[int] = [index % 3 for index in range(10)]

    def __init__(self) -> None:
        self.dataset = self

    def path(self, index: int) -> str:
        return f"/data/{index}.jpg"

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, 10, 4):
            index = torch.arange(start, min(start + 4, 10))
            clip = index.float().reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)
            yield Batch(clip, label=index % 3, index=index)


class Knows(Classification):
    """Gets all right, and has scores that are no numbers for the samples of `bad`."""

    def __init__(self, bad: Sequence[int]) -> None:
        torch.nn.Module.__init__(self)
        self.bad, self.num_classes = torch.tensor(bad), 3

    def predict(self, batch: Batch) -> Tensor:
        assert batch.index is not None
        scores = torch.nn.functional.one_hot(batch.index % 3, 3).float()
        return torch.where(torch.isin(batch.index, self.bad)[:, None], float("nan"), scores)


@pytest.mark.parametrize(("bad", "top1"), [((), 100.0), ((6,), 90.0), ((9, 3, 8), 70.0)])
def test_scores(bad: Sequence[int], top1: float, caplog: pytest.LogCaptureFixture) -> None:
    loader: Any = Samples()
    found = validate(Knows(bad), loader, CPU, "fp16")
    assert found["top1"] == pytest.approx(top1)
    first = f"{len(bad)} of 10 samples are not finite (NaN or infinite), the first is sample {min(bad, default=0)}"
    if not bad:
        assert not caplog.records
        assert multi_view_test(Knows(bad), loader, loader.labels, CPU, "off")[0]["top1"] == 100.0
        return
    assert f"NOT FINITE in validation: scores of {first}, /data/{min(bad)}.jpg; numbers above 65504" in caplog.text
    with pytest.raises(NotFinite) as error:
        multi_view_test(Knows(bad), loader, loader.labels, CPU, "off")
    assert f"scores of {first}, /data/{min(bad)}.jpg: the test has no result" in str(error.value)


def test_losses_of_a_validation(
    image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = MFM.forward

    def spoiled(self: MFM, batch: Batch) -> StepOutput:
        out = forward(self, batch)
        if not self.training and batch.index is not None and 8 in batch.index:
            out.loss = out.loss * float("inf")
        return out

    monkeypatch.setattr(MFM, "forward", spoiled)
    opts = [*MFM_PT, *images(image_data), "TRAIN.EVAL_PERIOD", "1", "SOLVER.MAX_EPOCH", "1"]
    assert main(["--cfg", MFM_YAML, *opts, "OUTPUT_DIR", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "NOT FINITE in validation: losses of the batches of 8 of 16 samples" in said and "sample 8, /" in said
    assert json_stats(tmp_path, "val_epoch")[-1]["loss"] == "inf"


@pytest.mark.parametrize("recipe", ["vit", "resnet"])
def test_a_file_of_nan_is_neither_tested_nor_finetuned(
    recipe: str, image_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml, opts = (FT, VIT_FT) if recipe == "vit" else (str(MFM_RECIPES / "in1k_R50_MFM_FT.yaml"), R50_FT)
    training = build_trainer(load_config(yaml, opts), CPU)
    state = training.objective.released_state()
    name = "blocks.0.mlp.fc1.weight" if recipe == "vit" else "layer1.0.bn1.running_mean"
    state[name].view(-1)[0] = float("nan")
    torch.save({"model": state}, tmp_path / "w.pth")
    run = ["--cfg", yaml, *opts, *images(image_data), "OUTPUT_DIR", str(tmp_path / "out")]
    for more in (
        ["TRAIN.ENABLE", "False", "TEST.ENABLE", "True", "TEST.CHECKPOINT_FILE_PATH"],
        ["TRAIN.CHECKPOINT_FILE_PATH"],
    ):
        assert main([*run, *more, str(tmp_path / "w.pth")]) == 2
        said = capsys.readouterr().out
        assert f"error: {tmp_path / 'w.pth'}: 1 parameters are not finite" in said and name in said
        assert "top1" not in said and find_checkpoints(tmp_path / "out", "ssl_eval") == []
