"""Launch a run: join the processes that torchrun, srun, mpirun or a cluster's operator started, or spawn them here."""

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from maskfeat.distributed.supervise import run_processes
from maskfeat.distributed.world import World, available_cores, slurm_shows_one_each
from maskfeat.errors import UserError

# Step ids from here on are not numbered steps but the batch script, an interactive shell or a pending step.
_FIRST_RESERVED_STEP = 0xFFFFFFF0

# Below the ephemeral ports of Linux (32768 and up).
_FIRST_PORT, _PORTS = 15000, 17000

# What launchers that start every process set: its rank, their number, its rank and their number on its machine.
_OF_PROCESSES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun; the others are called mpirun
    *(
        (f"{prefix}_RANK", f"{prefix}_SIZE", f"{prefix}_LOCAL_RANK", f"{prefix}_LOCAL_SIZE")
        for prefix in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD", "MVP_COMM_WORLD", "JSM_NAMESPACE", "HOROVOD")
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray
)
# What operators of Kubernetes and the like set in each pod: the number of the pod, and how many there are.
_OF_PODS = (("PET_NODE_RANK", "PET_NNODES"), ("RANK", "WORLD_SIZE"))
_SIZES = dict.fromkeys(["PET_NNODES", *(names[column] for column in (1, 3) for names in _OF_PROCESSES)])


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the environment variables of a launcher say about this process.

    Attributes:
        launcher: "torchrun", "srun", "mpirun", or the variables of a pod.
        world: Rank and world size of this process.
        shard_id: Index of its machine.
        num_shards: Number of machines.
        init_method: tcp://HOST:PORT at which the processes meet; "" if it is not said.
    """

    launcher: str
    world: World
    shard_id: int
    num_shards: int
    init_method: str

    def numbers(self) -> dict[str, int]:
        """Return the config keys that follow from how the run was launched.

        NUM_GPUS is left to the config if one process per machine was started (not by torchrun): it may spawn several.
        """
        numbers = {"NUM_SHARDS": self.num_shards}
        if self.launcher == "torchrun" or self.world.local_size > 1:
            numbers["NUM_GPUS"] = self.world.local_size
        return numbers

    def check(self, num_gpus: int, num_shards: int) -> None:
        """Check that the config has the numbers of machines and processes that were launched.

        Args:
            num_gpus: NUM_GPUS of the config; 0 means the CPU and fits any number of processes.
            num_shards: NUM_SHARDS of the config.

        Raises:
            UserError: It does not.
        """
        if self.num_shards != num_shards:
            raise UserError(
                f"{self.launcher} started {self.num_shards} machine(s), but NUM_SHARDS is {num_shards}: leave "
                f"NUM_SHARDS out, or set NUM_SHARDS {self.num_shards} (learning rates scale by it, see "
                "SOLVER.BASE_LR_SCALE_NUM_SHARDS)"
            )
        processes = self.numbers().get("NUM_GPUS", num_gpus)
        if num_gpus not in (0, processes):
            raise UserError(
                f"{self.launcher} started {processes} process(es) a machine, but NUM_GPUS is {num_gpus}: leave "
                f"NUM_GPUS out, or set NUM_GPUS {processes} (0 for the CPU)"
            )


def read_launch_environment(env: Mapping[str, str] = os.environ) -> LaunchEnvironment | None:
    """Read the environment variables that name this process as one of several.

    Launchers that were started by another one come first: torchrun, then mpirun, srun, and pods. One that started a
    single process does not hide those around it, but for torchrun, whose user asked for it.

    Returns:
        None if this process is the only one.

    Raises:
        UserError: There are several, and the variables do not say which of them this is, or how many there are on each
            machine; or there are different numbers on different machines.
    """
    env = {name: value for name, value in env.items() if value}
    for names in _OF_PROCESSES:
        if all(name in env for name in names):
            if names is _OF_PROCESSES[0]:
                return _one_of("torchrun", env, *names)
            started, step = _one_of("mpirun", env, *names), _from_srun(env)
            same = step is not None and (step.world.rank, step.world.size) == (started.world.rank, started.world.size)
            if started.world.size > 1 and not same:  # srun sets variables of PMI as well
                return started
    found = _from_srun(env) or _from_pod(env)
    if found is None:
        _refuse_several(env)
    return found


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise UserError(f"{name} is {env[name]!r}, expected a number: correct it, or unset it") from None


def _one_of(
    launcher: str, env: Mapping[str, str], rank: str, size: str, local_rank: str = "", local_size: str = ""
) -> LaunchEnvironment:
    """Read complete variables, given their names; without local ones this process is the only one of its machine."""
    here = _number(env, local_size) if local_size else 1
    world = World(_number(env, rank), _number(env, size), _number(env, local_rank) if local_rank else 0, here)
    if not (0 <= world.rank < world.size and 0 <= world.local_rank < here <= world.size):
        given = ", ".join(f"{name} {env[name]}" for name in (rank, size, local_rank, local_size) if name)
        raise UserError(f"{given} do not fit: ranks count from 0, up to the number of processes")
    if world.size % here:
        raise UserError(
            f"{launcher} started {here} of {world.size} processes on this machine: every machine must run the same "
            "number of processes"
        )
    default = "127.0.0.1" if launcher == "torchrun" else ""
    host = env.get("MASTER_ADDR") or env.get("PET_MASTER_ADDR") or default
    port = env.get("MASTER_PORT") or env.get("PET_MASTER_PORT") or "29500"
    shard_id = _number(env, "GROUP_RANK") if launcher == "torchrun" and "GROUP_RANK" in env else world.rank // here
    return LaunchEnvironment(launcher, world, shard_id, world.size // here, f"tcp://{host}:{port}" if host else "")


def _from_srun(env: Mapping[str, str]) -> LaunchEnvironment | None:
    """Read the variables of a job step with several tasks. The shell of sbatch has a SLURM_PROCID but is in no step."""
    step = _number(env, "SLURM_STEP_ID") if "SLURM_STEP_ID" in env else _FIRST_RESERVED_STEP
    tasks = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in env), "")
    size = _number(env, tasks) if tasks else 1
    if size == 1 or (step >= _FIRST_RESERVED_STEP and _number({"SLURM_PROCID": "0", **env}, "SLURM_PROCID") == 0):
        return None
    needed = (
        "SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID",
        "SLURM_LOCALID", "SLURM_NODEID",
    )  # fmt: skip
    missing = [name for name in needed if name not in env]
    if step >= _FIRST_RESERVED_STEP or missing:
        raise _not_enough(env, [tasks, "SLURM_PROCID"], missing or ["SLURM_STEP_ID"])
    num_shards = _number(env, "SLURM_STEP_NUM_NODES")
    counts = env["SLURM_STEP_TASKS_PER_NODE"]
    if size % num_shards or len(set(re.sub(r"\(x\d+\)", "", counts).split(","))) > 1:
        raise UserError(
            f"srun started {size} tasks unevenly on {num_shards} machines ({counts} a machine): use "
            "--ntasks-per-node, because every machine must run the same number of processes"
        )
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    host = env.get("MASTER_ADDR") or first_host(nodes)
    port = env.get("MASTER_PORT") or _port(_number(env, "SLURM_JOB_ID"), step)
    world = World(_number(env, "SLURM_PROCID"), size, _number(env, "SLURM_LOCALID"), size // num_shards)
    init_method = f"tcp://{host}:{port}" if host else ""
    return LaunchEnvironment("srun", world, _number(env, "SLURM_NODEID"), num_shards, init_method)


def _from_pod(env: Mapping[str, str]) -> LaunchEnvironment | None:
    """Read the variables of a pod: its number and how many there are. Each counts as a machine."""
    if "LOCAL_RANK" in env or env.get("LOCAL_WORLD_SIZE", "1") != "1":
        return None  # one of several processes of a machine
    for rank, size in _OF_PODS:
        if rank in env and size in env:
            return _one_of(f"the job ({rank}, {size})", env, rank, size) if _number(env, size) > 1 else None
    return None


def _refuse_several(env: Mapping[str, str]) -> None:
    """Raise where variables name several processes, and too little is said to join them."""
    # A pod that is the only one may be told how many processes it is to start.
    sizes = [n for n in _SIZES if env.get(n, "1") != "1" and not (n == "WORLD_SIZE" and env.get("PET_NNODES") == "1")]
    lost = "RANK" in env and "MASTER_ADDR" in env and env["RANK"] != "0"  # a rank on its own may be anything
    if not sizes and not lost:
        return
    names = max(_OF_PROCESSES, key=lambda names: (bool(set(names) & set(sizes)), len(set(names) & set(env))))
    missing = [name for name in names if name not in env]
    raise _not_enough(env, [*sizes, *names], missing[:1] if names[0] in missing else missing)


def _not_enough(env: Mapping[str, str], seen: Sequence[str], missing: Sequence[str]) -> UserError:
    given = ", ".join(f"{name} {env[name]}" for name in dict.fromkeys(seen) if name in env)
    return UserError(
        f"{given}: the environment names more than one process, but has no {' and no '.join(missing)}. Start the run "
        "with torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for "
        "every process; unset these variables to train in one process alone"
    )


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: "rack2n[07-09,12],x5" gives "rack2n07"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _port(job: int, step: int) -> int:
    """Return a port that all tasks of a job step compute alike and concurrent steps do not share."""
    return _FIRST_PORT + (31 * job + step) % _PORTS


def check_devices(num_gpus: int, backend: str) -> None:
    """Check that this machine has the requested number of GPUs.

    Several processes on the CPU are requested by NUM_GPUS > 1 with DIST_BACKEND gloo on a machine without GPUs.

    Raises:
        UserError: It has fewer.
    """
    available = torch.cuda.device_count()
    launched = read_launch_environment()
    here = 1 if launched is None else launched.world.local_size
    if available == 1 and here == num_gpus and slurm_shows_one_each():
        return
    if num_gpus <= available or (available == 0 and num_gpus > 1 and backend == "gloo"):
        return
    hint = " to run on the CPU" if available == 0 else ""
    raise UserError(
        f"NUM_GPUS is {num_gpus}, but this machine shows {available} CUDA device(s): set NUM_GPUS {available}{hint}"
    )


def free_address() -> str:
    """Return a tcp:// address on this machine with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _limit_threads(processes: int) -> None:
    """Divide the cores among the processes of this machine, as torchrun does, unless OMP_NUM_THREADS is set."""
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(available_cores() // processes, 1))


def _run_local_rank(
    local_rank: int, job: Callable[..., int], first: World, init_method: str, args: tuple[Any, ...]
) -> int:
    """Run `job` as a spawned process; `first` is the world of local rank 0."""
    _limit_threads(first.local_size)
    return job(World(first.rank + local_rank, first.size, local_rank, first.local_size), init_method, *args)


def launch(
    job: Callable[..., int],
    args: tuple[Any, ...],
    *,
    processes: int,
    num_shards: int = 1,
    shard_id: int = 0,
    init_method: str = "",
) -> int:
    """Run `job(world, init_method, *args)` in every process of this machine, and wait for them.

    Where a launcher started several processes per machine, this process is one of them and runs the job itself.
    Otherwise, if the run has several processes in all, `processes` of them are spawned and supervised here.

    Args:
        job: A function at the top level of a module that returns an exit code.
        args: Further arguments, picklable.
        processes: Number of processes on this machine, NUM_GPUS of the config; 0 = one, on the CPU.
        num_shards: Number of machines.
        shard_id: Index of this machine; ignored where a launcher gives it.
        init_method: tcp://HOST:PORT at which the processes of several machines meet; "" = as the launcher gives it, or
            a free port if there is only one machine.

    Returns:
        The exit code; see `run_processes`.

    Raises:
        UserError: The numbers differ from those of the launcher, or `init_method` is missing.
    """
    launched = read_launch_environment()
    if launched is not None:
        launched.check(processes, num_shards)
        shard_id, init_method = launched.shard_id, init_method or launched.init_method
        if launched.world.size > 1 and not init_method:
            raise UserError(
                f"{launched.launcher} started {launched.world.size} processes, and nothing says where they meet: set "
                "MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port of it, for every process, or give "
                "--init_method tcp://HOST:PORT"
            )
    here = max(processes, 1)
    if launched is not None and (launched.world.local_size > 1 or here == 1):
        _limit_threads(launched.world.local_size)
        return job(launched.world, init_method, *args)
    size = here * num_shards
    if size == 1:
        return job(World(), "", *args)
    if num_shards > 1 and not init_method:
        raise UserError(f"NUM_SHARDS is {num_shards}: give --init_method tcp://HOST:PORT of the first machine")
    first = World(shard_id * here, size, 0, here)
    return run_processes(_run_local_rank, (job, first, init_method or free_address(), args), here, first.rank)
