"""The training loop: fetch, step, log, save, validate. It knows nothing about the pre-training method."""

from maskfeat.checkpoint.files import Position
from maskfeat.data.loader import BatchLoader
from maskfeat.distributed.collectives import FlagExchange
from maskfeat.distributed.hang_watchdog import HangWatchdog
from maskfeat.distributed.preemption import Preempted, StopRequest
from maskfeat.engine.metrics_log import MetricsLog
from maskfeat.engine.pictures import Pictures
from maskfeat.engine.progress import ProgressMeter
from maskfeat.engine.saver import Saver
from maskfeat.engine.trainer import Trainer
from maskfeat.engine.validation import Validator
from maskfeat.errors import NotFinite


def train(
    trainer: Trainer,
    loader: BatchLoader,
    saver: Saver,
    validator: Validator,
    pictures: Pictures,
    metrics_log: MetricsLog,
    watchdog: HangWatchdog,
    stop: StopRequest,
    *,
    log_period: int = 10,
    max_skipped: int = 20,
) -> None:
    """Train from `trainer.position` to `trainer.max_epoch`. Every rank calls it.

    Args:
        loader: batches of this rank.
        saver: decides when a checkpoint is due, and writes it.
        validator: decides after which epochs to validate, and does so.
        pictures: decides after which epochs to draw predictions, and does so.
        watchdog: receives a heartbeat at every step.
        stop: whether this process was asked to stop.
        log_period: steps between two progress lines.
        max_skipped: steps in a row whose loss or gradient may not be finite before training stops.

    Raises:
        Preempted: the run was asked to stop; the state has been saved.
        NotFinite: `max_skipped` steps in a row were skipped, or what was to be saved is not finite.
    """
    steps = len(loader)
    trainer.samples_per_step = loader.batch_size * trainer.world.size
    progress = ProgressMeter(metrics_log, trainer, steps, log_period)
    flags = FlagExchange()
    for epoch in range(trainer.position.epochs, trainer.max_epoch):
        trainer.model.train()
        loader.set_epoch(epoch)
        loader.set_start(trainer.position.step)
        progress.start_waiting()
        for batch in loader:
            progress.fetched(len(batch) * trainer.world.size)
            step = trainer.position.step + 1
            watchdog.beat(f"epoch {epoch + 1}, step {step}")
            lr = trainer.begin_step(steps)
            trainer.train_step(batch.to(trainer.device, non_blocking=True))
            trainer.position = Position(epoch, step)
            if progress.is_due:
                progress.write(lr)
                _check_skipped(trainer, steps, max_skipped)
            watchdog.beat(f"epoch {epoch + 1}, done with step {step}")
            saver.poll()
            stops, asked = flags.exchange(int(bool(stop)), saver.asks_for)
            # At the end of an epoch the position says that its validation is still to be done.
            if stops or saver.owes(asked):
                with progress.paused():
                    saver.save(must=bool(stops))
            if stops:
                raise Preempted(stop.reason or "a signal to another process")
            watchdog.beat(f"epoch {epoch + 1}, waiting for data after step {step}")
            progress.start_waiting()
        with progress.paused():
            if saver.is_epoch_due(epoch):
                trainer.position = Position(epoch + 1)
                saver.save(must=epoch + 1 == trainer.max_epoch)
            elif validator.is_due(epoch):
                saver.save()  # so that validation can be interrupted
            if validator.is_due(epoch):
                validator.run(epoch)
            if pictures.is_due(epoch):
                pictures.draw(epoch)
        trainer.position = Position(epoch + 1)
    progress.line.close()


def _check_skipped(trainer: Trainer, steps: int, most: int) -> None:
    """Raise NotFinite where too many steps in a row were skipped; called right after metrics were read."""
    streak, ago = trainer.skipped.read()
    if streak >= most:
        epoch, step = divmod(trainer.position.epochs * steps + trainer.position.step - 1 - ago, steps)
        raise NotFinite(
            f"{streak} steps in a row, from epoch {epoch + 1}, step {step + 1} on, had a loss or gradients that are "
            f"not finite and were skipped (TRAIN.MAX_SKIPPED_STEPS {most}): try a lower SOLVER.BASE_LR, "
            "SOLVER.CLIP_GRAD_L2NORM, or TRAIN.MIXED_PRECISION bf16"
        )
