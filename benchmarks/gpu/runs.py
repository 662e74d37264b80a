"""Whole runs of the program on the GPU: killed and resumed, as torchrun starts it, in two processes, sharded."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.cases import CONFIGS, random_batch
from benchmarks.gpu.checks import VIT_PT, exact, expect, image_files, log_of, relative, small_config
from benchmarks.gpu.parts import Context, Failed, Figures
from benchmarks.gpu.processes import renew_thread_pool
from maskfeat.build import build_objective, build_optimizer
from maskfeat.distributed.collectives import all_gather_object, all_reduce_sum, broadcast_buffers
from maskfeat.distributed.launch import free_address
from maskfeat.distributed.processes import exit_now
from maskfeat.engine.metrics_log import read_json_stats
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.run import main
from maskfeat.engine.trainer import Trainer, build_trainer
from maskfeat.optim.schedule import lr_at_epoch
from tests.reliability.harness import PRETRAINING, digest

KILLS = (2, 9, 16)  # steps after which a run is killed, of 30


def _logged(output: Path) -> list[dict[str, Any]]:
    """What a run logged of its steps."""
    log = output / "stdout.log"
    return read_json_stats(log, "train_iter") if log.exists() else []


def _gpus(context: Context) -> list[str]:
    return ["NUM_GPUS", str(int(context.cuda))]


def _program(arguments: Sequence[str], log: Path, variables: Mapping[str, str], deterministic: bool) -> None:
    """Run the program in this process, which was forked for it, and end."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(variables)
    renew_thread_pool()
    torch.use_deterministic_algorithms(deterministic)
    exit_now(main(arguments))


def _begin(
    arguments: Sequence[str], log: Path, variables: Mapping[str, str] | None = None, deterministic: bool = False
) -> BaseProcess:
    """Start the program in a fork of this process, which must not have used CUDA."""
    assert not torch.cuda.is_initialized(), "CUDA does not work in a fork of a process that has used it"
    process = multiprocessing.get_context("fork").Process(
        target=_program, args=(arguments, log, variables or {}, deterministic)
    )
    process.start()
    return process


def _end(process: BaseProcess) -> int:
    """Wait for its end; return the exit code, that of a signal is negative."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def resumed(context: Context) -> Figures:
    """A run killed three times at any moment ends with the same bits as one that nobody disturbs."""
    common = [
        *PRETRAINING, *image_files(context), *_gpus(context), "TRAIN.CHECKPOINT_MINUTES", "0.001",
        "DATA_LOADER.NUM_WORKERS", "2", "SOLVER.MAX_EPOCH", "6",
        "TRAIN.MIXED_PRECISION", "bf16" if context.cuda else "False",
    ]  # fmt: skip
    folders = {name: context.folder / name for name in ("undisturbed", "killed")}
    for folder in folders.values():
        folder.mkdir()

    def begin(name: str) -> BaseProcess:
        arguments = [*common, "OUTPUT_DIR", str(folders[name])]
        exactly = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what deterministic algorithms ask of cuBLAS
        return _begin(arguments, folders[name] / "log", exactly, deterministic=True)

    codes, kills = [_end(begin("undisturbed"))], 0
    for steps in KILLS:
        run = begin("killed")
        while len(_logged(folders["killed"])) < steps and run.is_alive():
            time.sleep(0.005)
        run.kill()
        kills += _end(run) == -signal.SIGKILL
    codes.append(_end(begin("killed")))
    if codes != [0, 0]:
        raise Failed(f"exit codes {codes}: {' | '.join(log_of(folder / 'log', 3) for folder in folders.values())}")
    bits = [digest(folder, "pt") for folder in folders.values()]
    if bits[0] != bits[1]:
        raise Failed(f"after {kills} kills the last checkpoint has other bits than that of an undisturbed run")
    if kills < len(KILLS):
        raise Failed(f"only {kills} of {len(KILLS)} runs were still there to be killed")
    memory = _logged(folders["undisturbed"])[-1].get("gpu_mem")
    if context.needs_cuda("GPU memory in the log") and not memory:
        raise Failed("the log does not say how much memory the GPU took")
    return {"kills": kills, "steps": len(_logged(folders["undisturbed"])), "same bits": True, "gpu_mem": memory}


def dry_run(context: Context) -> Figures:
    """A dry run says that a run would start, measures steps and, on a GPU, memory, and writes nothing."""
    output, log = context.folder / "not made", context.folder / "dry_run.log"
    code = _end(
        _begin([*PRETRAINING, *image_files(context), *_gpus(context), "OUTPUT_DIR", str(output), "--dry-run"], log)
    )
    said = log.read_text()
    if code or "The run would start." not in said or output.exists():
        raise Failed(f"exit code {code}, {output} {'is' if output.exists() else 'is not'} there: {log_of(log, 3)}")
    if context.needs_cuda("the memory that a dry run measures") and "memory of the GPU, measured" not in said:
        raise Failed("a dry run on a GPU does not say how much memory its steps took")
    return {"exit code": code, "seconds a step": float(said.split(" s a step")[0].split()[-1])}


@contextmanager
def _alone_in_a_group(context: Context) -> Iterator[str]:
    """A process group of one rank: NCCL on CUDA, else gloo."""
    backend = "nccl" if context.needs_cuda("NCCL (gloo in its place)") else "gloo"
    device = torch.device("cuda", 0) if context.cuda else None
    if device is not None:
        torch.cuda.set_device(device)  # where NCCL gathers objects
    dist.init_process_group(backend, init_method=free_address(), rank=0, world_size=1, device_id=device)
    try:
        yield backend
    finally:
        dist.destroy_process_group()


def one_rank(context: Context) -> Figures:
    """Collectives, DistributedDataParallel and FSDP2 with one rank: the steps of a plain trainer."""
    with _alone_in_a_group(context) as backend:
        value = all_reduce_sum(torch.full((3,), 2.0, device=context.device))
        gathered = all_gather_object({"rank": 0})
        broadcast_buffers(build_objective(small_config(VIT_PT, context)).to(context.device))
        if value.tolist() != [2.0] * 3 or gathered != [{"rank": 0}]:
            raise Failed(f"{backend}: all_reduce gives {value.tolist()}, all_gather {gathered}")
        losses = {kind: _three_steps(kind, context) for kind in ("plain", "ddp", "fsdp", "fsdp of one process")}
    found: Figures = {"backend": backend}
    for kind in losses:
        found[kind] = max(relative(a, b) for a, b in zip(losses[kind], losses["plain"], strict=True))
        expect(f"the loss or gradient norm of {kind}", found[kind], 1e-4)
    return found


def _three_steps(kind: str, context: Context) -> list[float]:
    """Losses and gradient norms of three steps; "fsdp of one process" is what TRAIN.PARALLEL fsdp does there."""
    cfg = small_config(VIT_PT, context, "TRAIN.PARALLEL", "fsdp" if kind == "fsdp of one process" else "ddp")
    seed_everything(0)
    if kind == "fsdp":
        objective = build_objective(cfg).to(context.device)
        mesh = init_device_mesh(context.device.type, (1,))
        for part in (*objective.backbone.repeated_blocks(), objective):
            fully_shard(part, mesh=mesh)
        optimizer = build_optimizer(cfg, objective)
        trainer = Trainer(objective, optimizer, lambda epoch: lr_at_epoch(cfg, epoch), device=context.device)
        trainer.clip_norm = cfg.SOLVER.CLIP_GRAD_L2NORM
        if not trainer.is_sharded:
            raise Failed("the trainer does not see that its objective is sharded")
    else:
        trainer = build_trainer(cfg, context.device)
    if kind == "ddp":
        trainer.model = nn.parallel.DistributedDataParallel(
            trainer.objective, gradient_as_bucket_view=True, static_graph=True
        )
    trainer.model.train()
    batch = random_batch(cfg, context.device)
    logged = []
    for _ in range(3):
        trainer.begin_step(1000)
        with exact():
            trainer.train_step(batch)
        values = trainer.metrics.read()
        logged += [values["loss"], values["grad_norm"]]
    trainer.check_finite()
    content = trainer.state_dict()
    if any(value.device.type != "cpu" for value in content["model_state"].values()):
        raise Failed(f"{kind}: a checkpoint's weights are not on the CPU")
    return logged


def launched(context: Context) -> Figures:
    """One process as torchrun starts it, and two that share the device over gloo: both log the same losses.

    The two are launched as on two machines of one GPU each: NCCL takes no two ranks on one GPU, and a single rank makes
    no process group.
    """
    arguments = ["--cfg", str(CONFIGS / VIT_PT[0]), *VIT_PT[1], *image_files(context), *_gpus(context)]
    arguments += ["TRAIN.EVAL_PERIOD", "0", "TEST.ENABLE", "False", "SOLVER.MAX_EPOCH", "1"]
    arguments += ["SOLVER.BASE_LR_SCALE_NUM_SHARDS", "False"]
    folders = {size: context.folder / str(size) for size in (1, 2)}
    processes, logs = [], []
    context.needs_cuda("a GPU under torchrun (the CPU in its place)")
    for size, folder in folders.items():
        port = free_address().rsplit(":", 1)[1]
        for rank in range(size):
            torchrun = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            backend = "nccl" if context.cuda and size == 1 else "gloo"
            batch = ["TRAIN.BATCH_SIZE", str(8 // size), "DIST_BACKEND", backend, "OUTPUT_DIR", str(folder)]
            logs.append(context.folder / f"{size}_{rank}.log")
            processes.append(_begin([*arguments, *batch], logs[-1], torchrun))
    codes = [_end(process) for process in processes]
    if any(codes):
        said = " | ".join(log_of(log, 3) for log, code in zip(logs, codes, strict=True) if code)
        raise Failed(f"exit codes {codes}: {said}")
    alone, two = ([float(step["loss"]) for step in _logged(folder)] for folder in folders.values())
    # The halves of a batch are added in another order, and convolutions have ten bits of mantissa by default (TF32).
    off = max(relative(a, b) for a, b in zip(two, alone, strict=True))
    return {"steps": len(alone), "two processes": expect("the loss of two processes", off, 5e-3)}
