"""`maskfeat submit`: what is asked of Slurm, and that the job finds its program in a fresh interpreter."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskfeat import cli
from maskfeat.distributed.slurm import Job
from tests.small import REPO

submitit = pytest.importorskip("submitit")


class Executor:
    """Takes what submitit's own would, and puts the job into a file as that one does."""

    made: dict[str, Any] = {}

    def __init__(self, folder: Path, max_num_timeout: int) -> None:
        self.folder = folder

    def update_parameters(self, **parameters: Any) -> None:
        Executor.made = parameters

    def submit(self, job: Any) -> SimpleNamespace:
        from submitit.core.utils import DelayedSubmission

        path = Path(str(self.folder).replace("%j", "1")).with_suffix(".pkl")
        path.parent.mkdir(parents=True, exist_ok=True)
        DelayedSubmission(job).dump(path)
        return SimpleNamespace(job_id="1", paths=SimpleNamespace(stdout=path))


def submitted(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.setattr(submitit, "SlurmExecutor", Executor)
    assert cli.main(["submit", *arguments]) == 0
    said = capsys.readouterr().out
    assert said.startswith("job 1, log ")
    return Path(said.removeprefix("job 1, log ").strip())


def test_what_is_asked_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = ["--logs", str(tmp_path)]
    submitted(["--nodes", "2", "--gpus", "4", *logs, "--cfg", "x"], monkeypatch, capsys)
    made = Executor.made
    assert (made["nodes"], made["gpus_per_node"], made["ntasks_per_node"], made["exclusive"]) == (2, 4, 1, True)
    assert made["additional_parameters"] == {"requeue": True} and "partition" not in made
    submitted(["--gpus", "0", "--cpus", "3", "--partition", "p", *logs, "--cfg", "x"], monkeypatch, capsys)
    made = Executor.made
    assert made["cpus_per_task"] == 3 and made["partition"] == "p" and "gpus_per_node" not in made


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [(["NUM_GPUS", "3"], 3), (["NUM_GPUS=0"], None), ([], 8), (["--gpus", "2", "NUM_GPUS", "1"], 2)],
)
def test_gpus_are_those_of_the_run(
    arguments: list[str],
    asked: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submitted(["--logs", str(tmp_path), "--cfg", "x", *arguments], monkeypatch, capsys)
    assert Executor.made.get("gpus_per_node") == asked


def test_fewer_gpus_than_the_run_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["submit", "--logs", str(tmp_path), "--cfg", "x", "--gpus", "2", "NUM_GPUS", "4"])
    assert "--gpus 2 of each machine are too few for NUM_GPUS 4: leave out one" in capsys.readouterr().err


@pytest.mark.parametrize("script", [None, "exit 1", "exit 0"])
def test_a_job_that_cannot_be_queued_again_still_ends_with_75(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a container there may be no scontrol."""
    if script is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    for name, value in (("PATH", str(tmp_path)), ("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "12")):
        monkeypatch.setenv(name, value)
    ended: list[int] = []
    monkeypatch.setattr("maskfeat.distributed.slurm.exit_now", ended.append)
    monkeypatch.setattr(logging.getLogger("maskfeat"), "propagate", True)
    Job(lambda argv: 75, str(tmp_path), [], 3)()
    assert ended == [75]
    assert ("could not be queued again: `scontrol requeue 12`" in caplog.text) == (script != "exit 0")


def test_what_slurm_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(executor: Executor, job: Any) -> None:
        raise submitit.core.utils.FailedJobError("sbatch: error: invalid\nsbatch: partition")

    monkeypatch.setattr(Executor, "submit", refuses)
    with pytest.raises(SystemExit) as end:
        submitted(["--logs", str(tmp_path), "--cfg", "x"], monkeypatch, capsys)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "error: Slurm takes no such job: sbatch: error: invalid sbatch: partition\n" in said
    monkeypatch.undo()
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: -1))
    with pytest.raises(SystemExit) as end:
        cli.main(["submit", "--logs", str(tmp_path), "--cfg", "x"])
    assert end.value.code == 2 and "there is no Slurm on this machine" in capsys.readouterr().err


@pytest.mark.slow
def test_the_job_runs_in_a_fresh_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is read back by submitit's own means, changes to the folder where it was submitted, and runs the recipe."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "own.yaml").write_text("_BASE_: quickstart/images_pt.yaml\n")
    arguments = ["--gpus", "0", "--logs", str(tmp_path), "--cfg", "own.yaml", "DATA.PATH_TO_DATA_DIR", "nowhere"]
    job = submitted(arguments, monkeypatch, capsys)
    code = f"from submitit.core.utils import DelayedSubmission; DelayedSubmission.load({str(job)!r}).result()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "error: no folder nowhere/train: DATA.PATH_TO_DATA_DIR must hold" in done.stdout + done.stderr
    assert (tmp_path / "here" / "quickstart" / "images_pt").is_dir(), "OUTPUT_DIR lies in another folder"


def test_without_submitit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit) as end:
        cli.main(["submit", "--cfg", "x"])
    assert end.value.code == 2 and "maskfeat submit: error: submitit is not installed" in capsys.readouterr().err
