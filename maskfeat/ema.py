"""An average of the weights over training, kept beside the model."""

from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from maskfeat.objectives.base import Objective


class WeightAverage:
    """Exponential moving average of an objective's parameters and buffers, taken after every optimisation step.

    After a step the average becomes decay x itself + (1 - decay) x the weights; the first step's weights begin it.

    Args:
        objective: on its device; it is copied.
        optimizer: whose steps are followed.
        decay: 0 to 1, exclusive.
    """

    def __init__(self, objective: Objective, optimizer: Optimizer, decay: float) -> None:
        self._model = AveragedModel(objective, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self._model.requires_grad_(False)
        self._source = objective
        optimizer.register_step_post_hook(self._follow)

    def _follow(self, *_: Any) -> None:
        self._model.update_parameters(self._source)

    @property
    def objective(self) -> Objective:
        """The objective with averaged weights."""
        return cast(Objective, self._model.module)

    def begin_with(self, state: "dict[str, torch.Tensor] | None") -> None:
        """Go on from an average with released names; None = start with the objective's own weights."""
        self.objective.load_released_state(self._source.released_state() if state is None else state)
        # From here on weights are averaged in, rather than taken over as at a first step.
        self._model.n_averaged.fill_(1)
