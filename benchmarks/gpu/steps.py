"""Training steps on the GPU: without a stop for the device, in fp16 with loss scaling, with a moving average."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from yacs.config import CfgNode

from benchmarks.cases import CONFIGS, MVIT_S, RESNET_50, VIT_B, random_batch
from benchmarks.gpu.checks import (
    MFM_PT,
    MVIT_FT,
    MVIT_PT,
    RESIDENT,
    VIT_FT,
    VIT_PT,
    clip_files,
    expect,
    image_files,
    largest,
    small_config,
)
from benchmarks.gpu.parts import Context, Failed, Figures
from benchmarks.measure import peak_mib
from benchmarks.training import Steps
from maskfeat.build import build_loader
from maskfeat.config import load_config
from maskfeat.engine.memory import estimate_step_memory
from maskfeat.engine.provenance import machine
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.trainer import Trainer, build_trainer

_MEMORY = 0.15  # of what a step takes
_WARM = 2  # steps before the watch is set

VARIANTS = {
    "ViT": (VIT_PT, ("TRAIN.MIXED_PRECISION", "bf16", "TRAIN.EMA", "0.9")),
    "ViT in micro-batches": (VIT_PT, ("TRAIN.MICRO_BATCH_SIZE", "3", "SOLVER.CLIP_GRAD_L2NORM", "0.02")),
    "ViT, resident images": (VIT_PT, RESIDENT),
    "classifier with mixup": (VIT_FT, ("TRAIN.MIXED_PRECISION", "bf16")),
    "MViTv2": (MVIT_PT, ("TRAIN.MIXED_PRECISION", "bf16")),
    "MViTv2, blocks recomputed": (MVIT_PT, ("MODEL.ACT_CHECKPOINT", "True")),
    "MViTv2 classifier": (MVIT_FT, ()),
    "MFM with ResNet": (MFM_PT, ("TRAIN.MIXED_PRECISION", "bf16")),
    "fp16": (VIT_PT, ("TRAIN.MIXED_PRECISION", "fp16")),
}
_NOT_IN_A_TOY_RUN = ("ViT, resident images", "MViTv2, blocks recomputed", "MViTv2 classifier")


@contextmanager
def no_waiting(context: Context) -> Iterator[None]:
    """On CUDA, any stop of the host for the device raises an error."""
    if context.cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if context.cuda:
            torch.cuda.set_sync_debug_mode("default")


def quiet_steps(context: Context) -> Figures:
    """Steps that do not log, on batches from files through workers, pinned memory and the deferred transforms."""
    found: Figures = {}
    wrong = []
    for name, (recipe, opts) in VARIANTS.items():
        if context.toy and name in _NOT_IN_A_TOY_RUN:
            continue
        files = clip_files(context) if "k400" in recipe[0] else image_files(context)
        cfg = small_config(recipe, context, *files, "DATA_LOADER.NUM_WORKERS", "2", "TRAIN.BATCH_SIZE", "4", *opts)
        try:
            found[name] = _quiet(cfg, context)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            found[name] = str(error).splitlines()[0]
            wrong.append(f"{name} waits for the device")
        context.note(quiet_steps=found)
    context.needs_cuda("set_sync_debug_mode in steps that do not log")
    if wrong:
        raise Failed(", ".join(wrong))
    return found


def _quiet(cfg: CfgNode, context: Context) -> int:
    """Make the steps of one epoch; how many of them were watched."""
    training, watched = Steps(cfg, context.device), 0
    loader = build_loader(cfg, "train", device=context.device)
    loader.set_epoch(0)
    batches = iter(loader)
    for _ in range(_WARM):
        training.step(next(batches))
    with no_waiting(context):
        for batch in batches:
            training.step(batch)
            watched += 1
            if watched == 2:
                break
    if not training.trainer.metrics.read()["loss"] < float("inf"):
        raise Failed("the loss is not finite")
    return watched


def _trainer(context: Context, *opts: str) -> tuple[Trainer, CfgNode]:
    cfg = small_config(VIT_PT, context, *opts)
    seed_everything(0)
    trainer = build_trainer(cfg, context.device)
    trainer.model.train()
    return trainer, cfg


def loss_scaling(context: Context) -> Figures:
    """fp16: steps are made; one whose scaled gradient overflows is skipped, changes nothing and halves the scale."""
    trainer, cfg = _trainer(context, "TRAIN.MIXED_PRECISION", "fp16")
    batch = random_batch(cfg, context.device)
    parameters = list(trainer.objective.parameters())

    def step() -> bool:
        """Whether it changed the weights."""
        before = [p.detach().clone() for p in parameters]
        trainer.begin_step(1)
        trainer.train_step(batch)
        return any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))

    made = [step() for _ in range(2)]
    scale = 2.0**60  # times any gradient is more than fp16 holds
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale})
    skipped, halved = not step(), trainer.scaler.get_scale()
    streak, _ = trainer.skipped.read()
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 1024.0})
    again = step()
    if not (all(made) and skipped and halved == scale / 2 and streak == 1 and again):
        raise Failed(f"made {made}, skipped {skipped} ({streak} in a row), scale {halved}, made again {again}")
    return {"made": sum(made) + again, "skipped": 1, "scale halved": True, **trainer.metrics.read()}


def moving_average(context: Context) -> Figures:
    """TRAIN.EMA over four steps, of which one is skipped, against the same sum on the CPU."""
    decay = 0.9
    trainer, cfg = _trainer(context, "TRAIN.EMA", str(decay))
    assert trainer.ema is not None
    batch = random_batch(cfg, context.device)
    broken = random_batch(cfg, context.device)
    broken.clip[:] = torch.nan
    expected: list[torch.Tensor] = []
    for given in (batch, batch, broken, batch):
        trainer.begin_step(1)
        trainer.train_step(given)
        values = [p.detach().double().cpu() for p in trainer.objective.parameters()]
        if given is batch:
            before = expected or values
            expected = [decay * a + (1 - decay) * b for a, b in zip(before, values, strict=True)]
    off = max(largest(average, value) for average, value in zip(trainer.ema.module.parameters(), expected, strict=True))
    return {"apart": expect("the average", off, 1e-6), "recipe": Path(VIT_PT[0]).stem}


def memory(context: Context) -> Figures:
    """The highest memory of a step against the estimate that is made without a device."""
    found: Figures = {}
    wrong = []
    sizes = {VIT_B: 64, MVIT_S: 8, RESNET_50: 64}
    for path, recipe in ((VIT_B, VIT_PT), (MVIT_S, MVIT_PT), (RESNET_50, MFM_PT)):
        for precision in ("bf16",) if context.toy else ("False", "bf16"):
            opts = ("TRAIN.MIXED_PRECISION", precision, "TRAIN.BATCH_SIZE", str(sizes[path]))
            if context.toy:
                cfg = small_config(recipe, context, *opts[:2])
            else:
                cfg = load_config(CONFIGS / path, ["NUM_GPUS", "1", "OUTPUT_DIR", str(context.folder), *opts])
            name = f"{Path(path).stem} {precision.replace('False', 'fp32')}"
            estimate = estimate_step_memory(cfg, cfg.TRAIN.BATCH_SIZE, context.device).total / 2**20
            measured = _measured(cfg, context)
            found[name] = {"estimate_mib": round(estimate, 1), "measured_mib": round(measured, 1)}
            context.note(memory=found)
            if context.cuda and not abs(estimate / measured - 1) <= _MEMORY:
                wrong.append(f"{name}: {measured:.0f} MiB, {estimate:.0f} estimated")
    context.needs_cuda("max_memory_allocated against the estimate")
    if wrong:
        raise Failed(f"more than {_MEMORY:.0%} off: {'; '.join(wrong)}")
    return found


def _measured(cfg: CfgNode, context: Context) -> float:
    """MiB of a second step's peak, with everything that is kept between steps."""
    seed_everything(0)
    gc.collect()  # what lies there of earlier trainers, now and not while this one is measured
    kept = torch.cuda.memory_allocated() if context.cuda else 0
    trainer = build_trainer(cfg, context.device)
    trainer.model.train()
    batch = random_batch(cfg, context.device)
    trainer.begin_step(1)
    trainer.train_step(batch)
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if context.cuda:
        before = torch.cuda.memory_allocated() - kept
    else:  # there, only what a step adds is counted
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        tensors = [*trainer.objective.parameters(), *trainer.objective.buffers(), *states, batch.clip]
        before = sum(tensor.nbytes for tensor in tensors)
    return before / 2**20 + peak_mib(lambda: trainer.train_step(batch), context.device)


def named(context: Context) -> Figures:
    """The machine as reports of the evidence name it: by its GPU where it has one."""
    found = machine()
    if context.cuda and found != torch.cuda.get_device_name():
        raise Failed(f"the machine is called {found}")
    return {"name": found}
