"""What hangs on an optimizer's steps: an average of the weights, running statistics that a lost step leaves alone, and
how many were lost in a row.

A step whose gradient is not finite is skipped on the device: `found_inf` of the optimizer is 1 then, and nobody waits
to read it.
"""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

Module = TypeVar("Module", bound=nn.Module)


def _lost(optimizer: Optimizer) -> Tensor | None:
    """Scalar float32 on the device: 1 where the step just made was skipped; None where steps are not checked."""
    found = getattr(optimizer, "found_inf", None)
    return None if found is None else found.reshape(())


class SkippedStepCounter:
    """Counts, on the device, how many steps in a row were skipped.

    Args:
        optimizer: whose steps are followed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        device = optimizer.param_groups[0]["params"][0].device
        # Since the last reading: steps tried, the longest row, and the step that it ended at; and the row up to now.
        self._since = torch.zeros(3, device=device)
        self._row = torch.zeros((), device=device)
        optimizer.register_step_post_hook(self._count)

    @torch.no_grad()
    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        lost = _lost(optimizer)
        if lost is None:
            return
        self._row = (self._row + 1) * lost
        tried, longest, ended = self._since.unbind()
        ended = torch.where(self._row > longest, tried + 1, ended)
        self._since = torch.stack([tried + 1, torch.maximum(self._row, longest), ended])

    def read(self) -> tuple[int, int]:
        """The longest row since the last reading (it may have begun before that), and how many steps before the last
        one it began. Waits for the device: to be called where that was just done anyway.
        """
        tried, longest, ended = (int(value) for value in self._since.tolist())
        self._since = torch.zeros_like(self._since)
        return longest, tried - ended + longest - 1


def restore_statistics_of_skipped_steps(objective: nn.Module, optimizer: Optimizer) -> None:
    """Where a step is skipped, put the running statistics of batch norms back as they were before its forward pass.

    One batch with an infinity in it would otherwise spoil every later evaluation.
    """
    norms = [module for module in objective.modules() if isinstance(module, _BatchNorm)]
    values = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    if not values:
        return
    before: list[Tensor] = []

    def keep(module: nn.Module, _: Any) -> None:
        """Before a forward pass."""
        if module.training and not before:  # the first micro-batch of a step
            before.extend((torch.cat(values), torch.stack(counts)))

    @torch.no_grad()
    def restore(optimizer: Optimizer, *_: Any) -> None:
        """After a step, made or skipped."""
        lost = _lost(optimizer)
        if lost is not None and before:
            chosen = torch.where(lost > 0, before[0], torch.cat(values))
            torch._foreach_copy_(values, list(chosen.split([value.numel() for value in values])))
            torch._foreach_copy_(counts, list(torch.where(lost > 0, before[1], torch.stack(counts)).unbind()))
        before.clear()

    objective.register_forward_pre_hook(keep)
    optimizer.register_step_post_hook(restore)


class ModelEma(Generic[Module]):
    """Exponential moving average of an objective's parameters and buffers, taken after every step that is made.

    Then the average becomes decay x itself + (1 - decay) x the weights; the first step's weights begin it. Whole
    numbers are taken over.

    Args:
        objective: on its device; it is copied.
        optimizer: whose steps are followed.
        decay: 0 to 1, exclusive.

    Attributes:
        objective: the objective with averaged weights, in evaluation mode.
    """

    def __init__(self, objective: Module, optimizer: Optimizer, decay: float) -> None:
        self.objective = copy.deepcopy(objective).eval().requires_grad_(False)
        self._decay = decay
        self._mine, self._my_counts = self._values(self.objective)
        self._theirs, self._their_counts = self._values(objective)
        self._begun = torch.zeros((), device=self._mine[0].device)  # 1 as soon as there is an average
        optimizer.register_step_post_hook(self._follow)

    @staticmethod
    def _values(objective: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and buffers: those to average, and whole numbers."""
        values: list[Tensor] = [*objective.parameters(), *objective.buffers()]
        return [v for v in values if v.is_floating_point()], [v for v in values if not v.is_floating_point()]

    @torch.no_grad()
    def _follow(self, optimizer: Optimizer, *_: Any) -> None:
        lost = _lost(optimizer)
        made = torch.ones_like(self._begun) if lost is None else 1.0 - lost
        share = made * (1.0 - self._decay * self._begun)
        self._begun = torch.maximum(self._begun, made)
        difference = torch._foreach_sub(self._theirs, self._mine)
        torch._foreach_mul_(difference, share)
        torch._foreach_add_(self._mine, difference)
        for mine, theirs in zip(self._my_counts, self._their_counts, strict=True):
            mine.copy_(theirs)

    def resume(self) -> None:
        """Go on from the average that `objective` now holds, rather than begin with the weights of the next step."""
        self._begun.fill_(1.0)
