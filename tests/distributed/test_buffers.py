"""Ranks do not exchange buffers in every step: rank 0's are the same without, and all have them where it counts."""

from pathlib import Path

import pytest
import torch

from maskfeat.batch import Batch
from maskfeat.build import build_objective
from maskfeat.config import load_config
from maskfeat.distributed.collectives import (
    all_gather_object,
    broadcast_buffers,
    broadcast_from_main,
    destroy_process_group,
    init_process_group,
)
from maskfeat.distributed.launch import launch
from maskfeat.distributed.world import World
from maskfeat.engine.trainer import build_trainer
from tests.small import MFM_PT, MFM_RECIPES, RECIPES

CPU = torch.device("cpu")
STEPS = 3


def _train(world: World, exchange: bool) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """Some steps of a ResNet: rank 0's state, and whether each rank had rank 0's buffers before and after asking."""
    torch.manual_seed(1)
    cfg = load_config(MFM_RECIPES / "in1k_R50_MFM_PT.yaml", MFM_PT)
    trainer = build_trainer(cfg, CPU, world)
    assert isinstance(trainer.model, torch.nn.parallel.DistributedDataParallel)
    assert not trainer.model.broadcast_buffers
    trainer.model.train()
    draw = torch.Generator().manual_seed(100 + world.rank)
    for _ in range(STEPS):
        if exchange:
            broadcast_buffers(trainer.objective)  # PyTorch's default
        hidden = torch.ones(8, 1, 1, dtype=torch.bool)
        trainer.train_step(Batch(torch.randn(8, 3, 32, 32, generator=draw), hidden=hidden, max_hidden=1))
    same = []
    for _ in range(2):
        buffers = all_gather_object(torch.cat([b.flatten().float() for b in trainer.objective.buffers()]))
        same.append(all(torch.equal(theirs, buffers[0]) for theirs in buffers))
        broadcast_buffers(trainer.objective)
    state = {name: value.clone() for name, value in trainer.objective.state_dict().items()}
    return state, same


@pytest.mark.parametrize("place", sorted(path.name for path in [*RECIPES.glob("*.yaml"), *MFM_RECIPES.glob("*.yaml")]))
def test_tensors_are_as_nccl_takes_them(place: str) -> None:
    """Contiguous: gloo takes others, too, so that no run on the CPU would tell."""
    folder = RECIPES if (RECIPES / place).exists() else MFM_RECIPES
    with torch.device("meta"):
        objective = build_objective(load_config(folder / place))
    tensors = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
    assert not [name for name, value in tensors.items() if not value.is_contiguous()]


def test_a_tensor_of_a_plugin_may_lie_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(value: torch.Tensor, src: int) -> None:
        assert src == 0 and value.is_contiguous(), "NCCL: Tensors must be contiguous"
        value.fill_(3.0)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    for value in (torch.zeros(4, 3).T, torch.zeros(3, 4), torch.nn.Parameter(torch.zeros(2, 2).T)):
        broadcast_from_main(value)
        assert (value == 3).all()


def job(world: World, init_method: str, folder: str) -> int:
    init_process_group(world, "gloo", CPU, init_method)
    (plain, same), (exchanged, _) = _train(world, exchange=False), _train(world, exchange=True)
    assert same == [False, True], same
    assert all(torch.equal(plain[name], value) for name, value in exchanged.items())
    assert any("running_mean" in name for name in plain)
    destroy_process_group()
    if world.is_main:
        (Path(folder) / "done").touch()
    return 0


@pytest.mark.slow
def test_rank_0_is_the_same_without_the_exchange(tmp_path: Path) -> None:
    assert launch(job, (str(tmp_path),), processes=2) == 0
    assert (tmp_path / "done").exists()
