"""How the processes of a run start: by torchrun, by srun, or spawned here; and what the environment says of them."""

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from maskfeat.distributed.supervise import Supervisor
from maskfeat.distributed.world import World, available_cores

# Ids from here on are no numbers of steps: the batch script, an interactive shell, a pending step.
_FIRST_RESERVED_STEP = 0xFFFFFFF0

# Below the ports that Linux gives to connections by itself (32768 and up).
_FIRST_PORT, _PORTS = 15000, 17000


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the environment says of a process that something else started, as one of several.

    Attributes:
        by: "torchrun" or "srun".
        world: its place among the processes that were started.
        machine: the number of its machine.
        machines: how many there are.
        address: tcp://HOST:PORT where they meet.
    """

    by: str
    world: World
    machine: int
    machines: int
    address: str

    def numbers(self) -> dict[str, int]:
        """The config keys that follow from how the run was started.

        A single task of srun on a machine may spawn NUM_GPUS processes; then the config says how many.
        """
        numbers = {"NUM_SHARDS": self.machines}
        if self.by == "torchrun" or self.world.local_size > 1:
            numbers["NUM_GPUS"] = self.world.local_size
        return numbers

    def check(self, num_gpus: int, num_shards: int) -> None:
        """See that the config counts machines and processes as they were started; NUM_GPUS 0 is the CPU.

        Raises:
            ValueError: where it does not.
        """
        if self.machines != num_shards:
            raise ValueError(
                f"{self.by} started {self.machines} machine(s), but NUM_SHARDS is {num_shards}: leave NUM_SHARDS out, "
                f"or set NUM_SHARDS {self.machines} (learning rates scale by it, see "
                "SOLVER.BASE_LR_SCALE_NUM_SHARDS)"
            )
        processes = self.numbers().get("NUM_GPUS", num_gpus)
        if num_gpus not in (0, processes):
            raise ValueError(
                f"{self.by} started {processes} process(es) a machine, but NUM_GPUS is {num_gpus}: leave NUM_GPUS "
                f"out, or set NUM_GPUS {processes} (0 for the CPU)"
            )


def read_launch_environment(env: Mapping[str, str] = os.environ) -> LaunchEnvironment | None:
    """What torchrun or srun says of this process; None where it runs alone.

    Raises:
        ValueError: srun started different numbers of tasks on its machines.
    """
    return _torchrun(env) or _slurm_task(env)


def _torchrun(env: Mapping[str, str]) -> LaunchEnvironment | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if any(name not in env for name in names):
        return None
    rank, size, local_rank, local_size = (int(env[name]) for name in names)
    address = f"tcp://{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29500')}"
    machine = int(env.get("GROUP_RANK", rank // local_size))
    return LaunchEnvironment(
        "torchrun", World(rank, size, local_rank, local_size), machine, size // local_size, address
    )


def _slurm_task(env: Mapping[str, str]) -> LaunchEnvironment | None:
    """One of several tasks of a step. The shell of sbatch, which also has a SLURM_PROCID, belongs to no step."""
    if int(env.get("SLURM_STEP_ID", _FIRST_RESERVED_STEP)) >= _FIRST_RESERVED_STEP:
        return None
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1:
        return None
    machines = int(env["SLURM_STEP_NUM_NODES"])
    counts = env["SLURM_STEP_TASKS_PER_NODE"]
    if size % machines or len(set(re.sub(r"\(x\d+\)", "", counts).split(","))) > 1:
        raise ValueError(
            f"srun started {size} tasks unevenly on {machines} machines ({counts} a machine): give it "
            "--ntasks-per-node, because machines share batches evenly"
        )
    host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    port = env.get("MASTER_PORT") or _port(int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"]))
    world = World(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), size // machines)
    return LaunchEnvironment("srun", world, int(env["SLURM_NODEID"]), machines, f"tcp://{host}:{port}")


def first_host(nodes: str) -> str:
    """The first host of Slurm's list of nodes: "rack2n[07-09,12],x5" -> "rack2n07"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _port(job: int, step: int) -> int:
    """A port that every task of a step knows, and that steps which run side by side do not share."""
    return _FIRST_PORT + (31 * job + step) % _PORTS


def check_devices(num_gpus: int, backend: str) -> None:
    """See that this machine has the GPUs that are asked for.

    Several CPU processes are had by NUM_GPUS > 1 with DIST_BACKEND gloo on a machine without a GPU.

    Raises:
        ValueError: where it has fewer.
    """
    available = torch.cuda.device_count()
    if num_gpus <= available or (available == 0 and num_gpus > 1 and backend == "gloo"):
        return
    hint = " to run on the CPU" if available == 0 else ""
    raise ValueError(
        f"NUM_GPUS is {num_gpus}, but this machine shows {available} CUDA device(s): set NUM_GPUS {available}{hint}"
    )


def free_address() -> str:
    """A tcp:// address on this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _share_cores(processes: int) -> None:
    """As torchrun does: processes that take one another's cores spend their time in waiting for threads."""
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(available_cores() // processes, 1))


def _spawned(local_rank: int, job: Callable[..., int], plan: World, address: str, args: tuple[Any, ...]) -> int:
    _share_cores(plan.local_size)
    return job(World(plan.rank + local_rank, plan.size, local_rank, plan.local_size), address, *args)


def launch(
    job: Callable[..., int],
    args: tuple[Any, ...],
    *,
    processes: int,
    num_shards: int = 1,
    shard_id: int = 0,
    init_method: str = "",
) -> int:
    """Run `job(world, address, *args)` in every process of this machine, and wait; the exit code.

    Under torchrun, and under srun with several tasks a machine, this process is one of them. Otherwise `processes` are
    spawned and watched where there are several in all; `shard_id` of `num_shards` machines comes from srun, or as given
    together with `init_method`, where the machines meet (one machine finds an address by itself).

    Args:
        processes: on this machine, NUM_GPUS of the config; 0 = one, on the CPU.

    Raises:
        ValueError: the numbers are not those of torchrun or srun, or several machines without a place to meet.
    """
    started, address = read_launch_environment(), init_method
    if started is not None:
        started.check(processes, num_shards)
        shard_id, address = started.machine, init_method or started.address
    here = max(processes, 1)
    if started is not None and (started.world.local_size > 1 or here == 1):
        _share_cores(started.world.local_size)
        return job(started.world, address, *args)
    size = here * num_shards
    if size == 1:
        return job(World(), "", *args)
    if num_shards > 1 and not address:
        raise ValueError(f"NUM_SHARDS is {num_shards}: give --init_method tcp://HOST:PORT of the first machine")
    plan = World(shard_id * here, size, 0, here)
    return Supervisor().run(_spawned, (job, plan, address or free_address(), args), here, plan.rank)
