"""tools/gpu_check.py: parts that pass, fail, hang and crash, a check that is cut off, missing wheels, the toy run."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import cli, processes, wheels
from benchmarks.gpu.parts import write_json
from benchmarks.gpu.runner import Runner

REPO = Path(__file__).resolve().parents[2]
FAKE = "tests.benchmarks.fake_parts"


def check(output: Path, *options: str, minutes: str = "5") -> int:
    return cli.main(["--output", str(output), "--device", "cpu", "--minutes", minutes, *options], table=FAKE)


def results(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "results.json").read_text())
    return content


def is_there(pid: int) -> bool:
    """Whether a process runs: neither gone nor waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A whole run of the fake table (but for learning) and its exit code."""
    output = tmp_path_factory.mktemp("check")
    return output, check(output)


@pytest.mark.slow
def test_what_became_of_each_part(checked: tuple[Path, int]) -> None:
    output, code = checked
    assert code == 1
    parts = results(output)["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "fails": "failed",
        "breaks": "failed",
        "crashes": "failed",
        "on a gpu alone": "not run",
        "hangs": "hung",
        "passes": "passed",
        "sees": "passed",
        "passes, too": "passed",
    }
    assert parts["fails"]["why"] == "7 found, 6 expected" and parts["fails"]["figures"] == {"before": 1}
    assert parts["breaks"]["why"] == "KeyError: 'bins'"
    assert "KeyError" in (output / "logs" / "breaks.log").read_text(), "the traceback is kept"
    assert parts["crashes"]["why"].endswith("exit code 9: the last words")
    assert parts["crashes"]["figures"] == {"before": 2}
    assert parts["on a gpu alone"]["why"] == "needs CUDA"
    assert parts["passes"]["figures"]["answer"] == 42 and parts["passes"]["not_run"] == ["a kernel: needs CUDA"]
    assert parts["sees"]["figures"] == {"variable": "seen"}
    assert not (output / "work" / "passes").exists()


@pytest.mark.slow
def test_a_hung_part_is_killed_with_its_children(checked: tuple[Path, int]) -> None:
    hung = results(checked[0])["parts"]["hangs"]
    assert 4 <= hung["seconds"] < 30
    child = hung["figures"]["child"]
    wait_until(lambda: not is_there(child), 10)


@pytest.mark.slow
def test_the_machine_is_recorded(checked: tuple[Path, int]) -> None:
    (call,) = results(checked[0])["calls"]
    assert {"cpu", "cores", "gpu", "torch", "cuda", "python", "commit"} <= call["machine"].keys()


@pytest.mark.slow
def test_passed_parts_are_kept(checked: tuple[Path, int], caplog: pytest.LogCaptureFixture) -> None:
    output, _ = checked
    before = results(output)["parts"]
    with caplog.at_level("INFO"):
        assert check(output, "--only", "speed") == 0
    after = results(output)["parts"]
    assert after["passes, too"] == before["passes, too"] and len(results(output)["calls"]) == 2
    assert check(output, "--only", "speed", "--again") == 0
    again = results(output)["parts"]["passes, too"]
    assert again["figures"]["process"] != before["passes, too"]["figures"]["process"]
    assert "passes, too" in caplog.text and "takes long" not in caplog.text


@pytest.mark.slow
def test_no_time_left(tmp_path: Path) -> None:
    assert check(tmp_path, minutes="0.001") == 0
    parts = results(tmp_path)["parts"]
    assert {part["why"] for name, part in parts.items() if name != "on a gpu alone"} == {"no time left"}


@pytest.mark.slow
def test_a_part_that_outlasts_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, is no failure, and keeps what it had found."""
    monkeypatch.setattr("benchmarks.gpu.runner._LEAST", 0.0)
    whole = Runner._run  # once everything is imported, which takes a busy machine long
    monkeypatch.setattr(Runner, "_run", lambda runner, part, limit, cut: whole(runner, part, 5.0, cut=True))
    assert check(tmp_path, "--only", "learning") == 0
    part = results(tmp_path)["parts"]["takes long"]
    assert part["status"] == "not run" and part["why"].startswith("no time left after")
    assert part["figures"]["found"] > 0


@pytest.mark.slow
def test_cut_off_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL: the file is valid, knows which part ran and what it had found; the part is gone, and runs again."""
    command = [sys.executable, "-c", f"from benchmarks.gpu.cli import main; main(table={FAKE!r})"]
    options = ["--output", str(tmp_path), "--device", "cpu", "--only", "learning", "--minutes", "60"]
    process = subprocess.Popen([*command, *options], cwd=REPO, stdout=subprocess.DEVNULL, start_new_session=True)
    path = tmp_path / "results.json"

    def found() -> int:
        part = results(tmp_path)["parts"].get("takes long", {}) if path.exists() else {}
        return int(part.get("figures", {}).get("found", -1))

    try:
        wait_until(lambda: found() > 3, 120)  # every look reads a whole file
    finally:
        process.kill()
        process.wait()
    part = results(tmp_path)["parts"]["takes long"]
    assert part["status"] == "running" and part["figures"]["found"] > 3
    partial = tmp_path / "parts" / "takes long.json"

    def still() -> bool:
        before = partial.read_text()
        time.sleep(0.5)
        return partial.read_text() == before

    wait_until(still, 20)


@pytest.mark.slow
def test_forks_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts then start from nothing."""
    monkeypatch.setattr(processes, "_READY", "something else")
    assert check(tmp_path, "--only", "speed") == 0
    assert {part["status"] for part in results(tmp_path)["parts"].values()} == {"passed"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--wheels", "/no/such/folder"], "no such folder"),
        (["--only", "everything"], "invalid choice"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_arguments(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--output", str(tmp_path), "--device", "cpu", *options], table=FAKE)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_folder_of_other_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(tmp_path / "results.json", {"of": {"device": "cuda", "toy": False}, "calls": [], "parts": {}})
    assert check(tmp_path) == 2
    assert "give another --output" in caplog.text
    (tmp_path / "results.json").write_text("{")
    assert check(tmp_path) == 2
    assert "is not a file of this program" in caplog.text


def test_no_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2 and "give --output DIR" in capsys.readouterr().err


def wheel(folder: Path, name: str) -> None:
    """A wheel of a package with one module that holds nothing."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for path, text in files.items()
    }
    record = "".join(f"{path},sha256={digests[path]},{len(text)}\n" for path, text in files.items())
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)


@pytest.mark.slow
def test_missing_wheels_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing and in the folder; torch, which is there, and what the folder lacks are left."""
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "made_for_a_test")
    target = tmp_path / "site"
    monkeypatch.setenv("PIP_TARGET", str(target))  # not into the environment of the tests
    monkeypatch.setattr(wheels, "required", lambda: ["torch", "made-for-a-test", "not-in-the-folder"])
    found = wheels.install_missing(tmp_path / "wheels")
    assert list(found) == ["made-for-a-test", "not-in-the-folder"]
    assert found["made-for-a-test"] == "installed" and (target / "made_for_a_test.py").exists()
    assert "not-in-the-folder" in found["not-in-the-folder"]


def test_required_packages_are_those_of_setup() -> None:
    names = wheels.required()
    assert {"torch", "av", "yacs", "iopath"} <= set(names) and all(name.isidentifier() for name in names)


@pytest.mark.slow
def test_parts_need_no_pytest() -> None:
    """They take helpers of the tests, on machines where pytest is not installed."""
    code = "import sys; sys.modules['pytest'] = None; import benchmarks.gpu.table"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


@pytest.mark.slow
def test_toy_run(tmp_path: Path) -> None:
    """Every path up to the launch of a kernel, on the CPU."""
    done = subprocess.run(
        [
            sys.executable,
            "tools/gpu_check.py",
            "--device",
            "cpu",
            "--toy",
            "--minutes",
            "30",
            "--output",
            str(tmp_path),
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    content = results(tmp_path)
    states = {name: (part["status"], part.get("why")) for name, part in content["parts"].items()}
    assert done.returncode == 0, states
    assert {status for status, _ in states.values()} <= {"passed", "not run"}, states
    assert {why for status, why in states.values() if status == "not run"} <= {"needs CUDA"}, states
    assert "set_sync_debug_mode" in done.stdout and "needs CUDA" in done.stdout
    assert "NCCL" in done.stdout
