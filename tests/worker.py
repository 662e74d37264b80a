"""Jobs that tests run in processes of their own."""

from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from maskfeat.distributed.launch import launch
from maskfeat.engine.metrics_log import read_json_stats
from maskfeat.engine.run import work
from maskfeat.engine.setup import CommandLine


def run_in_processes(cfg: CfgNode, processes: int) -> None:
    """A whole run, in `processes` CPU processes that meet over gloo."""
    given = CommandLine("", ())
    assert launch(work, (cfg, given), processes=processes) == 0


def losses(output_dir: Path, kind: str = "train_iter") -> list[float]:
    """The losses that a run logged."""
    return [float(stats["loss"]) for stats in json_stats(output_dir, kind)]


def json_stats(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The `json_stats:` lines of one kind in a run's log."""
    return read_json_stats(output_dir / "stdout.log", kind)


__all__ = ["json_stats", "losses", "run_in_processes"]
