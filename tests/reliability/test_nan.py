"""A NaN or an infinity on one rank: the step is skipped on every rank, to the bit; too many in a row stop the run."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.config import load_config
from maskfeat.distributed.collectives import (
    all_gather_object,
    destroy_process_group,
    init_process_group,
)
from maskfeat.distributed.launch import launch
from maskfeat.distributed.world import World
from maskfeat.engine.run import main, work
from maskfeat.engine.setup import CommandLine
from maskfeat.engine.trainer import Trainer, build_trainer
from maskfeat.objectives.maskfeat import MaskFeat
from maskfeat.optim.skipped_steps import SkippedStepCounter
from tests.reliability.scale import SOAK, note, size
from tests.small import MFM_PT, MFM_RECIPES, RECIPES, VIT_PT, images
from tests.worker import json_stats

PT = RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml"
MFM = MFM_RECIPES / "in1k_R50_MFM_PT.yaml"
CPU = torch.device("cpu")
WHERE = ("pixels", "loss", "gradient")
STEPS = 4
BAD = (0, 2)  # also the first step, from which the average would begin


def variants() -> list[tuple[str, list[str]]]:
    """A transformer without, and a ResNet with batch norms; both optimizers; whole batches and micro-batches. Scaled
    losses with the transformer: convolutions in fp16 take a CPU a hundred times as long."""
    found = []
    for micro in ("0", "3"):
        for method in ("adamw", "sgd"):
            opts = ["TRAIN.MICRO_BATCH_SIZE", micro, "SOLVER.OPTIMIZING_METHOD", method, "TRAIN.EMA", "0.5"]
            found += [(str(PT), [*VIT_PT, *opts]), (str(MFM), [*MFM_PT, *opts])]
    return [*found, (str(PT), [*VIT_PT, "TRAIN.MIXED_PRECISION", "fp16", "TRAIN.EMA", "0.5"])]


def snapshot(training: Trainer) -> dict[str, Tensor]:
    """Everything that a step changes, copied: weights, buffers, their average, and what the optimizer keeps."""
    assert training.ema is not None
    found = {f"weights {name}": value for name, value in training.objective.state_dict().items()}
    found |= {f"average {name}": value for name, value in training.ema.module.state_dict().items()}
    for number, kept in training.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {number} {name}": v for name, v in kept.items() if isinstance(v, Tensor)}
    return {name: value.clone() for name, value in found.items()}


def bits(value: Tensor) -> Tensor:
    """For comparing: NaN equals NaN, and 0 is not -0."""
    return value.contiguous().view(torch.uint8) if value.dim() else value.reshape(1).view(torch.uint8)


def same_bits(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """The names of what changed. An optimizer may make its moments (zeros) in a step that is skipped."""
    changed = [name for name, value in before.items() if not torch.equal(bits(value), bits(after[name]))]
    return changed + [name for name in after.keys() - before.keys() if after[name].count_nonzero()]


def make_batch(cfg: CfgNode) -> Batch:
    """8 random images with the masks of the method."""
    grid = (2, 2) if cfg.MODEL.MODEL_NAME == "MaskMViT" else (1, 1)
    hidden = torch.rand(8, *grid) < 0.5
    hidden[:, 0, 0] = True
    return Batch(torch.randn(8, 3, 32, 32), hidden=hidden, max_hidden=int(hidden.flatten(1).sum(1).max()))


def poison(where: str, value: float, training: Trainer, batch: Batch) -> Any:
    """Put `value` into a pixel, the loss or one entry of one gradient of this rank; what takes the hook off again."""
    if where == "pixels":
        batch.clip[-1, 0, 3, 3] = value
        return None
    if where == "loss":

        def spoil(_: nn.Module, __: object, out: Any) -> Any:
            out.loss = out.loss * value
            return out

        return training.objective.register_forward_hook(spoil)

    def spoil_one(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[1] = value
        return gradient

    parameter = [p for p in training.objective.parameters() if p.numel() > 8][2]
    return parameter.register_hook(spoil_one)


def one_case(world: World, recipe: str, opts: list[str], where: str, value: float) -> None:
    """Four steps, of which two meet the value on the second rank alone."""
    cfg = load_config(recipe, opts)
    torch.manual_seed(1)
    training = build_trainer(cfg, CPU, world)
    training.model.train()
    torch.manual_seed(100 + world.rank)
    for step in range(STEPS):
        batch, hook = make_batch(cfg), None
        before = snapshot(training)
        if step in BAD and world.rank == 1:
            hook = poison(where, value, training, batch)
        training.train_step(batch)
        if hook is not None:
            hook.remove()
        after = snapshot(training)
        changed, told = same_bits(before, after), training.metrics.read()["skipped"]
        if step in BAD:
            assert not changed, (where, value, opts, step, changed[:3])
            row = training.skipped.read()
            assert told == pytest.approx(1) and row == (1, 0), (where, value, opts, step, told, row)
        else:
            assert told == 0 and training.skipped.read()[0] == 0
            assert len(changed) > 0.5 * len(after), (where, value, step)
            assert all(v.isfinite().all() for v in after.values())
    weights = torch.cat([p.detach().reshape(-1) for p in training.objective.parameters()])
    assert all(torch.equal(theirs, weights) for theirs in all_gather_object(weights)), "the ranks have parted"


def cases(world: World, init_method: str, folder: str) -> int:
    init_process_group(world, "gloo", CPU, init_method)
    every = [(where, value) for where in WHERE for value in (float("nan"), float("inf"))]
    done = 0
    for number, (recipe, opts) in enumerate(variants()):
        # In CI two of the six for each variant, and each of them for several variants.
        for where, value in every if SOAK else (every[number % 6], every[(number + 3) % 6]):
            one_case(world, recipe, opts, where, value)
            done += 1
    destroy_process_group()
    if world.is_main:
        (Path(folder) / "done").write_text(str(done))
    return 0


@pytest.mark.slow
def test_one_rank_meets_it_and_both_skip_to_the_bit(tmp_path: Path) -> None:
    assert launch(cases, (str(tmp_path),), processes=2) == 0
    done = int((tmp_path / "done").read_text())
    assert done == len(variants()) * (6 if SOAK else 2)
    note(9, f"{done} of {done} kinds of NaN and inf on one of two ranks: skipped on both, every bit as before")


def poisoned_work(world: World, init_method: str, cfg: CfgNode, given: CommandLine, bad: tuple[int, ...]) -> int:
    """A whole run in which the second rank's loss is NaN at these steps."""
    forward, calls = MaskFeat.forward, [0]

    def poisoned(self: MaskFeat, batch: Batch) -> Any:
        out = forward(self, batch)
        if calls[0] in bad and world.rank == 1:
            out.loss = out.loss * float("nan")
        calls[0] += 1
        return out

    MaskFeat.forward = poisoned  # type: ignore[method-assign]
    return work(world, init_method, cfg, given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "begins"),
    [
        ((3, 4, 5), None),  # one fewer than the limit, over the end of an epoch
        ((1, 2, 3, 5, 6, 7), None),  # not in a row
        ((3, 4, 5, 6), "4 steps in a row, from epoch 1, step 4 on"),
        ((4, 5, 6, 7, 8), "steps in a row, from epoch 1, step 5 on"),
    ],
    ids=["one_fewer", "interrupted", "as_many", "one_more"],
)
def test_so_many_in_a_row_stop_the_run(
    bad: tuple[int, ...], begins: str | None, image_data: Path, tmp_path: Path
) -> None:
    opts = [*VIT_PT, *images(image_data), "TRAIN.MAX_SKIPPED_STEPS", "4", "LOG_PERIOD", "2", "NUM_GPUS", "2",
            "DIST_BACKEND", "gloo", "OUTPUT_DIR", str(tmp_path)]  # fmt: skip
    code = launch(poisoned_work, (load_config(PT, opts), CommandLine("", ()), bad), processes=2)
    log = (tmp_path / "stdout.log").read_text()
    assert code == (0 if begins is None else 2)
    if begins is None:
        assert sum(line["skipped"] for line in json_stats(tmp_path, "train_iter")) == len(bad)
        assert "in a row" not in log
    else:
        assert begins in log and "(TRAIN.MAX_SKIPPED_STEPS 4)" in log
    note(9, f"{len(bad)} of 10 steps skipped {bad}, limit 4 in a row: {'goes on' if begins is None else 'stops'}")


def test_nothing_hidden_is_said_once(image_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opts = [*VIT_PT, *images(image_data), "LOG_PERIOD", "2"]
    for ratio, count in (("0.0", 1), ("0.4", 0)):
        assert main(["--cfg", str(PT), *opts, "AUG.MASK_RATIO", ratio, "OUTPUT_DIR", str(tmp_path / ratio)]) == 0
        assert capsys.readouterr().out.count("nothing was hidden") == count
        assert {line["skipped"] for line in json_stats(tmp_path / ratio, "train_iter")} == {0}


def test_rows_are_counted_exactly() -> None:
    """Against counting on the host, read after random stretches."""
    for seed in range(size(40, 2000)):
        draw = random.Random(seed)
        counter = SkippedStepCounter(CPU)
        row = longest = begun = 0
        for step in range(60):
            lost = draw.random() < 0.7
            counter.count(torch.tensor(float(lost)))
            row = row + 1 if lost else 0
            if row > longest:
                longest, begun = row, step - row + 1
            if draw.random() < 0.2:
                found, ago = counter.read()
                assert found == longest
                assert not longest or step - ago == begun
                longest = 0
