"""Whole runs of the program on the GPU: killed and resumed, under torchrun, in two processes, sharded."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
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
from maskfeat.build import build_objective, build_optimizer
from maskfeat.distributed.collectives import all_gather_object, all_reduce_sum, broadcast_buffers
from maskfeat.distributed.launch import free_address
from maskfeat.engine.metrics_log import read_json_stats
from maskfeat.engine.rng import seed_everything
from maskfeat.engine.trainer import Trainer, build_trainer
from maskfeat.optim.schedule import lr_at_epoch
from tests.reliability.harness import PRETRAINING, Forks, digest

REPO = CONFIGS.parent
KILLS = (2, 9, 16)  # steps after which a run is killed, of 30


def _logged(output: Path) -> list[dict[str, Any]]:
    """What a run logged of its steps."""
    log = output / "stdout.log"
    return read_json_stats(log, "train_iter") if log.exists() else []


def _gpus(context: Context) -> list[str]:
    return ["NUM_GPUS", str(int(context.cuda))]


def resumed(context: Context) -> Figures:
    """A run killed three times at any moment ends with the same bits as one that nobody disturbs."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic algorithms ask of cuBLAS
    common = [
        *PRETRAINING, *image_files(context), *_gpus(context), "PLUGINS", "[benchmarks.gpu.deterministic]",
        "TRAIN.CHECKPOINT_MINUTES", "0.001", "DATA_LOADER.NUM_WORKERS", "2", "SOLVER.MAX_EPOCH", "6",
        "TRAIN.MIXED_PRECISION", "bf16" if context.cuda else "False",
    ]  # fmt: skip
    folders = {name: context.folder / name for name in ("undisturbed", "killed")}
    for folder in folders.values():
        folder.mkdir()
    forks, kills = Forks(), 0
    try:

        def begin(name: str) -> Any:
            return forks.start([*common, "OUTPUT_DIR", str(folders[name])], folders[name] / "log")

        codes = [begin("undisturbed").wait()]
        for steps in KILLS:
            run = begin("killed")
            while len(_logged(folders["killed"])) < steps and run.is_there:
                time.sleep(0.005)
            run.kill()
            kills += run.wait() == -signal.SIGKILL
        codes.append(begin("killed").wait())
    finally:
        forks.close()
    if codes != [0, 0]:
        raise Failed(f"exit codes {codes}: {' | '.join(log_of(folder / 'log', 3) for folder in folders.values())}")
    bits = [digest(folder, "pt") for folder in folders.values()]
    if bits[0] != bits[1]:
        raise Failed(f"after {kills} kills the last checkpoint has other bits than that of an undisturbed run")
    if kills < len(KILLS):
        raise Failed(f"only {kills} of {len(KILLS)} runs were still there to be killed")
    return {"kills": kills, "steps": len(_logged(folders["undisturbed"])), "same bits": True}


@contextmanager
def _alone_in_a_group(context: Context) -> Any:
    """A process group of one rank: NCCL on CUDA, else gloo."""
    backend = "nccl" if context.needs_cuda("NCCL (gloo in its place)") else "gloo"
    device = torch.device("cuda", 0) if context.cuda else None
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
        expect(f"the loss of {kind}", found[kind], 1e-5)
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


def _start(arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    with open(log, "wb") as said:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def launched(context: Context) -> Figures:
    """One process by torchrun, and two processes that share the device over gloo: the losses of one process."""
    net, kind = str(REPO / "tools" / "run_net.py"), "nccl" if context.cuda else "gloo"
    base = ["--cfg", str(CONFIGS / VIT_PT[0]), *VIT_PT[1], *image_files(context), *_gpus(context)]
    base += ["TRAIN.EVAL_PERIOD", "0", "TEST.ENABLE", "False", "SOLVER.MAX_EPOCH", "1"]
    folders = {name: context.folder / name for name in ("torchrun", "two")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", net, *base]
    runs = [_start([*torchrun, "DIST_BACKEND", kind, "OUTPUT_DIR", str(folders["torchrun"])], context.folder / "0")]
    meeting = free_address()
    for shard in range(2):
        shared = ["--num_shards", "2", "--shard_id", str(shard), "--init_method", meeting, "DIST_BACKEND", "gloo"]
        half = ["TRAIN.BATCH_SIZE", "4", "OUTPUT_DIR", str(folders["two"])]
        runs.append(_start([net, *base, *shared, *half], context.folder / str(1 + shard)))
    codes = [run.wait() for run in runs]
    if any(codes):
        said = " | ".join(log_of(context.folder / str(number), 3) for number, code in enumerate(codes) if code)
        raise Failed(f"exit codes {codes}: {said}")
    alone, two = ([float(step["loss"]) for step in _logged(folder)] for folder in folders.values())
    context.needs_cuda("NCCL under torchrun")
    # Two processes add the halves of a batch in another order, and cuDNN may take another algorithm for them.
    off = max(relative(a, b) for a, b in zip(two, alone, strict=True))
    return {"steps": len(alone), "two processes": expect("the loss of two processes", off, 1e-3)}
