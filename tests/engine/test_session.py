"""How errors end a run: a line for what a user can mend, the traceback of everything else, on whichever rank."""

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from maskfeat.config import load_config
from maskfeat.distributed.preemption import Preempted
from maskfeat.distributed.world import World
from maskfeat.engine.session import Session
from maskfeat.errors import UserError, UserFileError, naming
from tests.small import RECIPES, REPO, VIT_PT, images

RECIPE = RECIPES / "in1k_VIT_B_MaskFeat_FT.yaml"
MESSAGE = "error: the data are upside down: set DATA.UPSIDE_DOWN"


def run(fault: str, data: Path, output_dir: Path, *more: str) -> tuple[int, str]:
    """A run with `tests/engine/faulty.py`; its exit code, and all that it prints."""
    recipe = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
    opts = (*VIT_PT, *images(data), "PLUGINS", "[tests.engine.faulty]", "MODEL.MODEL_NAME", "Faulty")
    opts = (*opts, "OUTPUT_DIR", str(output_dir), *more)
    ended = subprocess.run(
        [sys.executable, str(REPO / "tools" / "run_net.py"), "--cfg", recipe, *opts],
        env={**os.environ, "FAULT": fault, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    return ended.returncode, ended.stdout


@pytest.mark.parametrize(
    ("opts", "reason", "code", "then"),
    [
        ([], "SIGTERM", 75, "the same command resumes from here (exit code 75: requeue me)"),
        (["TRAIN.AUTO_RESUME", "False"], "SIGTERM", 143, "the same command starts anew (exit code 143)"),
        (["TRAIN.AUTO_RESUME", "False"], "SIGINT", 130, "the same command starts anew (exit code 130)"),
        (["TRAIN.ENABLE", "False"], "SIGUSR1", 75, "the same command tests again (exit code 75: requeue me)"),
    ],
)
def test_how_a_stop_is_reported(
    opts: list[str],
    reason: str,
    code: int,
    then: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run that would start anew is not to be queued again: it would never end."""
    monkeypatch.setattr(logging.getLogger("maskfeat"), "propagate", True)
    with caplog.at_level("INFO"), Session(load_config(RECIPE, opts), World()) as session:
        raise Preempted(reason)
    assert session.exit_code == code and then in caplog.text


def test_who_is_leaving_keeps_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun ends the other processes of a run once one has left, with SIGTERM: also one that still writes the report,
    by whose exit code the job is queued again."""
    heard: list[object] = []
    monkeypatch.setattr(Session, "_report", lambda session: heard.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    with Session(load_config(RECIPE, ["OUTPUT_DIR", str(tmp_path)]), World()) as session:
        session.start()
        session.has_results = True
        raise Preempted("SIGTERM")
    assert session.exit_code == 75 and heard[0] not in (before, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("unpack", "ValueError: not enough values to unpack"),
        ("shape", "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("file", "FileNotFoundError: .*/no/such/file"),
    ],
)
def test_a_bug_keeps_its_traceback(fault: str, says: str, image_data: Path, tmp_path: Path) -> None:
    """Whatever type of error it is; also in the log of the run."""
    code, said = run(fault, image_data, tmp_path)
    assert code == 1
    for text in (said, (tmp_path / "stdout.log").read_text()):
        assert re.search(says, text) and "faulty.py" in text and text.count("Traceback") == 1
        assert "error: " not in text


@pytest.mark.slow
def test_what_a_user_can_mend_is_one_line(image_data: Path, tmp_path: Path) -> None:
    code, said = run("user", image_data, tmp_path)
    assert code == 2 and said.count(MESSAGE) == 1 and "Traceback" not in said


@pytest.mark.slow
def test_on_another_rank_than_0(image_data: Path, tmp_path: Path) -> None:
    """The rank that meets an error says so; what all ranks meet is in the log of the run, once."""
    two = ("NUM_GPUS", "2", "DIST_BACKEND", "gloo")
    code, said = run("user@1", image_data, tmp_path / "a", *two)
    assert code == 2 and said.count(MESSAGE) == 1 and f"[rank 1] {MESSAGE}" in said
    code, said = run("unpack@1", image_data, tmp_path / "b", *two)
    assert code == 1 and "on rank 1:" in said and "faulty.py" in said and "not enough values to unpack" in said
    code, said = run("user@0,1", image_data, tmp_path / "c", *two)
    assert code == 2 and said.count(MESSAGE) == 1
    assert MESSAGE in (tmp_path / "c" / "stdout.log").read_text()


def test_errors_of_files_are_named(tmp_path: Path) -> None:
    made = "OUTPUT_DIR x cannot be made"
    with pytest.raises(UserFileError, match=f"{made}: File exists") as caught, naming(made):
        tmp_path.mkdir()
    assert isinstance(caught.value, UserError) and isinstance(caught.value, OSError)
    with pytest.raises(UserError, match="^as it is$"), naming("nothing"):
        raise UserFileError("as it is")
    with pytest.raises(KeyError), naming("nothing"):
        raise KeyError("a bug")
