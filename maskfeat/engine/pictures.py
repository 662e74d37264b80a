"""Pictures of what an objective predicts, during training: of the same samples each time."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from maskfeat.data.loader import BatchLoader
from maskfeat.engine.metrics_log import MetricsLog
from maskfeat.engine.parallelize import autocast
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.trainer import Trainer
from maskfeat.objectives.base import Objective
from maskfeat.pictures import Row, predictions_figure

logger = logging.getLogger(__name__)

FOLDER = "pictures"
"""Below OUTPUT_DIR."""


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # a single sample would compile the blocks anew
def predicted_rows(
    objective: Objective,
    loader: BatchLoader,
    number: int,
    mean: Sequence[float],
    std: Sequence[float],
    precision: str = "off",
) -> list[Row]:
    """Predict samples that are spread evenly over a data set; those that cannot be read are left out.

    Args:
        objective: on the device of the loader; left in evaluation mode.
        number: of samples.
        mean, std: of the loader's normalisation.
        precision: of the forward pass, "off", "bf16" or "fp16".
    """
    objective.eval()
    chosen = np.unique(np.linspace(0, len(loader.labels) - 1, number).round().astype(int))
    rows: list[Row] = []
    for batch in loader.iter_samples(chosen.tolist()):
        with autocast(batch.clip.device, precision):
            rows.extend(objective.picture_rows(batch, mean, std))
    return rows


class Pictures:
    """Draw predictions after some of the epochs, into OUTPUT_DIR/pictures and TensorBoard.

    Args:
        trainer: whose objective predicts.
        loader: of the samples, on the trainer's device; None = nothing is drawn.
        period: epochs between two pictures; the first is drawn after the first epoch, one more after the last.
        number: of samples.
        objectives: see `Validator.objectives`.
        folder: of the files.
        task: first part of their names, "" = none.
        mean, std: of the loader's normalisation.
        precision: of the forward pass.
    """

    def __init__(
        self,
        trainer: Trainer,
        loader: BatchLoader | None,
        period: int,
        number: int,
        objectives: Callable[[], dict[str, Objective]],
        metrics_log: MetricsLog,
        folder: Path,
        task: str,
        mean: Sequence[float],
        std: Sequence[float],
        precision: str,
    ) -> None:
        self._trainer, self._loader, self._period, self._number = trainer, loader, period, number
        self._objectives, self._metrics_log, self._folder, self._task = objectives, metrics_log, folder, task
        self._mean, self._std, self._precision = mean, std, precision
        self._failed = False

    def is_due(self, epoch: int) -> bool:
        """Return whether to draw after `epoch`, counted from 0."""
        if self._loader is None:
            return False
        return epoch == 0 or (epoch + 1) % self._period == 0 or epoch + 1 == self._trainer.max_epoch

    def draw(self, epoch: int) -> None:
        """Draw the predictions of the weights; collective. What cannot be written is a warning, once."""
        objective = self._objectives()[""]
        if not self._trainer.world.is_main:
            return
        assert self._loader is not None
        seed_everything(self._trainer.seed)  # what an objective samples for a picture is the same each time
        rows = predicted_rows(objective, self._loader, self._number, self._mean, self._std, self._precision)
        if not rows:
            return
        figure = predictions_figure(rows, f"after epoch {epoch + 1}")
        self._metrics_log.picture("predictions", figure, epoch)
        path = self._folder / f"{self._task + '_' if self._task else ''}epoch_{epoch + 1:05d}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.save(path)
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.warning("%s cannot be written (%s)", path, error)
            self._failed = True
