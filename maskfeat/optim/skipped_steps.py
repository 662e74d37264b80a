"""Steps with a gradient that is not finite: they are skipped on the device, without a host-device synchronization."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


@contextmanager
def skip_step_if(skipped: Tensor, optimizer: Optimizer) -> Iterator[None]:
    """Make `optimizer.step()` in this block leave parameters and optimizer state as they are where `skipped` is 1.

    Fused kernels read `found_inf` on the device; torch.amp.GradScaler uses the same attribute. Fused SGD allocates
    momentum buffers without writing to them, and a skipped step never does: a buffer that a skipped step creates is set
    to zero, or the next step would add whatever lay in that memory.

    Args:
        skipped: scalar float32 on the parameters' device, 0 or 1.
        optimizer: with fused kernels.
    """
    with_momentum = optimizer.param_groups if optimizer.defaults.get("momentum") else []
    parameters = [p for group in with_momentum for p in group["params"] if p.grad is not None]
    new = [p for p in parameters if optimizer.state.get(p, {}).get("momentum_buffer") is None]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in new:
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                buffer.copy_(torch.where(skipped > 0, torch.zeros_like(buffer), buffer))


class SkippedStepCounter:
    """Count, on the device, how many steps in a row were skipped.

    Args:
        device: the device of `skipped`.
    """

    def __init__(self, device: torch.device) -> None:
        # Since the last reading: number of steps, longest streak, step at which it ended. And the current streak.
        self._since = torch.zeros(3, device=device)
        self._streak = torch.zeros((), device=device)

    @torch.no_grad()
    def count(self, skipped: Tensor) -> None:
        """Count one step; `skipped` is a scalar float32, 0 or 1."""
        self._streak = (self._streak + 1) * skipped
        steps, longest, ended = self._since.unbind()
        ended = torch.where(self._streak > longest, steps + 1, ended)
        self._since = torch.stack([steps + 1, torch.maximum(self._streak, longest), ended])

    def read(self) -> tuple[int, int]:
        """Return the longest streak since the last reading (it may have begun before that), and how many steps before
        the last one it began. Synchronizes with the device: call it where that has just been done anyway.
        """
        steps, longest, ended = (int(value) for value in self._since.tolist())
        self._since = torch.zeros_like(self._since)
        return longest, steps - ended + longest - 1


class BatchNormGuard:
    """Restore the running statistics of batch norms from before the forward pass of a skipped step.

    A single batch that contains an infinity would otherwise ruin every later evaluation.

    Args:
        module: the module in training; a forward pre-hook saves its statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        self._values = [v for norm in norms for v in (norm.running_mean, norm.running_var) if v is not None]
        self._counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self._saved: list[Tensor] = []
        if self._values:
            module.register_forward_pre_hook(self._save)

    def _save(self, module: nn.Module, _: object) -> None:
        if module.training and not self._saved:  # the first micro-batch of a step
            self._saved = [torch.cat(self._values), torch.stack(self._counts)]

    @torch.no_grad()
    def restore(self, skipped: Tensor) -> None:
        """Restore the statistics after a step where `skipped` (scalar float32) is 1."""
        if self._saved:
            values, counts = self._saved
            chosen = torch.where(skipped > 0, values, torch.cat(self._values))
            torch._foreach_copy_(self._values, list(chosen.split([value.numel() for value in self._values])))
            chosen = torch.where(skipped > 0, counts, torch.stack(self._counts))
            torch._foreach_copy_(self._counts, list(chosen.unbind()))
        self._saved = []
