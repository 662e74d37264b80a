"""Memory of one optimization step, estimated without computing it: on fake tensors, which have shapes but no values.

The step is the trainer's own. A dispatch mode sees every tensor that an operator returns, and learns when its memory is
released.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from yacs.config import CfgNode

from maskfeat.batch import Batch, most_hidden
from maskfeat.build import build_mask_sampler, build_objective
from maskfeat.data.rng import MASK_STREAM, sample_generator
from maskfeat.engine.trainer import CPU, build_trainer


class StepMemory(NamedTuple):
    """Bytes that the tensors of one process take in an optimization step.

    Attributes:
        parameters: weights and buffers, and their moving average.
        gradients: of all weights.
        optimizer: its state: two values per weight for AdamW, one for SGD.
        activations: what forward and backward pass add at their highest, with the gradients that are there by then.
        batch: the input.
        total: the most at once, in the passes or in the update of the weights.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    batch: int
    total: int


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return in this context, until their memory is released.

    Attributes:
        now, peak: bytes at present, and the most at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:  # otherwise a view, or changed in place
            size = self._known[storage] = storage.nbytes()
            weakref.finalize(storage, self._release, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _release(self, size: int) -> None:
        self.now -= size


def estimate_step_memory(cfg: CfgNode, batch_size: int, device: torch.device = CPU) -> StepMemory:
    """Estimate the memory of an optimization step of one process; nothing is computed, and little memory is needed.

    Precision, activation checkpointing, micro-batches, optimizer and moving average are those of the config. The model
    is taken as not sharded and not compiled, which both need less. Not counted: what libraries use for themselves
    (workspace of convolutions), what the allocator keeps for later, and what a GPU takes before the first tensor.

    Args:
        batch_size: samples a step of one process; each view of a sample counts as one.
        device: whose operators are assumed. CUDA needs a CUDA device; where there is none, the CPU stands for it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    averages, cfg.TRAIN.EMA = bool(cfg.TRAIN.EMA), 0.0  # fake tensors cannot be copied: counted below
    cfg.TRAIN.COMPILE, cfg.TRAIN.PARALLEL = False, "ddp"
    with torch.device("meta"):  # fake tensors cannot be initialised
        objective = build_objective(cfg)
    masks = _masks(cfg, batch_size)
    with FakeTensorMode(), torch.device(device), LiveMemory() as live:
        _make_fake(objective)
        parameters = live.now
        batch = _input(objective.backbone.clip_size, batch_size, masks)
        if cfg.DATA.MULTI_LABEL:
            batch.label = torch.empty(batch_size, cfg.MODEL.NUM_CLASSES)
        size = live.now - parameters
        trainer = build_trainer(cfg, batch.clip.device, objective=objective)  # with its index
        passes: list[int] = []
        trainer.optimizer.register_step_pre_hook(lambda *_: passes.append(live.peak))
        trainer.train_step(batch)
        states = trainer.optimizer.state.values()
        optimizer = sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))
        gradients = sum(p.grad.nbytes for p in objective.parameters() if p.grad is not None)
    activations = passes[0] - parameters - size
    average = parameters if averages else 0
    kept = parameters + average + optimizer + size
    # The update of the average takes as much again for a while, see `ModelEma`.
    total = kept + max(activations, gradients + average)
    return StepMemory(parameters + average, gradients, optimizer, activations, size, total)


def _make_fake(module: nn.Module) -> None:
    """Replace parameters and buffers on the meta device, in place, by new ones on the device that is set."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _masks(cfg: CfgNode, batch_size: int) -> list[np.ndarray]:
    """Return masks of a batch as the loader draws them, each (*mask_grid) bool; none where nothing is hidden."""
    sampler = build_mask_sampler(cfg)
    if sampler is None:
        return []
    return [sampler(sample_generator(cfg.RNG_SEED, 0, index, 0, MASK_STREAM)) for index in range(batch_size)]


def _input(clip_size: Sequence[int], batch_size: int, masks: Sequence[np.ndarray]) -> Batch:
    """Return a batch without values on the device that is set."""
    return Batch(
        clip=torch.empty(batch_size, 3, *clip_size),
        label=torch.empty(batch_size, dtype=torch.int64),
        hidden=torch.empty(batch_size, *masks[0].shape, dtype=torch.bool) if masks else None,
        index=torch.empty(batch_size, dtype=torch.int64),
        max_hidden=most_hidden(masks),
    )
