"""The trainer: its state, and the way from the command line to a step."""

import copy
import random
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import maskfeat
from maskfeat.batch import BadSample, Batch
from maskfeat.build import build_loader, build_objective
from maskfeat.checkpoint.files import Position
from maskfeat.config import load_config
from maskfeat.distributed.world import World
from maskfeat.engine import saver
from maskfeat.engine.evaluate import validate
from maskfeat.engine.resume import CheckpointSource
from maskfeat.engine.run import main
from maskfeat.engine.trainer import Trainer, build_trainer, precision_of
from maskfeat.engine.validation import validation_epochs
from maskfeat.optim.optimizers import clip_gradients
from tests.small import MFM_PT, MFM_RECIPES, RECIPES, VIT_FT, VIT_PT, images

CPU = torch.device("cpu")
CASES = {
    "vit": (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", [*VIT_PT, "TRAIN.EMA", "0.5"]),
    "resnet_sgd": (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", [*MFM_PT, "SOLVER.OPTIMIZING_METHOD", "sgd"]),
    "vit_fp16": (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", [*VIT_PT, "TRAIN.MIXED_PRECISION", "fp16"]),
}


def test_names_of_precisions() -> None:
    """True and False are PySlowFast's values."""
    for given, name in ((False, "off"), (True, "fp16"), ("bf16", "bf16"), ("off", "off")):
        assert precision_of(SimpleNamespace(MIXED_PRECISION=given)) == name


@pytest.mark.parametrize(("precision", "fused"), [("off", True), ("bf16", False), ("fp16", True)])
def test_fused_attention_except_in_bfloat16_on_a_cpu(precision: str, fused: bool) -> None:
    """There matrix products are faster, and as exact."""
    recipe, opts = CASES["vit"]
    trainer = build_trainer(load_config(str(recipe), [*opts, "TRAIN.MIXED_PRECISION", precision]), CPU)
    blocks = trainer.objective.backbone.blocks
    assert all(block.attn.fused_attn == fused for block in blocks)
    x = torch.randn(2, 37, blocks[0].attn.qkv.in_features)
    exact = blocks[0].attn.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = blocks[0].attn(x)
    assert (low - exact).norm() <= 0.01 * exact.norm()


def make_steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    """`count` steps on batches that depend on the step alone; what each logged."""
    logged = []
    trainer.model.train()
    for _ in range(count):
        trainer.begin_step(steps_per_epoch=10)
        clip = torch.randn(4, 3, 32, 32)  # of the generator that begin_step has seeded
        grid = (1, 1) if type(trainer.objective).__name__ == "MFM" else (2, 2)
        hidden = torch.tensor([True, False, True, True]).reshape(-1, 1, 1).expand(-1, *grid)
        trainer.train_step(Batch(clip, hidden=hidden.clone(), max_hidden=grid[0] * grid[1]))
        trainer.position = Position(0, trainer.position.step + 1)
        logged.append(trainer.metrics.read())
    return logged


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else None
    if items is None:
        return {prefix: state}
    return {name: value for key, part in items for name, value in flat(part, f"{prefix}.{key}").items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_state_dict_restores_everything(name: str) -> None:
    """Three steps, saved, loaded into a new trainer, three more: the same bits as six steps in one go."""
    path, opts = CASES[name]
    cfg = load_config(path, opts)
    objective = build_objective(cfg)
    whole, first, second = (build_trainer(cfg, CPU, objective=copy.deepcopy(objective)) for _ in range(3))
    for param in second.objective.parameters():
        param.data += 1.0
    logged = make_steps(whole, 6)
    assert make_steps(first, 3) == logged[:3]
    content = first.state_dict()
    second.objective.load_released_state(content["model_state"])
    second.load_state_dict(content)
    assert second.position == Position(0, 3)
    assert make_steps(second, 3) == logged[3:]
    expected, found = flat(whole.state_dict()), flat(second.state_dict())
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key


def test_state_dict_of_another_model_is_refused() -> None:
    path, opts = CASES["vit"]
    trainer = build_trainer(load_config(path, opts), CPU)
    other = build_trainer(load_config(path, [*opts, "MVIT.DEPTH", "3", "MASK.PRETRAIN_DEPTH", "[2]"]), CPU)
    make_steps(trainer, 1)
    with pytest.raises(ValueError, match="parameter groups"):
        other.load_state_dict(trainer.state_dict())
    with pytest.raises(KeyError, match="optimizer_state"):
        other.load_state_dict({"epoch": 1})


def test_few_calls_lead_to_a_step(image_data: Path, tmp_path: Path) -> None:
    """From tools/run_net.py, which calls `main`, to `optimizer.step`."""
    seen: set[tuple[str, ...]] = set()
    package = str(Path(maskfeat.__file__).parent)

    def note(*_: object) -> None:
        seen.add(tuple(f.name for f in traceback.extract_stack() if f.filename.startswith(package)))

    handle = register_optimizer_step_pre_hook(note)
    try:
        cfg = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
        opts = [*VIT_PT, *images(image_data), "SOLVER.MAX_EPOCH", "1", "OUTPUT_DIR", str(tmp_path)]
        assert main(["--cfg", cfg, *opts]) == 0
    finally:
        handle.remove()
    assert seen == {("main", "launch", "work", "train", "train_step")}


def test_a_step_has_the_rate_of_where_it_begins() -> None:
    cfg = load_config(RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", [*VIT_FT, "SOLVER.LAYER_DECAY", "0.5"])
    trainer = build_trainer(cfg, CPU)
    trainer.lr = lambda epoch: epoch
    trainer.position = Position(2, 3)
    assert trainer.begin_step(steps_per_epoch=10) == pytest.approx(2.3)
    # Two blocks, and what comes before and after them.
    rates = {round(group["lr"], 6) for group in trainer.optimizer.param_groups}
    assert rates == {round(2.3 * 0.5**layer, 6) for layer in range(4)}
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(2.3 * group["layer_decay"])


def test_gradients_are_clipped_by_norm_or_by_value() -> None:
    gradient = [3.0, -4.0, 0.1]
    for norm, value, expected in (
        (None, 0.5, [0.5, -0.5, 0.1]),
        (2.5, None, [number * 2.5 / 5.001 for number in gradient]),
        (None, None, gradient),
    ):
        parameter = torch.nn.Parameter(torch.zeros(3))
        parameter.grad = torch.tensor(gradient)
        assert clip_gradients([parameter], norm, value).item() == pytest.approx(5.001, abs=1e-4)
        assert parameter.grad.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_clip_value_of_the_config_is_the_trainers() -> None:
    path, opts = CASES["vit"]
    cfg = load_config(path, [*opts, "SOLVER.CLIP_GRAD_VAL", "0.37", "SOLVER.CLIP_GRAD_L2NORM", "None"])
    trainer = build_trainer(cfg, CPU)
    assert (trainer.clip_value, trainer.clip_norm) == (0.37, None)


def test_a_skipped_step_is_not_part_of_the_loss_that_is_logged() -> None:
    trainer = build_trainer(load_config(*CASES["vit"]), CPU)
    hidden = torch.tensor([True, False, True, True]).reshape(4, 1, 1).expand(4, 2, 2).clone()
    good, bad = (Batch(torch.randn(4, 3, 32, 32), hidden=hidden, max_hidden=4) for _ in range(2))
    bad.clip[0, 0, 0, 0] = torch.inf
    with torch.no_grad():
        expected = float(trainer.objective(good).loss)
    for batch in (bad, good):
        trainer.train_step(batch)
    found = trainer.metrics.read()
    assert found["skipped"] == 1 and found["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_validation_is_a_mean_over_hidden_patches() -> None:
    objective = build_objective(load_config(*CASES["vit"]))
    batches = []
    for number in (1, 4):
        hidden = torch.zeros(1, 4, dtype=torch.bool)
        hidden[0, :number] = True
        clip = torch.randn(1, 3, 32, 32)
        batches.append(Batch(clip, hidden=hidden.reshape(1, 2, 2), index=torch.tensor([number]), max_hidden=4))
    with torch.no_grad():
        losses = [float(objective.eval()(batch).loss) for batch in batches]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    found = validate(objective, batches, CPU, "off")["loss"]
    assert found == pytest.approx((losses[0] + 4 * losses[1]) / 5, rel=1e-5)


@pytest.mark.parametrize(
    ("period", "classifies", "epochs"),
    [(2, True, [1, 3, 4]), (2, False, [1, 3, 4]), (6, True, [4]), (6, False, []), (0, True, []), (5, False, [4])],
)
def test_epochs_that_are_validated(period: int, classifies: bool, epochs: list[int]) -> None:
    """Of five: the last one too, but not of a pre-training whose period is longer than the run."""
    opts = ["SOLVER.MAX_EPOCH", "5", "TRAIN.EVAL_PERIOD", str(period)]
    assert validation_epochs(load_config(CASES["vit"][0], [*VIT_PT, *opts]), classifies) == epochs


def test_ranks_draw_for_themselves_and_steps_repeat() -> None:
    """What is drawn on a rank in a step (mixup, drop path, MFM's masks) depends on seed, step and rank alone."""
    path, opts = CASES["vit"]
    drawn = {}
    for rank in (0, 1, 0):
        trainer = build_trainer(load_config(path, opts), CPU)
        trainer.world = World(rank, 2, rank, 2)
        for step in (0, 1):
            trainer.position = Position(0, step)
            trainer.begin_step(steps_per_epoch=10)
            now = (np.random.rand(), random.random(), torch.rand(1).item())
            assert drawn.setdefault((rank, step), now) == now
    assert len({value for values in drawn.values() for value in values}) == 12


def test_every_step_of_a_run_has_a_seed_of_its_own() -> None:
    trainer, drawn = build_trainer(load_config(*CASES["vit"]), CPU), set()
    for epoch in range(3):
        for step in range(4):
            trainer.position = Position(epoch, step)
            trainer.begin_step(steps_per_epoch=4)
            drawn.add(torch.rand(()).item())
    assert len(drawn) == 12


def test_resuming_with_other_steps_repeats_samples_and_skips_none() -> None:
    for before, after, step, expected in ((8, 5, 3, 4), (8, 16, 3, 1), (8, 8, 3, 3), (6, 4, 1, 1), (64, 8, 5, 10)):
        source = CheckpointSource("x", {"samples_per_step": before}, resumes=True)
        position = source._in_these_steps(Position(4, step), steps=10, samples_per_step=after)
        assert position.epochs == 4 and position.step == expected
        assert position.step * after <= step * before, "no sample is left out"


def test_checkpoints_by_the_clock(image_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRAIN.CHECKPOINT_MINUTES saves within an epoch once they have passed since the last checkpoint."""
    clock = [0.0]
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    path, opts = CASES["vit"]
    cfg = load_config(path, [*opts, "OUTPUT_DIR", str(tmp_path), "TRAIN.CHECKPOINT_MINUTES", "2.0"])
    one = saver.Saver(cfg, build_trainer(cfg, CPU))
    due = []
    for now in (0.0, 119.0, 120.0, 121.0):
        clock[0] = now
        due.append(one.is_due)
    assert due == [False, False, True, True]
    one.save()
    assert not one.is_due
    clock[0] = 250.0
    assert one.is_due
    cfg.merge_from_list(["TRAIN.CHECKPOINT_MINUTES", 0.0])
    assert not one.is_due, "0 = only after epochs"


@pytest.mark.parametrize(("micro", "most"), [(0, 8), (3, 3), (100, 8)])
def test_a_validation_has_no_more_samples_at_once_than_training(micro: int, most: int, image_data: Path) -> None:
    cfg = load_config(str(CASES["vit"][0]), [*VIT_PT, *images(image_data), "TRAIN.MICRO_BATCH_SIZE", micro])
    sizes = [len(batch) for batch in build_loader(cfg, "val")]
    assert max(sizes) == most and sum(sizes) == 16
    assert build_loader(cfg, "train").batch_size == 8


def test_unreadable_samples_are_wrong_in_validation() -> None:
    """A classifier that is right about every row, one of which could not be read."""
    objective = SimpleNamespace(
        eval=lambda: None, classifies=True, predict=lambda batch: torch.eye(4)[batch.label], num_classes=4
    )
    batch = Batch(
        torch.zeros(4, 3, 2, 2),
        label=torch.arange(4),
        index=torch.tensor([5, 6, 7, 8]),
        bad=(BadSample(7, "seven.jpg", "damaged"),),
    )
    found = validate(objective, [batch], CPU, "off")
    assert found == {"top1": 75.0, "top5": 75.0}
