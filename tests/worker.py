"""Jobs that tests run in processes of their own."""

from pathlib import Path

from yacs.config import CfgNode

from maskfeat.distributed import World, launch
from maskfeat.run import work


def run_in_processes(cfg: CfgNode, processes: int) -> None:
    """A whole run, in `processes` CPU processes that meet over gloo."""
    launch(work, (cfg,), processes=processes)


def losses(output_dir: Path, kind: str = "train_iter") -> list[float]:
    """The losses that a run logged."""
    return [float(stats["loss"]) for stats in json_stats(output_dir, kind)]


def json_stats(output_dir: Path, kind: str) -> list[dict[str, object]]:
    """The `json_stats:` lines of one kind in a run's log."""
    import json

    marker = "json_stats: "
    lines = (output_dir / "stdout.log").read_text().splitlines()
    stats = [json.loads(line.split(marker, 1)[1]) for line in lines if marker in line]
    return [entry for entry in stats if entry["_type"] == kind]


__all__ = ["World", "json_stats", "losses", "run_in_processes"]
