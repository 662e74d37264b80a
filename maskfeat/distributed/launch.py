"""Launch a run: join the processes that torchrun or srun started, or spawn them here."""

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from maskfeat.distributed.supervise import run_processes
from maskfeat.distributed.world import World, available_cores
from maskfeat.errors import UserError

# Step ids from here on are not numbered steps but the batch script, an interactive shell or a pending step.
_FIRST_RESERVED_STEP = 0xFFFFFFF0

# Below the ephemeral ports of Linux (32768 and up).
_FIRST_PORT, _PORTS = 15000, 17000


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the environment variables of torchrun or srun say about this process.

    Attributes:
        launcher: "torchrun" or "srun".
        world: Rank and world size of this process.
        shard_id: Index of its machine.
        num_shards: Number of machines.
        init_method: tcp://HOST:PORT at which the processes meet.
    """

    launcher: str
    world: World
    shard_id: int
    num_shards: int
    init_method: str

    def numbers(self) -> dict[str, int]:
        """Return the config keys that follow from how the run was launched.

        NUM_GPUS is left to the config if srun started one task per machine, which may spawn several processes.
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
    """Read the environment variables of torchrun or srun.

    Returns:
        None if neither of them started this process as one of several.

    Raises:
        UserError: srun started different numbers of tasks on its machines.
    """
    return _from_torchrun(env) or _from_srun(env)


def _from_torchrun(env: Mapping[str, str]) -> LaunchEnvironment | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in env for name in names):
        return None
    rank, size, local_rank, local_size = (int(env[name]) for name in names)
    init_method = f"tcp://{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29500')}"
    shard_id = int(env.get("GROUP_RANK", rank // local_size))
    world = World(rank, size, local_rank, local_size)
    return LaunchEnvironment("torchrun", world, shard_id, size // local_size, init_method)


def _from_srun(env: Mapping[str, str]) -> LaunchEnvironment | None:
    """Read the variables of a job step with several tasks. The shell of sbatch has a SLURM_PROCID but is in no step."""
    if int(env.get("SLURM_STEP_ID", _FIRST_RESERVED_STEP)) >= _FIRST_RESERVED_STEP:
        return None
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1:
        return None
    num_shards = int(env["SLURM_STEP_NUM_NODES"])
    counts = env["SLURM_STEP_TASKS_PER_NODE"]
    if size % num_shards or len(set(re.sub(r"\(x\d+\)", "", counts).split(","))) > 1:
        raise UserError(
            f"srun started {size} tasks unevenly on {num_shards} machines ({counts} a machine): use "
            "--ntasks-per-node, because every machine must run the same number of processes"
        )
    host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    port = env.get("MASTER_PORT") or _port(int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"]))
    world = World(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), size // num_shards)
    return LaunchEnvironment("srun", world, int(env["SLURM_NODEID"]), num_shards, f"tcp://{host}:{port}")


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

    Under torchrun, and under srun with several tasks per machine, this process is one of them and runs the job itself.
    Otherwise, if the run has several processes in all, `processes` of them are spawned and supervised here.

    Args:
        job: A function at the top level of a module that returns an exit code.
        args: Further arguments, picklable.
        processes: Number of processes on this machine, NUM_GPUS of the config; 0 = one, on the CPU.
        num_shards: Number of machines.
        shard_id: Index of this machine; ignored where torchrun or srun gives it.
        init_method: tcp://HOST:PORT at which the processes of several machines meet; "" = as torchrun or srun
            gives it, or a free port if there is only one machine.

    Returns:
        The exit code; see `run_processes`.

    Raises:
        UserError: The numbers differ from those of torchrun or srun, or `init_method` is missing.
    """
    launched = read_launch_environment()
    if launched is not None:
        launched.check(processes, num_shards)
        shard_id, init_method = launched.shard_id, init_method or launched.init_method
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
