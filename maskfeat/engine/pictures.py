"""Pictures of what an objective predicts, during training: of the same samples each time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

from maskfeat.data.loader import BatchLoader
from maskfeat.engine.log_handlers import WarnOnce
from maskfeat.engine.metrics_log import MetricsLog
from maskfeat.engine.parallelize import autocast
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.trainer import Trainer, precision_of
from maskfeat.objectives.base import Objective
from maskfeat.pictures import Row, predictions_figure


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

    They are drawn every VIS.PERIOD epochs, and after the first and the last one.

    Args:
        cfg: VIS.*, DATA.MEAN and DATA.STD, TEST.MIXED_PRECISION, OUTPUT_DIR and TASK.
        trainer: whose objective predicts.
        loader: of the samples, on the trainer's device; None = nothing is drawn.
        objectives: see `Validator.objectives`.
        metrics_log: which writes to TensorBoard.
    """

    def __init__(
        self,
        cfg: CfgNode,
        trainer: Trainer,
        loader: BatchLoader | None,
        objectives: Callable[[], dict[str, Objective]],
        metrics_log: MetricsLog,
    ) -> None:
        self._cfg, self._trainer, self._loader = cfg, trainer, loader
        self._objectives, self._metrics_log, self._once = objectives, metrics_log, WarnOnce()

    def is_due(self, epoch: int) -> bool:
        """Return whether to draw after `epoch`, counted from 0."""
        if self._loader is None:
            return False
        return epoch == 0 or (epoch + 1) % self._cfg.VIS.PERIOD == 0 or epoch + 1 == self._trainer.max_epoch

    def draw(self, epoch: int) -> None:
        """Draw the predictions of the weights; collective. What cannot be written is a warning, once."""
        objective, cfg = self._objectives()[""], self._cfg
        if not self._trainer.world.is_main:
            return
        assert self._loader is not None
        seed_everything(self._trainer.seed)  # what an objective samples for a picture is the same each time
        precision = precision_of(cfg.TEST)
        rows = predicted_rows(objective, self._loader, cfg.VIS.SAMPLES, cfg.DATA.MEAN, cfg.DATA.STD, precision)
        if not rows:
            return
        figure = predictions_figure(rows, f"after epoch {epoch + 1}")
        self._metrics_log.picture("predictions", figure, epoch)
        name = f"{cfg.TASK + '_' if cfg.TASK else ''}epoch_{epoch + 1:05d}.png"
        path = Path(cfg.OUTPUT_DIR) / "pictures" / name
        with self._once.writing(path, "%s cannot be written (%s)"):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.save(path)
