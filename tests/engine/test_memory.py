"""The estimated memory of a step against what steps really take."""

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from yacs.config import CfgNode

from benchmarks.cases import random_batch
from benchmarks.measure import peak_mib
from maskfeat.config import load_config
from maskfeat.engine.memory import StepMemory, estimate_step_memory
from maskfeat.engine.trainer import CPU, build_trainer
from tests.small import MFM_PT, MFM_RECIPES, MVIT_PT, RECIPES, VIT_FT, VIT_PT

LARGER = ["DATA.TRAIN_CROP_SIZE", "64", "DATA.TEST_CROP_SIZE", "64"]
WIDER = [
    *("DATA.TRAIN_CROP_SIZE", "96", "DATA.TEST_CROP_SIZE", "96", "MVIT.EMBED_DIM", "192", "MVIT.NUM_HEADS", "3"),
    *("MVIT.DEPTH", "4", "MASK.PRETRAIN_DEPTH", "[3]"),
]
BATCH = 8
CASES = {
    "vit": (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", [*VIT_PT, *WIDER]),
    "mvit": (
        RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml",
        [*MVIT_PT, *LARGER, "DATA.TRAIN_JITTER_SCALES", "[72, 80]", "MVIT.EMBED_DIM", "32",
         "TRAIN.MIXED_PRECISION", "bf16"],
    ),
    "resnet": (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", [*MFM_PT, *LARGER, "TRAIN.EMA", "0.9"]),
}  # fmt: skip


def config(name: str, *opts: str) -> CfgNode:
    path, own = CASES[name]
    return load_config(path, [*own, "TRAIN.BATCH_SIZE", str(BATCH), *opts])


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def measured(cfg: CfgNode) -> StepMemory:
    """The same of the second of two real steps, by PyTorch's own profiler."""
    trainer, batch = build_trainer(cfg, CPU), random_batch(cfg, CPU)
    batch = dataclasses.replace(batch, max_hidden=None)
    trainer.train_step(batch)
    modules = [trainer.objective, *([trainer.ema.module] if trainer.ema else [])]
    parameters = bytes_of(value for module in modules for value in (*module.parameters(), *module.buffers()))
    gradients = bytes_of(parameter.grad for parameter in trainer.objective.parameters())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    optimizer = bytes_of(value for value in states if isinstance(value, Tensor))
    size = bytes_of((batch.clip, batch.label, batch.hidden, batch.index))
    trainer.optimizer.zero_grad(set_to_none=True)
    above = round(peak_mib(lambda: trainer.train_step(batch), CPU) * 2**20)
    return StepMemory(parameters, gradients, optimizer, above, size, parameters + optimizer + size + above)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet", pytest.param("mvit", marks=pytest.mark.slow)])
def test_the_estimate_is_within_15_percent(name: str) -> None:
    cfg = config(name)
    real, estimate = measured(cfg), estimate_step_memory(cfg, BATCH)
    for field in ("parameters", "gradients", "optimizer", "batch"):
        assert getattr(estimate, field) == pytest.approx(getattr(real, field), rel=0.01), field
    assert estimate.total == pytest.approx(real.total, rel=0.15)
    rest = real.total - real.parameters - real.optimizer
    assert abs(estimate.total - real.total) < 0.15 * rest, "of what is not known from the model alone"


@pytest.mark.slow
def test_keys_that_save_memory() -> None:
    whole = estimate_step_memory(config("vit"), BATCH)
    for key, value in (
        ("MODEL.ACT_CHECKPOINT", "True"),
        ("TRAIN.MICRO_BATCH_SIZE", "2"),
        ("TRAIN.MIXED_PRECISION", "bf16"),
    ):
        less = estimate_step_memory(config("vit", key, value), BATCH)
        assert less.activations < 0.9 * whole.activations and less.parameters == whole.parameters, key
    assert estimate_step_memory(config("vit", "TRAIN.COMPILE", "True"), BATCH) == whole
    averaged = estimate_step_memory(config("vit", "TRAIN.EMA", "0.9"), BATCH)
    assert averaged.parameters == 2 * whole.parameters and averaged.activations == whole.activations


def test_fine_tuning_has_labels() -> None:
    cfg = load_config(RECIPES / "in1k_VIT_B_FT.yaml", [*VIT_FT, "TRAIN.CHECKPOINT_FILE_PATH", ""])
    four, eight = estimate_step_memory(cfg, 4), estimate_step_memory(cfg, 8)
    assert eight.batch > 1.9 * four.batch and eight.total > four.total
    assert torch.get_default_device() == CPU and cfg.is_frozen()
