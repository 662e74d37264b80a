"""Against the golden values of the published implementation, and full-size models on the GPU against the CPU."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor
from yacs.config import CfgNode

from benchmarks.cases import CONFIGS, MVIT_S, RESNET_50, VIT_B, random_batch
from benchmarks.gpu.checks import (
    CPU,
    MFM_PT,
    MVIT_PT,
    VIT_PT,
    Check,
    Recipe,
    distance,
    exact,
    expect,
    largest,
    relative,
    small_config,
)
from benchmarks.gpu.parts import Context, Failed, Figures
from maskfeat.batch import Batch
from maskfeat.build import build_objective, build_optimizer
from maskfeat.config import load_config
from maskfeat.engine.parallelize import autocast
from maskfeat.engine.rng import seed_everything
from maskfeat.objectives.base import Objective
from tests.golden import mfm
from tests.golden.golden import final_norm, follow, golden_batch, load_golden, recipe, salted_objective

# The CPU's tests hold float32 to 1e-5 of the loss. A GPU adds in another order and multiplies and adds in one rounding,
# and a few gradients on the edge between two HOG bins fall on its other side: ten times as much is allowed here.
LOSS, STEPS_NORM, FINAL_NORM = 1e-4, 1e-3, 1e-5
_ENOUGH = 25.0  # seconds to draw the weights of a large model and to run it
WORST_NORM = 1e-2  # of the gradient of one parameter, relative to it or to a hundredth of the whole
LOSS_BF16 = 0.02  # as the CPU's test of bf16
GRADIENT = {"off": 1e-3, "bf16": 0.15}  # distance of the whole gradient, of its length
GRADIENT_RESNET = {"off": 3e-2, "bf16": math.inf}
"""Fifty batch norms: the golden's own float32 gradients are up to 0.9 % from those in float64, by name. In bf16 the
gradient of a network with its initial weights has hardly anything in common with that in float32 (on a CPU they are 1.4
of its length apart, while the loss agrees to 0.1 % and the length to 1.4 %): it is reported, its length is checked."""
GRADIENT_NORM = {"off": 1e-2, "bf16": 0.1}


def trajectories(context: Context) -> Figures:
    """Eight steps of four small models in float32 and in bf16."""
    found: Figures = {}
    runs = load_golden("training_trajectories")
    for run in runs[:2] if context.toy else runs:
        cfg = recipe(run["config"], run["opts"])
        for precision in ("off", "bf16"):
            objective = salted_objective(cfg, salt=run["seed"]).to(context.device)
            with exact():
                logged = follow(
                    run, objective, build_optimizer(cfg, objective), 0, precision=precision, device=context.device
                )
            pairs = list(zip(logged, run["steps"], strict=True))
            name = f"{run['name']} {precision}"
            loss = max(relative(mine["loss"], golden["loss"]) for mine, golden in pairs)
            norm = max(relative(mine["grad_norm"], golden["grad_norm"]) for mine, golden in pairs)
            final = relative(final_norm(objective), run["final_param_l2"])
            found[name] = {"loss": loss, "grad_norm": norm, "final_norm": final}
            context.note(trajectories=found)
            expect(f"the loss of {name}", loss, LOSS if precision == "off" else LOSS_BF16)
            if precision == "off":
                expect(f"the gradient norm of {name}", norm, STEPS_NORM)
                expect(f"the norm of the weights of {name}", final, FINAL_NORM)
    return found


def full_size_goldens(context: Context) -> Figures:
    """The recipes at full size, forward and backward in float32: loss, gradient norms, predictions."""
    found: Figures = {}
    ordered = sorted(load_golden("model_forward_backward"), key=lambda golden: "_L_" in golden["config"])
    for golden in ordered[:0] if context.toy else ordered:
        name = golden["config"]
        if context.left() < _ENOUGH:
            context.not_run.append(f"golden values of {name}: no time left")
            continue
        cfg = recipe(name, golden["opts"])
        objective = salted_objective(cfg, salt=7).to(context.device)
        batch = golden_batch(cfg, golden["seed"], golden["batch"]).to(context.device)
        with exact():
            out = objective(batch)
            out.loss.backward()
        norms = {objective.released_name(n): p.grad.double().norm().item() for n, p in _with_gradient(objective)}
        if norms.keys() != golden["grad_norms"].keys():
            raise Failed(f"{name}: other parameters have gradients than in the golden file")
        total = golden["grad_norm_total"]
        away = max(abs(norms[key] - norm) / max(norm, 1e-2 * total) for key, norm in golden["grad_norms"].items())
        mine = sum(norm**2 for norm in norms.values()) ** 0.5
        loss = relative(out.loss.item(), golden["loss"])
        found[name] = {"loss": loss, "grad_norm": relative(mine, total), "worst_grad_norm": away}
        context.note(full_size_goldens=found)
        expect(f"the loss of {name}", loss, LOSS)
        expect(f"the gradient norm of {name}", relative(mine, total), STEPS_NORM)
        expect(f"the norm of a parameter's gradient of {name}", away, WORST_NORM)
        del objective, batch, out
    return found


def _with_gradient(objective: Objective) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in objective.named_parameters() if p.grad is not None]


def mfm_resnet50(context: Context) -> Figures:
    """ResNet-50 with MFM's decoder at 64 x 64: the golden loss, prediction and gradient norm."""
    golden: dict[str, Any] = mfm.GOLDEN["resnet50"]
    objective = mfm.seed_recipe()
    objective.load_released_state(mfm.resnet50_state(objective))
    objective.to(context.device)
    predicted: list[Tensor] = []
    objective.decoder.register_forward_hook(lambda *arguments: predicted.append(arguments[2].detach()))
    batch = Batch(mfm.draws()[2], hidden=mfm.hidden("code")).to(context.device)
    with exact():
        out = objective.train()(batch)
        out.loss.backward()
    norms = [p.grad.double().norm().item() for _, p in _with_gradient(objective)]
    total = sum(norm**2 for norm in golden["grad_norms"].values()) ** 0.5
    return {
        "loss": expect("the loss", relative(out.loss.item(), golden["loss"]), LOSS),
        "prediction": expect("the prediction's norm", relative(predicted[0].norm().item(), golden["out_l2"]), LOSS),
        "grad_norm": expect("the gradient norm", relative(sum(n**2 for n in norms) ** 0.5, total), 1e-2),
    }


class Model(NamedTuple):
    """A model at its full size and, for a toy run, a small one of the same kind."""

    path: str
    small: Recipe
    batch: int
    gradient: dict[str, float]


MODELS = {
    "ViT-B": Model(VIT_B, VIT_PT, 2, GRADIENT),
    "MViTv2-S": Model(MVIT_S, MVIT_PT, 1, GRADIENT),
    "ResNet-50": Model(RESNET_50, MFM_PT, 8, GRADIENT_RESNET),
}


def _config(model: Model, context: Context) -> CfgNode:
    if context.toy:
        return small_config(model.small, context)
    fixed = ["NUM_GPUS", str(int(context.cuda)), "OUTPUT_DIR", str(context.folder)]
    return load_config(CONFIGS / model.path, [*fixed, "TRAIN.BATCH_SIZE", str(model.batch)])


def _passes(
    objective: Objective, batch: Batch, device: torch.device, precision: str
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by name, on the CPU, of a copy of the weights on `device`."""
    objective.to(device).zero_grad(set_to_none=True)
    seed_everything(0)
    with exact():
        with autocast(device, precision):
            out = objective(batch.to(device))
        out.loss.backward()
    return out.loss.item(), {name: p.grad.float().cpu() for name, p in _with_gradient(objective)}


def _norm(gradient: Tensor) -> float:
    """L2 norm, in float64: a sum of millions of squares in float32 is a thousandth off."""
    return gradient.double().norm().item()


def against_cpu(name: str) -> Check:
    """A model of full size on one batch: loss and gradients on the device in float32 and bf16 against the CPU's."""

    def check(context: Context) -> Figures:
        model = MODELS[name]
        cfg = _config(model, context)
        seed_everything(0)
        objective = build_objective(cfg).train()
        for module in objective.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0  # each device draws from a generator of its own
        batch = random_batch(cfg, CPU)
        expected, gradients = _passes(objective, batch, CPU, "off")
        whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
        found: Figures = {"batch": len(batch)}
        for precision in ("off", "bf16"):
            loss, mine = _passes(objective, batch, context.device, precision)
            if mine.keys() != gradients.keys():
                raise Failed("other parameters have gradients than on the CPU")
            away = distance(torch.cat([mine[key].flatten() for key in gradients]), whole)
            norms = {key: relative(_norm(mine[key]), _norm(g)) for key, g in gradients.items()}
            # Gradients that are zero in exact arithmetic, such as those of biases before a norm, are left out.
            shown = {key: norms[key] for key, g in gradients.items() if _norm(g) > 1e-2 * _norm(whole)}
            worst = max(shown, key=lambda key: shown[key])
            found[precision] = {
                "loss": relative(loss, expected),
                "gradient": away,
                "grad_norm": relative(sum(_norm(g) ** 2 for g in mine.values()) ** 0.5, _norm(whole)),
                "worst": f"{worst}: {shown[worst]:.2e}",
            }
            context.note(**{name: found})
            limit = LOSS if precision == "off" else LOSS_BF16
            expect(f"the loss in {precision}", found[precision]["loss"], limit)
            expect(f"the gradient in {precision}", away, model.gradient[precision])
            expect(f"the gradient norm in {precision}", found[precision]["grad_norm"], GRADIENT_NORM[precision])
            if precision == "off":
                expect(f"the norm of the gradient of {worst}", shown[worst], 10 * model.gradient["off"])
        return found

    return check


def channels_last(context: Context) -> Figures:
    """A ResNet's features and gradients in channels-last layout against those in PyTorch's usual layout."""
    seed_everything(0)
    objective = build_objective(small_config(MFM_PT, context)).to(context.device).train()
    backbone: Any = objective.backbone
    clip = torch.randn(8, 3, 64, 64, device=context.device)
    layouts: list[bool] = []
    hook = backbone.layer4.register_forward_hook(
        lambda *arguments: layouts.append(arguments[2].is_contiguous(memory_format=torch.channels_last))
    )

    def plain(images: Tensor) -> Tensor:
        x: Tensor = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
        for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            x = layer(x)
        return x.flatten(2).transpose(1, 2)

    def gradient(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        backbone.zero_grad(set_to_none=True)
        with exact():
            out = forward(clip)
            (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in backbone.parameters()])

    (ours, mine), (expected, theirs) = gradient(backbone), gradient(plain)
    hook.remove()
    if context.needs_cuda("the layout of a ResNet's features is channels-last") and not layouts[0]:
        raise Failed("the last feature map is not in channels-last layout")
    return {
        "features": expect("features", largest(ours, expected), 1e-3),
        "gradient": expect("the gradient", distance(mine, theirs), 1e-2),
    }
