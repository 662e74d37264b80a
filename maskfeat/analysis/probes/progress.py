"""Progress of long work as log lines."""

import logging
import time

from maskfeat.engine.metrics_log import format_eta

logger = logging.getLogger(__name__)

_SECONDS = 30.0


class Progress:
    """Log now and then how far something is, and how long it still takes.

    Args:
        what: it is, in words.
        steps: of all of it.
        done: steps that need not be done any more.
    """

    def __init__(self, what: str, steps: int, done: int = 0) -> None:
        self.what, self.steps, self.begun = what, steps, done
        self.started = self.said = time.perf_counter()

    def step(self, done: int) -> None:
        """Note that `done` steps are done."""
        now = time.perf_counter()
        if now - self.said > _SECONDS:
            self.said = now
            left = (now - self.started) / (done - self.begun) * (self.steps - done)
            logger.info("%s  %d/%d  eta %s", self.what, done, self.steps, format_eta(left))
