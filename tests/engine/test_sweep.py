"""A sweep: which runs it has and how they are named, that it resumes, and what it says of runs that fail."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskfeat import cli
from maskfeat.config import load_config
from maskfeat.engine import sweep
from maskfeat.engine.sweep import main
from maskfeat.engine.sweep_plan import grid, plan, split_values
from maskfeat.errors import UserError
from tests.small import REPO, VIT_PT, images

RECIPE = "masked_ssl/in1k_VIT_B_MaskFeat_PT"
RATES = "SOLVER.BASE_LR=1e-4,2e-4"
SMALL = ["SOLVER.WARMUP_EPOCHS", "0", "NUM_GPUS", "0"]


def test_values() -> None:
    assert split_values("1e-4,[1,2],'a,b',(3,{4,5}),") == ["1e-4", "[1,2]", "'a,b'", "(3,{4,5})", ""]
    varied, fixed = grid(["A.B=1,2", "A.C", "3,4", "A.D=5", "A.E=[1,2],[3]"])
    assert varied == {"A.B": ["1", "2"], "A.E": ["[1,2]", "[3]"]} and fixed == ["A.C", "3,4", "A.D=5"]


def test_names_say_what_differs(tmp_path: Path) -> None:
    runs = plan(
        RECIPE, [RATES, "OUTPUT_DIR", str(tmp_path), "AUG.MASK_RATIO=0.4,0.6", "DATA.MEAN=[0.4,0.4,0.4],[0.5,0.5,0.5]"]
    )
    assert [run.name for run in runs[:3]] == [
        "BASE_LR=1e-4_MASK_RATIO=0.4_MEAN=0.4-0.4-0.4",
        "BASE_LR=1e-4_MASK_RATIO=0.4_MEAN=0.5-0.5-0.5",
        "BASE_LR=1e-4_MASK_RATIO=0.6_MEAN=0.4-0.4-0.4",
    ]
    assert len(runs) == 8 and all(run.folder == tmp_path / run.name for run in runs)
    assert runs[0].argv[-1] == f"OUTPUT_DIR={tmp_path / runs[0].name}"
    names = [run.name for run in plan(RECIPE, ["TRAIN.BATCH_SIZE=8,16", "TEST.BATCH_SIZE=8,16"])]
    assert names[1] == "TRAIN.BATCH_SIZE=8_TEST.BATCH_SIZE=16"


def test_random_runs_are_of_the_grid_and_differ() -> None:
    opts = [RATES, "AUG.MASK_RATIO=0.3,0.4,0.5,0.6"]
    every = [run.name for run in plan(RECIPE, opts)]
    drawn = [run.name for run in plan(RECIPE, opts, 5, 1)]
    assert len(set(drawn)) == 5 and set(drawn) <= set(every)
    assert drawn == [run.name for run in plan(RECIPE, opts, 5, 1)] != [run.name for run in plan(RECIPE, opts, 5, 2)]
    assert len(plan(RECIPE, opts, 100)) == 8


def test_random_runs_are_of_the_whole_grid_however_large_it_is() -> None:
    """Of 8^6 points, all values of the first key, which varies slowest."""
    values = ",".join(f"0.{number}" for number in range(1, 9))
    keys = ("AUG.MASK_RATIO", "SOLVER.BASE_LR", "SOLVER.WEIGHT_DECAY", "SOLVER.CLIP_GRAD_L2NORM", "SOLVER.MOMENTUM")
    opts = [*(f"{key}={values}" for key in keys), "RNG_SEED=0,1,2,3,4,5,6,7"]
    drawn = {run.name.partition("_BASE_LR")[0] for run in plan(RECIPE, opts, 24)}
    assert drawn == {f"MASK_RATIO=0.{number}" for number in range(1, 9)}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["SOLVER.BASE_LR=1e-4"], "no key has several values: give KEY=VALUE,VALUE"),
        (["SOLVER.BASE_LR=1e-4,"], "a value is empty or given twice"),
        (["SOLVER.BASE_LR=1,1"], "a value is empty or given twice"),
        ([RATES, RATES], "a value is empty or given twice, or the key is"),
        ([RATES, "SOLVER.BASE_LT=1,2"], "BASE_LR=1e-4_BASE_LT=1: command line: unknown config key SOLVER.BASE_LT"),
        (["AUG.MASK_RATIO=0.4,1.4"], "MASK_RATIO=1.4: AUG.MASK_RATIO must be"),
        (["nonsense"], "overrides are KEY VALUE or KEY=VALUE, and nonsense has no value"),
        (["DATA.PATH_PREFIX=a/b,a-b"], "several runs would have the folder PATH_PREFIX=a-b"),
        (["OUTPUT_DIR=a,b"], "OUTPUT_DIR has several values"),
        ([f"RNG_SEED={','.join(map(str, range(1001)))}"], "more than 1000 runs: fewer values, or --random N"),
        (
            [f"A{n}=1,2" for n in range(64)] + ["--random", "3"],
            "the grid has 18446744073709551616 points: fewer values",
        ),
        ([RATES, "--local", "0"], "--local is 0: give 1 or more"),
        ([RATES, "--random", "-1"], "--random is -1: give 1 or more"),
        ([RATES, "NUM_GPUS", "64"], "--local 1 with NUM_GPUS 64 needs 64: NUM_GPUS is 64, but this machine shows"),
    ],
)
def test_bad_input(
    words: list[str],
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--cfg", RECIPE, *words]) == 2
    said = capsys.readouterr().out
    assert problem in said and len(said.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_commands_can_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a b"
    assert cli.main(["sweep", "--cfg", RECIPE, RATES, "OUTPUT_DIR", str(folder), "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"maskfeat train --cfg {RECIPE} OUTPUT_DIR '{folder}' SOLVER.BASE_LR=1e-4 'OUTPUT_DIR={folder}/BASE_LR=1e-4'"
    )
    assert len(lines) == 2 and not folder.exists()


def test_a_dollar_in_the_folder_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that the environment might name when the run reads it again."""
    monkeypatch.setenv("a", "elsewhere")
    (run, _) = plan(RECIPE, [RATES, "OUTPUT_DIR", f"{tmp_path}/$$a"], None, 0)
    assert run.folder == tmp_path / "$a" / "BASE_LR=1e-4"
    assert str(run.folder) == load_config(RECIPE, run.argv[2:]).OUTPUT_DIR
    run.folder.mkdir(parents=True)
    monkeypatch.setattr(sweep, "run_net", lambda argv: 0)
    assert sweep.run_one(run.argv) == 0 and run.is_done


# ---------------------------------------------------------------------------------------------- on this machine

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[-1].partition("=")[2])
signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(75)))
with (folder / "starts").open("a") as file:
    file.write(f"{os.environ.get('OMP_NUM_THREADS')} ")
print("working")
if (folder.parent / "slow").exists() and "SOLVER.BASE_LR=3e-4" not in sys.argv:
    time.sleep(600)
if "SOLVER.BASE_LR=2e-4" in sys.argv and not (folder.parent / "mended").exists():
    sys.exit("error: it broke")
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line whose runs are processes that take no time; that of 2e-4 fails until `mended` is there."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(sweep, "TRAIN", [sys.executable, str(tmp_path / "program.py")])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return ["--cfg", RECIPE, *SMALL, "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.BASE_LR=1e-4,2e-4,3e-4"]


def starts(folder: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text().split()) for path in sorted(folder.glob("*/starts"))}


@pytest.mark.slow
def test_what_failed_is_named_and_run_again(
    program: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*program, "--local", "2"]) == 1
    said = capsys.readouterr().out
    assert "3 runs in" in said and "0 of them done" in said
    assert said.endswith("1 of 3 runs failed:\n  BASE_LR=2e-4: exit code 1: error: it broke\n")
    assert starts(out) == {"BASE_LR=1e-4": 1, "BASE_LR=2e-4": 1, "BASE_LR=3e-4": 1}
    assert (out / "BASE_LR=2e-4" / "sweep_output.txt").read_text().splitlines()[-1] == "error: it broke"
    assert (out / "BASE_LR=1e-4" / "starts").read_text().split() == [str(max(1, (os.cpu_count() or 1) // 2))]
    assert main([*program, "--report"]) == 1
    assert capsys.readouterr().out.endswith("1 of 3 runs wait:\n  BASE_LR=2e-4: not done\n")
    (out / "mended").touch()
    assert main(program) == 0
    assert "2 of them done" in capsys.readouterr().out
    assert starts(out) == {"BASE_LR=1e-4": 1, "BASE_LR=2e-4": 2, "BASE_LR=3e-4": 1}
    assert main([*program, "SOLVER.MAX_EPOCH", "7"]) == 0
    assert starts(out) == {"BASE_LR=1e-4": 2, "BASE_LR=2e-4": 3, "BASE_LR=3e-4": 2}, "another command"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_runs_and_starts_no_more(number: int, program: list[str], tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the terminal, and SIGTERM the sweep alone."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "slow").touch()
    code = (
        f"import sys; from maskfeat.engine import sweep; sweep.TRAIN = {sweep.TRAIN!r}; sys.exit(sweep.main({program}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPO,
        start_new_session=True,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )
    end = time.monotonic() + 300
    while not starts(out) and time.monotonic() < end:
        time.sleep(0.1)
    try:
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        process.wait(timeout=300)
        assert (out / "BASE_LR=1e-4" / "saved").exists() == (number == signal.SIGTERM)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it should be, as the group is then empty
            os.killpg(process.pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and b"the same command goes on from here" in said
    assert starts(out) == {"BASE_LR=1e-4": 1}


def test_an_error_stops_the_runs_that_are_at_work(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "slow").touch()
    at_work: list[subprocess.Popen[bytes]] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            at_work.append(self)

    def note(argv: list[str]) -> None:
        while len(starts(out)) < 3:
            time.sleep(0.05)
        raise UserError("the disk is full")

    monkeypatch.setattr(sweep.subprocess, "Popen", Popen)
    monkeypatch.setattr(sweep, "_note_done", note)
    try:
        assert main([*program, "--local", "3"]) == 2
        assert "error: the disk is full" in capsys.readouterr().out
        assert [process.poll() for process in at_work] == [75, 75, 0]
        assert len(list(out.glob("*/saved"))) == 2
    finally:
        for process in at_work:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_sweep(image_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real runs: the table and the report have them all."""
    opts = [*VIT_PT, *images(image_data), "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_EPOCH", "1"]
    command = [sys.executable, str(REPO / "tools/sweep.py"), "--cfg", RECIPE, *opts, "AUG.MASK_RATIO=0.4,0.6"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith(("run  ", "MASK_RATIO="))]
    assert table[0].split()[:2] == ["run", "state"] and "training loss" in table[0]
    assert [line.split()[0] for line in table[1:]] == ["MASK_RATIO=0.4", "MASK_RATIO=0.6"]
    assert all("complete: 1 of 1 epochs" in line for line in table[1:])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "MASK_RATIO=0.4" in page and "MASK_RATIO=0.6" in page and "AUG.MASK_RATIO" in page
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert again.returncode == 0 and "2 of them done" in again.stdout and "run 1 of" not in again.stdout


# ---------------------------------------------------------------------------------------------- on a cluster


@pytest.mark.slow
def test_an_array_of_slurm(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs that are not done are submitted in one batch; a job notes that its run is done."""
    submitit = pytest.importorskip("submitit")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mended").touch()
    made: dict[str, Any] = {"jobs": [], "batches": 0}

    class Executor:
        def __init__(self, folder: Path, max_num_timeout: int) -> None: ...

        def update_parameters(self, **parameters: Any) -> None:
            made.update(parameters)

        @contextlib.contextmanager
        def batch(self) -> Any:
            made["batches"] += 1
            yield

        def submit(self, job: Any) -> SimpleNamespace:
            made["jobs"].append(pickle.loads(pickle.dumps(job)))
            number = len(made["jobs"])
            return SimpleNamespace(job_id=f"7_{number}", paths=SimpleNamespace(stdout=f"logs/7_{number}.out"))

    monkeypatch.setattr(submitit, "SlurmExecutor", Executor)
    monkeypatch.setattr(sweep, "run_net", lambda argv: int("SOLVER.BASE_LR=1e-4" not in argv))
    command = [*program, "--submit", "--nodes", "2", "--gpus", "0", "--parallel", "3"]
    assert main(command) == 0
    assert (made["array_parallelism"], made["nodes"], made["batches"], len(made["jobs"])) == (3, 2, 1, 3)
    assert "job 7_2, log logs/7_2.out: BASE_LR=2e-4" in capsys.readouterr().out
    for job in made["jobs"]:
        Path(job.argv[-1].partition("=")[2]).mkdir()
        job.main(job.argv)
    assert main(command) == 0
    assert len(made["jobs"]) == 5, "the first one is done"
    command = [*program, "--submit", "NUM_GPUS=1,2"]
    assert main(command) == 0 and made["gpus_per_node"] == 2
    assert main([*command, "--gpus", "1"]) == 2 and "--gpus 1 of each machine are too few" in capsys.readouterr().out


@pytest.mark.slow
def test_gpus_are_shared_out(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7,8,9")
    monkeypatch.setattr("maskfeat.distributed.launch.torch.cuda.device_count", lambda: 5)
    text = PROGRAM.replace("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") + "time.sleep(1)\n"
    (tmp_path / "program.py").write_text(text)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mended").touch()
    assert main([*program, "NUM_GPUS", "2", "--local", "2"]) == 0
    found = {path.read_text().strip() for path in (tmp_path / "out").glob("*/starts")}
    assert found == {"4,5", "7,8"}
    assert main([*program, "NUM_GPUS", "2", "--local", "3", "SOLVER.MAX_EPOCH", "7"]) == 2
    assert "--local 3 with NUM_GPUS 2 needs 6: NUM_GPUS is 6, but this machine shows 5" in capsys.readouterr().out
