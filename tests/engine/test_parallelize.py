"""What wraps a model from outside changes neither its numbers nor the names of its parameters."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskfeat.batch import Batch
from maskfeat.build import build_mask_sampler, build_objective, build_optimizer
from maskfeat.config import load_config
from maskfeat.engine.memory import _make_fake
from maskfeat.engine.parallelize import apply_activation_checkpointing, apply_compile
from maskfeat.objectives.base import Objective
from tests.golden.golden import golden_batch, recipe, salted_objective
from tests.golden.test_trajectories import RUNS, assert_follows, follow
from tests.small import MFM_PT, MFM_RECIPES, MVIT_PT, RECIPES, VIT_PT

PRETRAINING = {
    "vit": (RECIPES / "in1k_VIT_B_MaskFeat_PT.yaml", VIT_PT),
    "mvit": (RECIPES / "k400_MVITv2_S_16x4_MaskFeat_PT.yaml", MVIT_PT),
    "resnet": (MFM_RECIPES / "in1k_R50_MFM_PT.yaml", MFM_PT),
}


def kept_bytes(objective: Objective, batch: Batch) -> int:
    """Bytes of activations that wait for the backward pass, counted by storage, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in (*objective.parameters(), *objective.buffers())}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        objective(batch).loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("name", ["tiny_vit_pt", "tiny_mvit_pt"])
def test_light_recomputation(name: str) -> None:
    run = RUNS[name]
    cfg = recipe(run["config"], run["opts"])
    plain, light = (salted_objective(cfg, salt=run["seed"]) for _ in range(2))
    names = list(light.released_state())
    apply_activation_checkpointing(light, light=True)
    assert list(light.released_state()) == names
    logged = [follow(run, objective, build_optimizer(cfg, objective), first=6) for objective in (plain, light)]
    assert logged[0] == logged[1]
    batch = golden_batch(cfg, 1, 2)
    assert kept_bytes(light, batch) < {"tiny_vit_pt": 0.85, "tiny_mvit_pt": 0.75}[name] * kept_bytes(plain, batch)


def compiled(objective: Objective) -> Objective:
    torch.compiler.reset()
    apply_compile(objective, torch.device("cpu"))
    return objective


@pytest.mark.slow
@pytest.mark.parametrize(("name", "light", "blocks"), [("tiny_vit_pt", False, 3), ("tiny_mvit_pt", True, 2)])
def test_compiled_follows_the_published_steps(
    name: str, light: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a ViT share compiled code; those of an MViT are unlike, and each takes the compiler a minute: the
    first, and the second, which widens and pools its queries, stand for the rest."""
    run = RUNS[name]
    cfg = recipe(run["config"], run["opts"])
    objective = salted_objective(cfg, salt=run["seed"])
    names = list(objective.released_state())
    all_blocks = objective.backbone.repeated_blocks()
    monkeypatch.setattr(objective.backbone, "repeated_blocks", lambda: all_blocks[:blocks])
    if light:
        apply_activation_checkpointing(objective, light=True)
    logged = follow(run, compiled(objective), build_optimizer(cfg, objective), first=0)
    assert list(objective.released_state()) == names
    assert_follows(run, logged)


@pytest.mark.parametrize("recomputed", ["", "light", "blocks"])
@pytest.mark.parametrize("name", ["vit", "mvit"])
def test_blocks_are_compiled(name: str, recomputed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as one graph, and what is recomputed in its backward pass within it."""
    backbone = (objective := on_device(name, "cpu")[0]).backbone
    monkeypatch.setattr(type(objective), "compilable", ())  # targets, which are outside of the blocks
    clip = torch.randn(2, 3, *backbone.clip_size)

    def gradients() -> list[Tensor]:
        backbone.zero_grad()
        with torch.random.fork_rng():  # for equal drops of paths
            backbone.forward_tokens(clip).x.square().sum().backward()
        return [p.grad.clone() for p in backbone.parameters() if p.grad is not None]

    wanted = gradients()
    if recomputed:
        apply_activation_checkpointing(objective, light=recomputed == "light")
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    compiled(objective)
    torch.testing.assert_close(gradients(), wanted)
    assert counter.frame_count == {"vit": 1, "mvit": 2}[name], "equal blocks share one, and none is in two parts"


@pytest.mark.slow
def test_compiled_resnet() -> None:
    path, opts = PRETRAINING["resnet"]
    cfg = load_config(path, opts)
    torch.manual_seed(0)
    objective = build_objective(cfg).train()
    batch = Batch(torch.randn(2, 3, 32, 32), hidden=torch.tensor([True, False]).view(2, 1, 1))
    wanted = objective(batch).loss
    torch.testing.assert_close(compiled(objective)(batch).loss, wanted, rtol=1e-5, atol=1e-6)


def test_compilation_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    objective = build_objective(load_config(*PRETRAINING["vit"]))
    with pytest.raises(ValueError, match=r"TRAIN.COMPILE False"):
        apply_compile(objective, torch.device("cpu"))


def test_compilation_for_a_gpu_needs_the_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskfeat.engine.parallelize.shutil.which", lambda name: name)
    monkeypatch.setattr("maskfeat.engine.parallelize.sysconfig.get_path", lambda name: str(tmp_path))
    objective = build_objective(load_config(*PRETRAINING["vit"]))
    with pytest.raises(ValueError, match=r"Python.h, .* python3-dev\): install them, or set TRAIN.COMPILE False"):
        apply_compile(objective, torch.device("cuda"))
    (tmp_path / "Python.h").touch()
    apply_compile(objective, torch.device("cuda"))
    assert not torch._functorch.config.graphsafe_rng_functionalization, "draws of recomputed blocks follow the seed"


def on_device(name: str, device: str) -> tuple[Objective, Batch]:
    """A small pre-training network and a batch."""
    path, opts = PRETRAINING[name]
    cfg = load_config(path, opts)
    sampler = build_mask_sampler(cfg)
    assert sampler is not None
    with torch.device(device):
        objective = build_objective(cfg).train()
        frames = () if objective.backbone.clip_size[2:] == () else (cfg.DATA.NUM_FRAMES,)
        clip = torch.empty(4, 3, *frames, 32, 32)
        hidden = torch.empty(4, *sampler(np.random.default_rng(0)).shape, dtype=torch.bool)
    return objective, Batch(clip, hidden=hidden, max_hidden=2)


@pytest.mark.parametrize("name", list(PRETRAINING))
def test_no_step_reads_from_the_device(name: str) -> None:
    """On the meta device nothing has a value: whatever would wait for one raises."""
    objective, batch = on_device(name, "meta")
    out = objective(batch)
    out.loss.backward()
    assert all(p.grad is not None for p in objective.parameters())
    assert {v.device.type for v in out.metrics.values()} == {"meta"}
    read: Callable[[], object] = out.loss.item
    with pytest.raises((RuntimeError, NotImplementedError)):
        read()


class Copies(TorchDispatchMode):
    """Notes every operator that takes or returns tensors of two devices, but for those that a GPU need not wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        if len(devices) > 1 and func is not torch.ops.aten.fill_.Tensor:  # with a number of the host
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("name", list(PRETRAINING))
def test_no_step_copies_from_the_host(name: str) -> None:
    """As a GPU would compute it, on tensors without values: such a copy makes the host wait for it."""
    objective, batch = on_device(name, "meta")
    assert batch.hidden is not None
    with FakeTensorMode(), torch.device("cuda:0"):
        _make_fake(objective)
        clip, hidden = torch.empty(batch.clip.shape), torch.empty(batch.hidden.shape, dtype=torch.bool)
        with Copies() as copies:
            loss = objective(Batch(clip, hidden=hidden, max_hidden=2)).loss
    assert loss.is_cuda and not copies.found
