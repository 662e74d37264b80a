"""What the tests of sharding run in two processes: the same steps, sharded and by DistributedDataParallel."""

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor
from yacs.config import CfgNode

from maskfeat.batch import Batch
from maskfeat.build import build_objective
from maskfeat.checkpoint.sharded import (
    load_sharded,
    load_training,
    read_sharded_plain,
    save_sharded,
    training_tensors,
)
from maskfeat.config import load_config
from maskfeat.distributed.collectives import all_gather_object, destroy_process_group, init_process_group
from maskfeat.distributed.fsdp import full_optimizer_state_dict, full_state_dict, gather_into, local_shard
from maskfeat.distributed.world import World
from maskfeat.engine.parallelize import (
    gradient_sync,
)
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.trainer import build_trainer
from maskfeat.optim.optimizers import load_optimizer_state
from maskfeat.optim.schedule import set_lr
from tests.golden.golden import golden_batch
from tests.small import MFM_PT, MFM_RECIPES, MVIT_PT, RECIPES, VIT_FT, VIT_PT

CPU = torch.device("cpu")
VIT = (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", [*VIT_PT, "SOLVER.CLIP_GRAD_L2NORM", "0.02"])
MVIT = (RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", [*MVIT_PT, "SOLVER.CLIP_GRAD_L2NORM", "0.02"])
CLASSIFIER = (RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml", [*VIT_FT, "MVIT.DROPPATH_RATE", "0.2"])
RESNET = (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", MFM_PT)

PIECES = ["TRAIN.MICRO_BATCH_SIZE", "2"]
CASES: dict[str, tuple[tuple[Path, list[str]], list[str]]] = {
    "vit": (VIT, []),
    "vit in micro-batches, blocks recomputed": (VIT, [*PIECES, "MODEL.ACT_CHECKPOINT", "True"]),
    "vit in bf16": (VIT, ["TRAIN.MIXED_PRECISION", "bf16"]),
    "vit in fp16": (VIT, ["TRAIN.MIXED_PRECISION", "fp16", *PIECES]),
    "vit clipped by value": (VIT, ["SOLVER.CLIP_GRAD_L2NORM", "None", "SOLVER.CLIP_GRAD_VAL", "1e-4"]),
    "mvit in micro-batches, light recomputation": (MVIT, [*PIECES, "MODEL.ACT_CHECKPOINT", "light"]),
    "mvit, blocks recomputed": (MVIT, ["MODEL.ACT_CHECKPOINT", "True"]),
    "classifier with mixup": (CLASSIFIER, PIECES),
    "resnet": (RESNET, []),
}


class Steps:
    """A trainer, sharded or not, on batches made here."""

    def __init__(self, cfg: CfgNode, world: World, sharded: bool) -> None:
        seed_everything(cfg.RNG_SEED)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TRAIN.PARALLEL = "fsdp" if sharded else "ddp"
        self.cfg, self.world = cfg, world
        self.trainer = build_trainer(cfg, CPU, world)
        self.objective, self.optimizer, self.model = self.trainer.objective, self.trainer.optimizer, self.trainer.model
        self.trainer.scaler = torch.amp.GradScaler("cpu", enabled=self.trainer.scaler.is_enabled(), init_scale=2.0**4)
        self.model.train()

    def batch(self, step: int) -> Batch:
        """This rank's share: masks hide different numbers of patches on different ranks."""
        if self.cfg.MODEL.MODEL_NAME == "MFM":
            return Batch(torch.randn(4, 3, 32, 32), hidden=torch.rand(4, 1, 1) < 0.5)
        batch = golden_batch(self.cfg, 10 * step + self.world.rank, 4)
        if batch.hidden is None:
            return replace(batch, label=torch.arange(4) % self.cfg.MODEL.NUM_CLASSES)
        batch.hidden[0] &= torch.rand(batch.hidden[0].shape) < (0.3, 0.8)[self.world.rank % 2]
        return batch

    def step(self, step: int, spoil: bool = False) -> dict[str, float]:
        """One step; what it would log. `spoil`: with an infinity in the clips of rank 0 alone."""
        set_lr(self.optimizer, 1e-2)
        seed_everything(self.cfg.RNG_SEED, step, self.world.rank)
        batch = self.batch(step)
        if spoil and self.world.is_main:
            batch.clip[0] = float("inf")
        self.trainer.train_step(batch)
        return self.trainer.metrics.read()

    def weights(self) -> dict[str, Tensor]:
        """The whole weights, on every rank."""
        return full_state_dict(self.objective.released_state(), keep=True)

    def moments(self) -> dict[str, Any]:
        """The whole state of the optimizer, on every rank."""
        return full_optimizer_state_dict(self.optimizer, keep=True)

    def pieces(self) -> list[Tensor]:
        """Copies of what this rank holds of parameters and optimizer state."""
        return [local_shard(value).clone() for value in self.held()]

    def held(self) -> list[Tensor]:
        """Parameters and optimizer state."""
        parameters = list(self.objective.parameters())
        states = [self.optimizer.state[parameter] for parameter in parameters]
        return [*(p.detach() for p in parameters), *(state[slot] for state in states for slot in sorted(state))]

    def bytes(self) -> int:
        """Of what this rank holds."""
        return sum(local_shard(value).nbytes for value in self.held())


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if not one.is_floating_point():
        return float(not torch.equal(one, other))
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)) if one.numel() else 0.0


def overall(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The L2 norm of the difference of all weights, relative to theirs."""
    flat = [torch.cat([value.double().flatten() for value in state.values()]) for state in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def compare(world: World, recipe: tuple[Path, list[str]], opts: Sequence[str], steps: int = 3) -> dict[str, Any]:
    """The same steps both ways: the largest differences, and what each rank holds."""
    cfg = load_config(recipe[0], [*recipe[1], *opts])
    plain, sharded = (Steps(cfg, world, sharded=kind) for kind in (False, True))
    logged = [[trainer.step(step) for step in range(steps)] for trainer in (plain, sharded)]
    start = build_objective_state(cfg)
    a, b = sharded.weights(), plain.weights()
    names = {name for step in logged[0] for name in step}
    return {
        "cut": all(isinstance(p, DTensor) for p in sharded.objective.parameters()),
        "names": list(a) == list(b),
        "weights": overall(a, b),
        "worst": max(difference(a[name], b[name]) for name in b),
        "moved": max(difference(start[name], b[name]) for name in b),
        "logged": {
            name: max(
                abs(x[name] - y[name]) / max(abs(x[name]), 1e-30) for x, y in zip(*logged, strict=True) if x[name]
            )
            if any(x[name] for x in logged[0])
            else max(abs(y[name]) for y in logged[1])
            for name in names
        },
        "clipped": logged[1][-1]["clipped"],
        "loss": logged[1][-1]["loss"],
        "held": sharded.bytes() / plain.bytes(),
    }


def exchanged_once(world: World) -> dict[str, Any]:
    """Whether ranks have gradients of one another after a micro-batch that is not the last, and after the last."""
    cfg = load_config(VIT[0], VIT[1])
    trainer = Steps(cfg, world, sharded=True)
    found = []
    for last in (False, True):
        with gradient_sync(trainer.model, last):
            trainer.model(trainer.batch(0)).loss.backward()
        found.append(sum(p.grad is not None for p in trainer.objective.parameters()))
    return {"found": found, "all": len(list(trainer.objective.parameters()))}


def build_objective_state(cfg: CfgNode) -> dict[str, Tensor]:
    seed_everything(cfg.RNG_SEED)
    return build_objective(cfg).released_state()


def spoiled(world: World, opts: Sequence[str] = ()) -> dict[str, Any]:
    """A step with an infinity on one rank changes no bit on any; the next one is made."""
    trainer = Steps(load_config(VIT[0], [*VIT[1], *opts]), world, sharded=True)
    trainer.step(0)
    before = trainer.pieces()
    skipped = trainer.step(1, spoil=True)["skipped"]
    after = trainer.pieces()
    same = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    lost = trainer.step(2)["skipped"]
    moved = not all(torch.equal(x, y) for x, y in zip(before, trainer.pieces(), strict=True))
    return {"skipped": skipped, "same": same, "lost": lost, "moved": moved}


def handed_over(world: World, folder: Path) -> dict[str, Any]:
    """Whole states: of a sharded run into an unsharded one and back, and a copy to evaluate."""
    cfg = load_config(*VIT)
    sharded, plain, again = Steps(cfg, world, True), Steps(cfg, world, False), Steps(cfg, world, True)
    for step in range(2):
        sharded.step(step)
    weights, moments = sharded.weights(), sharded.moments()
    if world.is_main:
        torch.save({"model_state": weights, "optimizer_state": moments}, folder / "gathered.pyth")
    all_gather_object(None)  # wait for every rank
    content = torch.load(folder / "gathered.pyth", weights_only=True)
    for other in (plain, again):
        other.objective.load_released_state(content["model_state"])
        load_optimizer_state(other.optimizer, content["optimizer_state"])
    twin = gather_into(sharded.objective, build_objective(cfg)).eval()
    own = plain.optimizer.state_dict()
    equal = [
        all(torch.equal(twin.released_state()[name], value) for name, value in weights.items()),
        own["param_groups"] == moments["param_groups"],
        list(own["state"]) == list(moments["state"]),
        *(
            torch.equal(own["state"][n][slot], value)
            for n, slots in moments["state"].items()
            for slot, value in slots.items()
        ),
        *(torch.equal(x, y) for x, y in zip(sharded.pieces(), again.pieces(), strict=True)),
    ]
    losses = [trainer.step(2)["loss"] for trainer in (sharded, plain, again)]
    nothing = full_state_dict(sharded.objective.released_state(), keep=False)
    # One rank alone: what evaluates must not wait for the others.
    alone = twin(plain.batch(5)).loss.item() if world.is_main else 0.0
    return {"equal": all(equal), "count": len(equal), "losses": losses, "nothing": len(nothing), "alone": alone}


def writes_in_pieces(world: World, folder: Path) -> dict[str, Any]:
    """Two processes go on from a checkpoint of one, and write their own while they train."""
    trainer = Steps(load_config(*VIT), world, sharded=True)
    load_training(folder / "one.dcp", trainer.objective, trainer.optimizer)
    loss = trainer.step(1)["loss"]
    tensors = training_tensors(trainer.objective, trainer.optimizer)
    group = dist.new_group(backend="gloo")
    handle = save_sharded(folder / "two.dcp", tensors, {"epoch": 3}, group)
    before = trainer.pieces()
    following = trainer.step(2)["loss"]
    handle.wait()
    changed = not all(torch.equal(x, y) for x, y in zip(before, trainer.pieces(), strict=True))
    torch.save(before, folder / f"pieces.{world.rank}.pt")
    return {"loss": loss, "following": following, "changed": changed, "done": handle.done()}


def fails_in_pieces(world: World, folder: Path) -> dict[str, Any]:
    """A disk that is full for one process, and a file that is damaged for one: both are said by both."""
    tensors = {"model.a": torch.arange(6.0), "model.b": torch.full((3,), float(world.rank))}
    group = dist.new_group(backend="gloo")
    target = folder / "fails.dcp"
    save_sharded(target, tensors, {"epoch": 1}, group).wait()
    found: dict[str, Any] = {}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(dcp.FileSystemWriter, "write_data", full)
        handle = save_sharded(target, tensors, {"epoch": 2}, group)
        try:
            handle.wait()
        except OSError as error:
            found["full"] = str(error)
    found["kept"] = read_sharded_plain(target)["epoch"]
    all_gather_object(None)  # wait for every rank
    found["left"] = sorted(path.name for path in folder.glob("*fails*")) + sorted(
        p.name for p in folder.glob(".*fails*")
    )
    all_gather_object(None)  # the next save makes files of its own
    save_sharded(target, tensors, {"epoch": 4}, group).wait()
    found["next"] = read_sharded_plain(target)["epoch"]
    all_gather_object(None)  # wait for every rank
    if world.is_main:
        path = next(target.glob("__*"))
        path.write_bytes(path.read_bytes()[:-1])
    all_gather_object(None)  # wait for every rank
    kept = {name: torch.zeros_like(value) for name, value in tensors.items()}
    try:
        load_sharded(target, kept, group)
    except ValueError as error:
        found["damaged"] = str(error)
    found["touched"] = any(bool(value.any()) for value in kept.values())
    return found


def back_to_one_and_two(world: World, folder: Path, address: str) -> dict[str, Any]:
    """What two wrote is read and written by one alone, and read by two again."""
    cfg = load_config(*VIT)
    if world.is_main:
        alone = Steps(cfg, World(), sharded=False)
        load_training(folder / "two.dcp", alone.objective, alone.optimizer)
        save_sharded(folder / "alone.dcp", training_tensors(alone.objective, alone.optimizer), {}).wait()
    init_process_group(world, "gloo", CPU, address)
    trainer = Steps(cfg, world, sharded=True)
    load_training(folder / "alone.dcp", trainer.objective, trainer.optimizer)
    pieces = torch.load(folder / f"pieces.{world.rank}.pt")
    same = [torch.equal(x, y) for x, y in zip(trainer.pieces(), pieces, strict=True)]
    return {"same": all(same), "count": len(same), "following": trainer.step(2)["loss"]}


def all_cases(world: World, init_method: str, folder: str, address: str) -> int:
    """Run everything; every rank writes what came out of each, or the traceback."""
    torch.set_num_threads(1)
    init_process_group(world, "gloo", CPU, init_method)
    place = Path(folder)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        # Batch norms over the few values of so small a picture make much of a last bit: one step of a ResNet.
        name: lambda recipe=recipe, opts=opts: compare(world, recipe, opts, steps=1 if recipe is RESNET else 3)
        for name, (recipe, opts) in CASES.items()
    }
    jobs["spoiled"] = lambda: spoiled(world)
    jobs["spoiled in fp16"] = lambda: spoiled(world, ["TRAIN.MIXED_PRECISION", "fp16"])
    jobs["exchanged once"] = lambda: exchanged_once(world)
    jobs["handed over"] = lambda: handed_over(world, place)
    jobs["writes in pieces"] = lambda: writes_in_pieces(world, place)
    jobs["fails in pieces"] = lambda: fails_in_pieces(world, place)
    for name, job in jobs.items():
        _note(place / f"{name}.{world.rank}.json", job)
    all_gather_object(None)  # wait for every rank
    destroy_process_group()
    _note(place / f"back to one and two.{world.rank}.json", lambda: back_to_one_and_two(world, place, address))
    destroy_process_group()
    return 0


def _note(path: Path, job: Callable[[], dict[str, Any]]) -> None:
    began = time.perf_counter()
    try:
        found = {**job(), "seconds": time.perf_counter() - began}
    except Exception:
        found = {"error": traceback.format_exc()}
    path.write_text(json.dumps(found))
