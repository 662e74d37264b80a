"""Exponential moving average of the weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class ModelEma(Generic[Module]):
    """Exponential moving average of a module's parameters and buffers, updated after every step that was made.

    average <- decay * average + (1 - decay) * value, beginning with the values after the first step. Integer buffers
    are copied.

    Args:
        module: the module in training, on its device. It is deep-copied.
        decay: in (0, 1).

    Attributes:
        module: the module with averaged values, in evaluation mode.
    """

    def __init__(self, module: Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._decay = decay
        self._averages, self._integers = self._values(self.module)
        self._sources, self._source_integers = self._values(module)
        self._started = torch.zeros((), device=self._averages[0].device)  # 1 as soon as there is an average

    @staticmethod
    def _values(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and buffers: those to average, and those with integer values."""
        values: list[Tensor] = [*module.parameters(), *module.buffers()]
        return [v for v in values if v.is_floating_point()], [v for v in values if not v.is_floating_point()]

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Update the average after a step.

        Args:
            skipped: scalar float32 on the device, 1 where the step was skipped: the average then stays as it is.
        """
        made = 1.0 - skipped
        weight = made * (1.0 - self._decay * self._started)
        self._started = torch.maximum(self._started, made)
        difference = torch._foreach_sub(self._sources, self._averages)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(self._averages, difference)
        for average, source in zip(self._integers, self._source_integers, strict=True):
            average.copy_(source)

    def resume(self) -> None:
        """Continue the average that `module` now holds, instead of beginning with the values after the next step."""
        self._started.fill_(1.0)
