"""What the tests of collectives run in two processes."""

import json
from pathlib import Path

import torch

from maskfeat.batch import Batch
from maskfeat.config import load_config
from maskfeat.distributed.collectives import FlagExchange, destroy_process_group, init_process_group
from maskfeat.distributed.world import World
from maskfeat.engine.trainer import build_trainer
from tests.small import RECIPES, VIT_PT

CPU = torch.device("cpu")


def batch(rows: slice) -> Batch:
    """Some rows of a batch of 4 whose masks hide 1 to 4 of 4 patches: ranks have different numbers of terms."""
    clip = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    hidden = torch.tril(torch.ones(4, 4, dtype=torch.bool)).reshape(4, 2, 2)
    return Batch(clip[rows], hidden=hidden[rows])


def gradients(world: World, rows: slice) -> dict[str, list[float]]:
    """The gradient of one step on these rows, before it is clipped and applied."""
    torch.manual_seed(0)
    opts = [*VIT_PT, "SOLVER.CLIP_GRAD_L2NORM", "None", "SOLVER.CLIP_GRAD_VAL", "None"]
    trainer = build_trainer(load_config(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", opts), CPU, world)
    trainer.model.eval()
    trainer.train_step(batch(rows))
    params = trainer.objective.named_parameters()
    return {
        name: [param.grad.norm().item(), param.grad.sum().item()] for name, param in params if param.grad is not None
    }


def flags() -> list[list[bool]]:
    """Rank 1 alone raises the first flag, at step 1; both raise the second, at step 2."""
    rank, exchange = torch.distributed.get_rank(), FlagExchange()
    return [list(exchange.exchange(rank == 1 and step == 1, step == 2)) for step in range(5)]


def all_cases(world: World, init_method: str, folder: str) -> int:
    """Run everything; every rank writes what came out."""
    torch.set_num_threads(1)
    init_process_group(world, "gloo", CPU, init_method)
    share = slice(3 * world.rank, 3 + world.rank)  # three rows and one
    found = {"flags": flags(), "gradients": gradients(world, share)}
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(found))
    destroy_process_group()
    return 0
