"""Runs on two nodes: by sbatch, by both forms of srun, by submitit; killed, preempted and queued again."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskfeat.checkpoint.files import find_checkpoints
from maskfeat.distributed.launch import free_address
from tests.cluster.conftest import ENV, Cluster
from tests.reliability.harness import digest, wait_until
from tests.reliability.runs import ENDLESS, START, TOOL, processes
from tests.reliability.scale import note
from tests.small import RECIPES, REPO, VIT_PT, images

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

RECIPE = ["--cfg", str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")]
EPOCHS = 60
REVOKED = 4  # seconds: credentials have the time of their second, and nodes may end a step's last process later
STEPS = ["SOLVER.MAX_EPOCH", str(EPOCHS), "TRAIN.CHECKPOINT_PERIOD", "1000", "DATA_LOADER.NUM_WORKERS", "1"]
FEW = ("SOLVER.MAX_EPOCH", "3")


def run(data: Path, output: Path, *more: str) -> list[str]:
    """The arguments of a run of two nodes: two steps an epoch."""
    return [*RECIPE, *VIT_PT, *images(data), *STEPS, "OUTPUT_DIR", str(output), *more]


@pytest.fixture(scope="module")
def undisturbed(image_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the last checkpoint of a local run of two processes, started in PySlowFast's way."""
    output = tmp_path_factory.mktemp("local")
    both = ["--num_shards", "2", "--init_method", free_address()]
    started = [
        subprocess.Popen([sys.executable, TOOL, *both, "--shard_id", str(shard), *run(image_data, output)], env=ENV)
        for shard in range(2)
    ]
    assert [process.wait(2 * START) for process in started] == [0, 0]
    return digest(output, "ssl")


def test_sbatch(cluster: Cluster, undisturbed: str, image_data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ["--nodes=2", "--gpus-per-node=0", "--time=10"]
    script = ["tools/slurm/train.sbatch", *run(image_data, tmp_path)]
    job = cluster.submit(options, script, log)
    assert cluster.ended(job, log) == ("COMPLETED", "0:0"), log.read_text()
    assert digest(tmp_path, "ssl") == undisturbed
    assert "NUM_SHARDS: 2" in (tmp_path / "config.yaml").read_text(), "nobody said so but Slurm"


@pytest.mark.parametrize(
    ("tasks", "more", "machines"),
    [(2, ("NUM_GPUS", "1"), 2), (4, (), 2), (2, ("NUM_GPUS", "2", "DIST_BACKEND", "gloo"), 2)],
    ids=["task per node", "tasks per node", "task that spawns"],
)
def test_srun(
    cluster: Cluster, tasks: int, more: tuple[str, ...], machines: int, image_data: Path, tmp_path: Path
) -> None:
    """Both forms: a task for each process, and a task for each node that starts its processes."""
    if more[:2] == ("NUM_GPUS", "1"):
        more = ()  # NUM_GPUS 0 of the small recipe: one process a node, on the CPU
    command = [*cluster.srun(f"-n{tasks}"), sys.executable, TOOL, *run(image_data, tmp_path, *FEW, *more)]
    done = subprocess.run(command, env=ENV, cwd=REPO, capture_output=True, text=True, timeout=2 * START)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    processes_in_all = 4 if tasks == 4 or more else 2
    assert f"on {processes_in_all} x CPU" in said and f"{8 * machines} samples a step" in said, said
    assert f"NUM_SHARDS: {machines}" in (tmp_path / "config.yaml").read_text()


def test_srun_uneven(cluster: Cluster, image_data: Path, tmp_path: Path) -> None:
    command = [*cluster.srun("-n3"), sys.executable, TOOL, *run(image_data, tmp_path)]
    done = subprocess.run(command, env=ENV, cwd=REPO, capture_output=True, text=True, timeout=2 * START)
    # The first that ends has srun end the others, by SIGTERM: which code is the highest depends on who was faster.
    assert done.returncode not in (0, 75) and "unevenly" in done.stdout + done.stderr, done.stdout + done.stderr


def test_a_batch_script_is_no_task(cluster: Cluster, tmp_path: Path) -> None:
    """Its shell has a SLURM_PROCID like a task's, on a job of several nodes."""
    script = tmp_path / "script.sh"
    script.write_text(
        "#!/bin/sh\necho $SLURM_NNODES nodes, process $SLURM_PROCID\n"
        f'{sys.executable} -c "from maskfeat.distributed import launch; print(launch.read_launch_environment())"\n'
    )
    job = cluster.submit(["-N2", "-n4", "--overcommit"], [str(script)], tmp_path / "log")
    cluster.ended(job, tmp_path / "log")
    assert (tmp_path / "log").read_text().split("\n")[:2] == ["2 nodes, process 0", "None"]


def tasks_of(output: Path) -> dict[int, int]:
    """Process by rank, of the tasks of srun that train into a folder."""
    found = {}
    for one in processes():
        if TOOL in one.command and str(output) in one.command and "srun" not in one.command:
            try:
                env = Path(f"/proc/{one.pid}/environ").read_bytes().split(b"\0")
                parent = Path(f"/proc/{one.parent}/cmdline").read_bytes()
            except OSError:
                continue
            ranks = [entry for entry in env if entry.startswith(b"SLURM_PROCID=")]
            if ranks and TOOL.encode() not in parent:  # data workers are children of the tasks
                found[int(ranks[0].split(b"=")[1])] = one.pid
    return found


def test_ctrl_c_of_srun_saves(cluster: Cluster, image_data: Path, tmp_path: Path) -> None:
    """With --disable-status; without it, srun answers Ctrl-C itself, and kills its tasks on the second one."""
    log, output = tmp_path / "screen", tmp_path / "out"
    command = [*cluster.srun("-n2", "--disable-status"), sys.executable, TOOL, *run(image_data, output, *ENDLESS)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=ENV, cwd=REPO, stdout=file, stderr=file)
    try:
        wait_until(lambda: "epoch 2/" in log.read_text() or process.poll() is not None, START, "second epoch")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    finally:
        process.terminate()  # of srun: ends its tasks
    assert len(find_checkpoints(output, "ssl")) == 1 and "stopped on Ctrl-C" in log.read_text(), log.read_text()


@pytest.mark.alone
@pytest.mark.parametrize("victim", [1, 0])
@pytest.mark.parametrize("spawns", [False, True], ids=["task per process", "task that spawns"])
def test_a_killed_task_ends_the_job(
    cluster: Cluster, victim: int, spawns: bool, image_data: Path, tmp_path: Path
) -> None:
    log = tmp_path / "screen"
    more = ("NUM_GPUS", "2", "DIST_BACKEND", "gloo") if spawns else ()
    command = [*cluster.srun("-n2"), sys.executable, TOOL, *run(image_data, tmp_path / "out", *ENDLESS, *more)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=ENV, cwd=REPO, stdout=file, stderr=file)
    try:
        wait_until(lambda: "epoch 2/" in log.read_text() or process.poll() is not None, START, "second epoch")
        tasks = tasks_of(tmp_path / "out")
        assert sorted(tasks) == [0, 1], log.read_text()
        os.kill(tasks[victim], signal.SIGKILL)
        killed = time.monotonic()
        code = process.wait(60)
        wait_until(lambda: not [p for p in processes() if str(tmp_path / "out") in p.command], 60, "nobody is left")
        seconds = time.monotonic() - killed
    finally:
        process.terminate()  # of srun: ends its tasks
    said = log.read_text()
    assert code not in (0, 75), said
    assert re.search(rf"task {victim}: Killed", said), said
    form = "task that spawns" if spawns else "task per process"
    note(5, f"srun, {form}, task {victim} killed: all gone after {seconds:.2f} s, load {os.getloadavg()[0]:.1f}")
    assert seconds < 5, said


def preempt(cluster: Cluster, job: str, output: Path, log: Path) -> None:
    """Stop a job by a signal in one of its first epochs, and see it queued again."""
    stdout = output / "stdout.log"
    wait_until(
        lambda: stdout.is_file() and f"epoch 2/{EPOCHS}  step 1/" in stdout.read_text(), START, "the second epoch"
    )
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    cluster.until(job, lambda shown: shown["Restarts"] == "1" and shown["JobState"] == "PENDING", START, log)
    # A job that is queued again waits for two minutes; we do not. But what its nodes heard when it was ended holds for
    # every credential of that second and before: started at once, the job would be refused as one that is over.
    time.sleep(REVOKED)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    shown = cluster.until(job, lambda shown: shown["JobState"] != "PENDING", START, log)
    assert shown["JobState"] in ("RUNNING", "COMPLETING", "COMPLETED"), (shown, log.read_text())


def assert_went_on(output: Path) -> None:
    """It was resumed at the very step at which it had stopped."""
    said = (output / "stdout.log").read_text()
    (resumed,) = re.findall(r"resumed from \S*_epoch_(\d+)_step_(\d+)\.pyth, after epoch (\d+), step (\d+)", said)
    epoch, step = int(resumed[0]), int(resumed[1])
    assert (epoch, step) == (int(resumed[2]), int(resumed[3]))
    steps = [tuple(map(int, found)) for found in re.findall(rf"epoch (\d+)/{EPOCHS}  step (\d+)/", said)]
    assert steps == [(epoch, step) for epoch in range(1, EPOCHS + 1) for step in (1, 2)], "every step once, in order"


def test_preempted_and_queued_again(cluster: Cluster, undisturbed: str, image_data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = ["tools/slurm/train.sbatch", *run(image_data, tmp_path)]
    job = cluster.submit(["--nodes=2", "--gpus-per-node=0", "--time=10"], script, log)
    preempt(cluster, job, tmp_path, log)
    assert cluster.ended(job, log) == ("COMPLETED", "0:0"), log.read_text()
    assert_went_on(tmp_path)
    assert digest(tmp_path, "ssl") == undisturbed
    note(7, "two nodes, scancel --signal=USR1: queued again, resumed at the very step, last checkpoint to the bit")


def test_submit(cluster: Cluster, undisturbed: str, image_data: Path, tmp_path: Path) -> None:
    """By submitit: stopped by a signal, queued again, and at its end as if nothing had been."""
    pytest.importorskip("submitit")
    options = ["--nodes", "2", "--gpus", "0", "--time", "10", "--partition", "p", "--logs", str(tmp_path / "logs")]
    command = [sys.executable, "tools/submit.py", *options, *run(image_data, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"job (\d+), log (\S+)\n", done.stdout)
    assert found, done.stdout
    job, log = cluster.watch(found[1]), Path(found[2])
    preempt(cluster, job, tmp_path, log)
    assert cluster.ended(job, log) == ("COMPLETED", "0:0"), log.read_text()
    assert_went_on(tmp_path)
    assert digest(tmp_path, "ssl") == undisturbed


def test_sweep(cluster: Cluster, image_data: Path, tmp_path: Path) -> None:
    """A grid as an array of jobs, one of which fails, and afterwards its table."""
    pytest.importorskip("submitit")
    rates = ["SOLVER.BASE_LR=1e-4,1e-3"]
    (tmp_path / "out" / "BASE_LR=1e-3").mkdir(parents=True)
    (tmp_path / "out" / "BASE_LR=1e-3" / "checkpoints").touch()  # no folder can be made there
    command = [sys.executable, "tools/sweep.py", *run(image_data, tmp_path / "out", *FEW), *rates]
    asked = ["--submit", "--time", "10", "--logs", str(tmp_path / "logs"), "--cpus", "1"]
    done = subprocess.run([*command, *asked], capture_output=True, text=True, env=ENV, cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = re.findall(r"^job (\d+_\d+), log (\S+): (\S+)$", done.stdout, re.M)
    assert [name for _, _, name in jobs] == ["BASE_LR=1e-4", "BASE_LR=1e-3"], done.stdout
    states = [cluster.ended(cluster.watch(job), Path(log))[0] for job, log, _ in jobs]
    assert states == ["COMPLETED", "FAILED"]
    report = subprocess.run([*command, "--report"], capture_output=True, text=True, env=ENV, cwd=REPO)
    assert report.returncode == 1 and re.search(r"^BASE_LR=1e-4 +complete: 3 of 3 epochs", report.stdout, re.M), report
    assert "1 of 2 runs wait:\n  BASE_LR=1e-3: not done" in report.stdout + report.stderr
