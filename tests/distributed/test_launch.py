"""How processes start, what the environment says of them, and how the one that watches them ends them."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from maskfeat.config import load_config
from maskfeat.distributed import launch as launching
from maskfeat.distributed.launch import LaunchEnvironment, first_host, launch, read_launch_environment
from maskfeat.distributed.preemption import INTERRUPTED, PREEMPTED, StopRequest
from maskfeat.distributed.world import World, choose_device
from maskfeat.errors import UserError
from tests.reliability.harness import wait_until
from tests.reliability.runs import START, processes, start
from tests.small import RECIPES

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "rack1", "MASTER_PORT": "4711",
}  # fmt: skip
TASK = {
    "SLURM_JOB_ID": "1200", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[07-08]", "SLURM_JOB_NODELIST": "n[05-08]",
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
TASK_PER_NODE = {
    **TASK, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had started these tests."""
    for name in os.environ:
        if name in TORCHRUN or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def set_env(monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[12]", "n12"),
        ("n[12,14]", "n12"),
        ("rack2n[07-09,12],x5", "rack2n07"),
        ("node-[003-010]", "node-003"),
        ("gpu-a-1,gpu-b-[1-2]", "gpu-a-1"),
        ("n[1-2].cluster.org,m[1-9].cluster.org", "n1.cluster.org"),
        ("rack[2-3]n[7,9]-ib,x[1-2]", "rack2n7-ib"),
        ("10.0.0.[3-4]", "10.0.0.3"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_nothing_started_it() -> None:
    assert read_launch_environment({}) is None
    assert read_launch_environment() is None, "the environment of these tests, made bare"


def test_torchrun() -> None:
    expected = LaunchEnvironment("torchrun", World(5, 8, 1, 4), 1, 2, "tcp://rack1:4711")
    assert read_launch_environment(TORCHRUN) == expected
    without = {name: value for name, value in TORCHRUN.items() if name != "GROUP_RANK"}
    assert read_launch_environment(without) == expected, "the machine follows from the rank"
    assert read_launch_environment({**TASK, **TORCHRUN}) == expected, "torchrun in a job of Slurm"
    assert expected.numbers() == {"NUM_SHARDS": 2, "NUM_GPUS": 4}


def test_torchrun_of_one_process_is_torchrun() -> None:
    one = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    started = read_launch_environment(one)
    assert started is not None and started.numbers() == {"NUM_SHARDS": 1, "NUM_GPUS": 1}


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_half_an_environment_of_torchrun_is_refused(name: str) -> None:
    """Each process would train alone."""
    with pytest.raises(UserError, match=f"names more than one process, but has no {name}\\."):
        read_launch_environment({key: value for key, value in TORCHRUN.items() if key != name})


PLACE = {"MASTER_ADDR": "rack1", "MASTER_PORT": "4711"}
MPI = [
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
]


@pytest.mark.parametrize("names", MPI)
def test_mpirun(names: tuple[str, ...]) -> None:
    env = dict(zip(names, ("5", "8", "1", "4"), strict=True))
    expected = LaunchEnvironment("mpirun", World(5, 8, 1, 4), 1, 2, "tcp://rack1:4711")
    assert read_launch_environment({**env, **PLACE}) == expected
    assert read_launch_environment({**env, **PLACE, **TASK, "SLURM_PROCID": "0"}) == expected, "in a job of Slurm"
    assert read_launch_environment({**env, **PLACE, "RANK": "5", "WORLD_SIZE": "8"}) == expected, "a wrapper script"
    assert expected.numbers() == {"NUM_SHARDS": 2, "NUM_GPUS": 4}
    assert read_launch_environment({name: {"1": "0", "8": "1"}.get(env[name], "0") for name in names[:2]}) is None
    for lost in names:
        with pytest.raises(UserError, match=f"has no {lost}"):
            read_launch_environment({key: value for key, value in env.items() if key != lost})
    with pytest.raises(UserError, match="3 of 8 processes on this machine"):
        read_launch_environment({**env, names[3]: "3"})
    with pytest.raises(UserError, match=f"{names[0]} 8, {names[1]} 8, .* ranks count from 0"):
        read_launch_environment({**env, names[0]: "8"})
    with pytest.raises(UserError, match=f"{names[1]} is 'all'"):
        read_launch_environment({**env, names[1]: "all"})


def test_srun_sets_variables_of_pmi_as_well() -> None:
    """With and without those of the machine."""
    expected = read_launch_environment(TASK)
    assert read_launch_environment({**TASK, "PMI_RANK": "3", "PMI_SIZE": "4"}) == expected
    local = {"PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
    assert read_launch_environment({**TASK, "PMI_RANK": "3", "PMI_SIZE": "4", **local}) == expected


@pytest.mark.parametrize(
    "pod",
    [
        {"RANK": "1", "WORLD_SIZE": "3"},
        {"PET_NODE_RANK": "1", "PET_NNODES": "3"},
        {"PET_NODE_RANK": "1", "PET_NNODES": "3", "RANK": "1", "WORLD_SIZE": "24"},
        {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1"},
    ],
)
def test_a_pod_is_a_machine(pod: dict[str, str], spy: "Spy", monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes operators count pods; each may spawn processes, and the config says how many."""
    place = {f"PET_{name}": value for name, value in PLACE.items()} if "PET_NNODES" in pod else PLACE
    started = read_launch_environment({**pod, **place})
    assert started is not None and started.numbers() == {"NUM_SHARDS": 3}
    assert (started.world, started.shard_id, started.init_method) == (World(1, 3, 0, 1), 1, "tcp://rack1:4711")
    set_env(monkeypatch, pod)
    with pytest.raises(UserError, match="nothing says where they meet: set MASTER_ADDR"):
        spy.launch(processes=0, num_shards=3)
    set_env(monkeypatch, place)
    assert spy.launch(processes=0, num_shards=3) == 7 and spy.told[0] == World(1, 3, 0, 1)
    assert spy.launch(processes=8, num_shards=3) == 8
    assert spy.spawned == (World(8, 24, 0, 8), "tcp://rack1:4711", 8, 8)


@pytest.mark.parametrize(
    ("env", "names"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE 2: .* has no RANK"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "rack1", "MASTER_PORT": "1"}, "WORLD_SIZE 2: .* has no RANK"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **PLACE}, "LOCAL_WORLD_SIZE"),
        ({"RANK": "1", "LOCAL_RANK": "1", **PLACE}, "WORLD_SIZE"),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "no LOCAL_RANK"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID and no MPI_LOCALNRANKS"),
        ({"PET_NNODES": "2:4", **PLACE}, "PET_NNODES 2:4"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_NTASKS 2, SLURM_PROCID 1: .* no SLURM_STEP_ID"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "no SLURM_STEP_NUM_NODES"),
    ],
)
def test_more_than_one_process_is_never_taken_for_one(env: dict[str, str], names: str) -> None:
    with pytest.raises(UserError, match=names) as raised:
        read_launch_environment(env)
    assert "torchrun" in str(raised.value) and "unset these variables" in str(raised.value)


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "0"},
        {"RANK": "3"},
        {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_FD": "6"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PET_NODE_RANK": "0", "PET_NNODES": "1", "RANK": "0", "WORLD_SIZE": "8"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
)
def test_left_over_variables_do_not_stop_a_process_that_is_alone(env: dict[str, str]) -> None:
    assert read_launch_environment(env) is None


def test_srun_with_a_task_for_each_process() -> None:
    started = read_launch_environment(TASK)
    assert started is not None
    assert (started.launcher, started.world, started.shard_id, started.num_shards) == ("srun", World(3, 4, 1, 2), 1, 2)
    assert started.init_method.startswith("tcp://n07:"), "the first host of the step, which may not be that of the job"
    assert started.numbers() == {"NUM_SHARDS": 2, "NUM_GPUS": 2}


def test_srun_with_a_task_for_each_machine() -> None:
    """It may spawn processes, and the config says how many."""
    started = read_launch_environment(TASK_PER_NODE)
    assert started is not None and (started.world, started.shard_id) == (World(1, 2, 0, 1), 1)
    assert started.numbers() == {"NUM_SHARDS": 2}
    started.check(8, 2)


def test_srun_without_a_list_of_the_step() -> None:
    """Older versions of Slurm."""
    started = read_launch_environment({name: value for name, value in TASK.items() if name != "SLURM_STEP_NODELIST"})
    assert started is not None and started.init_method.startswith("tcp://n05:")


def test_the_place_to_meet_may_be_given() -> None:
    both = read_launch_environment({**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"})
    assert both is not None and both.init_method == "tcp://10.0.0.1:99"
    host = read_launch_environment({**TASK, "MASTER_ADDR": "10.0.0.1"})
    assert host is not None and host.init_method == f"tcp://10.0.0.1:{port({})}"


@pytest.mark.parametrize("counts", ["2,1", "2(x2),1", "1,2(x3)"])
def test_uneven_tasks(counts: str) -> None:
    tasks = sum(int(part[0]) * (int(part[3]) if "x" in part else 1) for part in counts.split(","))
    machines = sum(int(part[3]) if "x" in part else 1 for part in counts.split(","))
    env = {**TASK, "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": str(machines)}
    with pytest.raises(ValueError, match=rf"{tasks} tasks unevenly on {machines} machines .*--ntasks-per-node"):
        read_launch_environment({**env, "SLURM_STEP_TASKS_PER_NODE": counts})


def test_uneven_tasks_that_could_be_even() -> None:
    """Four tasks on two machines, three of them on one."""
    with pytest.raises(ValueError, match=r"unevenly on 2 machines \(3,1 a machine\)"):
        read_launch_environment({**TASK, "SLURM_STEP_TASKS_PER_NODE": "3,1"})


@pytest.mark.parametrize("step", ["4294967291", "4294967290", "4294967294", None])
def test_the_shell_of_a_job_is_no_task(step: str | None) -> None:
    """The batch script and an interactive shell have a SLURM_PROCID as well."""
    env = {name: value for name, value in TASK.items() if name != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    assert read_launch_environment(env if step is None else {**env, "SLURM_STEP_ID": step}) is None


def test_a_step_of_one_task_runs_alone() -> None:
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert (
        read_launch_environment({**TASK, **one, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}) is None
    )


def port(changed: Mapping[str, str]) -> int:
    started = read_launch_environment({**TASK, **changed})
    assert started is not None
    return int(started.init_method.rpartition(":")[2])


def test_tasks_of_a_step_agree_on_a_port_and_neighbours_do_not_share_it() -> None:
    assert port({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}) == port({})
    ports = [
        port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job in range(900, 1000) for step in (0, 1)
    ]
    assert len(set(ports)) == len(ports), "jobs and steps that may run side by side on a machine"
    assert all(1024 < number < 32768 for number in ports), "below what Linux gives to connections"


@pytest.mark.parametrize(("by", "env"), [("torchrun", TORCHRUN), ("srun", TASK)])
def test_numbers_that_do_not_fit(by: str, env: dict[str, str]) -> None:
    started = read_launch_environment(env)
    assert started is not None
    each = started.world.local_size
    started.check(each, 2)
    started.check(0, 2)
    with pytest.raises(ValueError, match=rf"{by} started 2 machine\(s\), but NUM_SHARDS is 1: .* set NUM_SHARDS 2"):
        started.check(each, 1)
    with pytest.raises(ValueError, match=rf"{by} started {each} process\(es\) a machine, but NUM_GPUS is 3: .*{each}"):
        started.check(3, 2)


def counts(opts: list[str], started: dict[str, int] | None, recipe: str) -> tuple[int, int]:
    cfg = load_config(recipe, opts, started=started)
    return cfg.NUM_GPUS, cfg.NUM_SHARDS


def test_environment_over_yaml_command_line_over_environment(tmp_path: Path) -> None:
    recipe = str(RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml")
    given = counts([], None, recipe)
    found = {"NUM_GPUS": 4, "NUM_SHARDS": 2}
    assert given == (8, 1) == counts([], {}, recipe)
    assert counts([], found, recipe) == (4, 2)
    assert counts(["NUM_GPUS", "16"], found, recipe) == (16, 2)
    assert counts(["NUM_SHARDS", "4"], found, recipe) == (4, 4)
    assert counts(["NUM_GPUS", "0"], found, recipe) == (0, 2)
    assert counts([], {"NUM_SHARDS": 2}, recipe) == (8, 2)
    on_the_cpu = tmp_path / "cpu.yaml"
    on_the_cpu.write_text(f"_BASE_: {recipe}\nNUM_GPUS: 0\n")
    assert counts([], found, str(on_the_cpu)) == (0, 2), "0 = the CPU stays"


class Spy:
    """Records the arguments of a job, and those of run_processes."""

    def job(self, world: World, address: str, *args: object) -> int:
        self.told = (world, address, *args)
        return 7

    def run(self, job: Callable[..., int], args: tuple[Any, ...], count: int, first_rank: int = 0) -> int:
        assert job is launching._run_local_rank and args[0] == self.job and args[3] == ("data",)
        self.spawned = (args[1], args[2], count, first_rank)
        return 8

    def launch(self, **numbers: Any) -> int:
        return launch(self.job, ("data",), **numbers)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    monkeypatch.setattr(launching, "run_processes", spy.run)
    return spy


@pytest.mark.parametrize("here", [0, 1])
def test_launch_alone(here: int, spy: Spy) -> None:
    assert spy.launch(processes=here) == 7 and spy.told == (World(), "", "data")


@pytest.mark.parametrize("env", [TORCHRUN, TASK])
@pytest.mark.parametrize("cpu", [False, True])
def test_launch_as_one_that_was_started(
    env: dict[str, str], cpu: bool, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_env(monkeypatch, env)
    started = read_launch_environment(env)
    assert started is not None
    here = 0 if cpu else started.world.local_size
    assert spy.launch(processes=here, num_shards=2) == 7 and spy.told == (started.world, started.init_method, "data")
    spy.launch(processes=here, num_shards=2, init_method="tcp://x:1")
    assert spy.told == (started.world, "tcp://x:1", "data")
    with pytest.raises(ValueError, match="NUM_SHARDS is 1"):
        spy.launch(processes=here)


@pytest.mark.parametrize(
    ("said", "own"),
    [
        ({"SLURM_GPUS_PER_TASK": "1"}, True),
        ({"SLURM_GPUS_PER_TASK": "a100:1"}, True),
        ({"SLURM_GPUS_ON_NODE": "2"}, True),
        ({"SLURM_GPUS_ON_NODE": "1"}, False),
        ({}, False),
    ],
)
def test_tasks_that_see_one_gpu_each(said: dict[str, str], own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Slurm does not say that it is a task's own, one GPU is too few for two processes."""
    set_env(monkeypatch, {**TASK, **said})
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if own:
        launching.check_devices(2, "nccl")
        assert [choose_device(2, rank) for rank in (0, 1)] == [torch.device("cuda", 0)] * 2 and chosen == [0, 0]
        with pytest.raises(ValueError, match="shows 1 CUDA device"):
            launching.check_devices(3, "nccl")
        set_env(monkeypatch, {**TASK_PER_NODE, **said})
        with pytest.raises(ValueError, match="shows 1 CUDA device"):
            launching.check_devices(2, "nccl")
        return
    with pytest.raises(ValueError, match="shows 1 CUDA device"):
        launching.check_devices(2, "nccl")
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU of its own"):
        choose_device(2, 1)


def test_launch_as_a_task_that_spawns(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, TASK_PER_NODE)
    assert spy.launch(processes=2, num_shards=2, shard_id=0) == 8
    assert spy.spawned == (World(2, 4, 0, 2), f"tcp://n07:{port({})}", 2, 2), "Slurm knows the machine's number"


def test_launch_by_hand(spy: Spy) -> None:
    assert spy.launch(processes=2, num_shards=3, shard_id=1, init_method="tcp://x:1") == 8
    assert spy.spawned == (World(2, 6, 0, 2), "tcp://x:1", 2, 2)
    assert spy.launch(processes=2) == 8
    assert spy.spawned[0] == World(0, 2, 0, 2) and spy.spawned[1].startswith("tcp://127.0.0.1:")
    with pytest.raises(ValueError, match="--init_method"):
        spy.launch(processes=2, num_shards=3)


def test_processes_share_the_cores(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "available_cores", lambda: 6)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert launching._run_local_rank(1, spy.job, World(2, 4, 0, 2), "here", ("data",)) == 7
    assert spy.told == (World(3, 4, 1, 2), "here", "data")
    assert threads == [], "OMP_NUM_THREADS says how many"
    monkeypatch.delenv("OMP_NUM_THREADS")
    launching._run_local_rank(1, spy.job, World(2, 4, 0, 2), "here", ())
    assert threads == [3]


class Program:
    """tests/distributed/supervised.py in a session of its own, of which nobody is left when the test is over."""

    def __init__(self, job: str, folder: Path, *more: str) -> None:
        command = [sys.executable, "-m", "tests.distributed.supervised", job, str(folder), *more]
        self.folder, self.screen = folder, folder / "screen"
        self.process = start(command, self.screen)

    def reads(self, name: str) -> int:
        """A number that one of its processes tells, once it is there."""
        path = self.folder / name
        wait_until(path.is_file, START, name)
        return int(path.read_text())

    def ranks(self) -> list[int]:
        """Their processes."""
        return [self.reads(f"rank {index}") for index in range(2)]

    def end(self) -> tuple[int, str]:
        """Exit code, and what it said; nobody of it is left."""
        code = self.process.wait(60)
        self.await_nobody()
        return code, self.screen.read_text()

    def await_nobody(self) -> None:
        wait_until(lambda: not self.left(), 30, "nobody is left")

    def left(self) -> list[int]:
        """Whoever still runs, stopped or not."""
        return [process.pid for process in processes() if process.session == self.process.pid]

    def close(self) -> None:
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts programs."""
    started: list[Program] = []

    def begin(job: str, *more: str) -> Program:
        started.append(Program(job, tmp_path, *more))
        return started[-1]

    yield begin
    for program in started:
        program.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "code", "says"),
    [
        ("well", 0, []),
        ("preempted", PREEMPTED, []),
        ("one_is_preempted", PREEMPTED, []),
        ("one_ends_with_7", 7, ["rank 1 (process {1}) exited with code 7: see its message above"]),
        ("one_is_stopped", 7, ["rank 1 (process {1}) exited with code 7"]),
        ("one_fails", 1, ["rank 1 (process {1}) failed:\nTraceback", "in one_fails", "KeyError: 'no such key'"]),
        ("one_is_hit_again", 1, ["rank 1 (process {1}) failed:\nTraceback", "KeyError: 'no such key'"]),
        ("both_fail", 1, ["rank 1 (process {1}) failed:\nTraceback", "ValueError: the cause"]),
        ("one_fails_and_one_is_aborted", 1, ["rank 1 (process {1}) failed:\nTraceback", "KeyError: 'no such key'"]),
        ("one_is_killed", 137, ["rank 1 (process {1}) was killed by SIGKILL, from outside; running out of memory"]),
        ("one_is_terminated", 143, ["rank 1 (process {1}) was killed by SIGTERM\n"]),
    ],
)
def test_how_they_end(job: str, code: int, says: list[str], supervised: Callable[..., Program]) -> None:
    # Seconds that the others have: a busy machine needs them where both end by themselves, and nobody elsewhere.
    program = supervised(job, "60" if job in ("both_fail", "one_fails_and_one_is_aborted") else "0.1")
    pids = program.ranks()
    ended, said = program.end()
    assert ended == code, said
    for line in says:
        assert line.format(*pids) in said, said
    assert said.count("(process ") == bool(says), "one cause is named"


@pytest.mark.alone
def test_a_killed_one_ends_the_others_within_seconds(supervised: Callable[..., Program]) -> None:
    """With the times that users have."""
    program = supervised("does_not_heed")
    victim = program.ranks()[0]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    code, said = program.end()
    assert code == 137 and f"rank 0 (process {victim}) was killed by SIGKILL" in said
    assert time.monotonic() - killed < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "number"), [("heeds", signal.SIGTERM), ("heeds", signal.SIGUSR1), ("does_not_heed", signal.SIGTERM)]
)
def test_an_end_is_passed_on(job: str, number: int, supervised: Callable[..., Program]) -> None:
    """Also to processes that die of it because it found them at their start."""
    program = supervised(job)
    program.ranks()
    program.process.send_signal(number)
    assert program.end() == (PREEMPTED, "")
    heard = [path.read_text() for path in program.folder.glob("heard *")]
    assert heard == ([signal.Signals(number).name] * 2 if job == "heeds" else [])


@pytest.mark.slow
def test_a_failure_is_no_request_to_stop(supervised: Callable[..., Program]) -> None:
    """The other ranks would save, exit with PREEMPTED, and tell other nodes to do so."""
    program = supervised("one_fails_while_one_listens", "0.5")
    program.ranks()
    code, said = program.end()
    assert code == 1 and "KeyError" in said
    assert not list(program.folder.glob("heard *"))


@pytest.mark.slow
def test_usr2_is_passed_on_and_ends_nobody(supervised: Callable[..., Program]) -> None:
    program = supervised("notes_usr2")
    program.ranks()
    program.process.send_signal(signal.SIGUSR2)
    assert program.end() == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("group", [True, False])
def test_ctrl_c_is_passed_on(group: bool, supervised: Callable[..., Program]) -> None:
    """A terminal sends it to all of them, and it counts once; others send it to the parent alone."""
    program = supervised("heeds")
    program.ranks()
    (os.killpg if group else os.kill)(program.process.pid, signal.SIGINT)
    code, said = program.end()
    assert code == INTERRUPTED and "Traceback" not in said and said.count("Ctrl-C: saving") == 1, said
    assert [path.read_text() for path in program.folder.glob("heard *")] == ["SIGINT"] * 2


@pytest.mark.slow
def test_ctrl_c_that_comes_early_is_kept(supervised: Callable[..., Program]) -> None:
    program = supervised("heeds_late")
    program.ranks()
    for _ in range(3):
        os.killpg(program.process.pid, signal.SIGINT)
    (program.folder / "go on").touch()
    code, said = program.end()
    assert code == INTERRUPTED and "Traceback" not in said, said
    assert [path.read_text() for path in program.folder.glob("heard *")] == ["SIGINT"] * 2


@pytest.mark.slow
def test_a_second_ctrl_c_ends_them(supervised: Callable[..., Program]) -> None:
    program = supervised("does_not_heed")
    program.ranks()
    os.killpg(program.process.pid, signal.SIGINT)
    time.sleep(1.2)
    assert program.process.poll() is None, "the first one is heeded where they listen"
    os.killpg(program.process.pid, signal.SIGINT)
    code, said = program.end()
    assert code == -signal.SIGINT and "KeyboardInterrupt" in said and "rank" not in said


def test_ctrl_c_in_a_process_that_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one asks, what comes within a second is the same one, a later one leaves."""
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    stop, now = StopRequest(), time.monotonic
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(time, "monotonic", lambda: now() + 2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason == "SIGTERM"


def test_a_process_in_the_background_is_deaf_to_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listening():
            os.kill(os.getpid(), signal.SIGINT)
        assert not stop
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_children_die_with_their_parent(supervised: Callable[..., Program]) -> None:
    program = supervised("does_not_heed")
    program.ranks()
    program.process.kill()
    program.await_nobody()


def signal_worker(pid: int) -> None:
    """As a scheduler signals every process of a job."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        os.kill(pid, number)


@pytest.fixture
def worker(supervised: Callable[..., Program]) -> tuple[Program, int]:
    """A program with a worker, which was signalled before it could say which signals it heeds."""
    program = supervised("parent")
    pid = program.reads("worker")
    signal_worker(pid)
    (program.folder / "go on").touch()
    return program, pid


@pytest.mark.slow
def test_a_worker_heeds_its_parent_alone(worker: tuple[Program, int]) -> None:
    program, pid = worker
    for _ in range(3):
        beats = program.reads("beats")
        signal_worker(pid)
        wait_until(lambda at=beats + 5: program.reads("beats") > at or pid not in program.left(), 60, "it goes on")
        assert pid in program.left()
    (program.folder / "end it").touch()
    assert program.end() == (0, "")


@pytest.mark.slow
def test_a_worker_dies_with_its_parent(worker: tuple[Program, int]) -> None:
    program, _ = worker
    program.reads("beats")
    program.process.kill()
    program.await_nobody()
