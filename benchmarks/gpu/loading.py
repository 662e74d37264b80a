"""Batches from JPEG and H.264 files that arrive on the GPU, and evaluation there, against the CPU."""

import json
from collections.abc import Mapping

import torch
from yacs.config import CfgNode

from benchmarks.gpu.checks import (
    CPU,
    MVIT_FT,
    MVIT_PT,
    RESIDENT,
    VIT_FT,
    VIT_PT,
    Recipe,
    clip_files,
    exact,
    expect,
    image_files,
    largest,
    relative,
    small_config,
)
from benchmarks.gpu.parts import Context, Failed, Figures
from maskfeat.batch import Batch, SampleKey
from maskfeat.build import build_loader, build_objective
from maskfeat.data.collate import collate
from maskfeat.engine.evaluate import multi_view_test, validate
from maskfeat.engine.rng import seed_everything

RECIPES: Mapping[str, tuple[Recipe, tuple[str, ...]]] = {
    "images": (VIT_PT, ()),
    "augmented images": (VIT_FT, ()),
    "resident images": (VIT_PT, RESIDENT),
    "clips": (MVIT_PT, ()),
    "augmented clips": (MVIT_FT, ()),
}


def _config(recipe: Recipe, context: Context, *opts: str) -> CfgNode:
    files = clip_files(context) if "k400" in recipe[0] else image_files(context)
    return small_config(recipe, context, *files, "DATA_LOADER.NUM_WORKERS", "1", "TRAIN.BATCH_SIZE", "4", *opts)


def batches_on_the_device(context: Context) -> Figures:
    """The first two training batches on the device are those on the CPU."""
    found: Figures = {}
    for name, (recipe, opts) in RECIPES.items():
        cfg = _config(recipe, context, *opts)
        pairs = list(zip(_first_two(cfg, context.device), _first_two(cfg, CPU), strict=True))
        for mine, expected in pairs:
            for field in ("label", "hidden", "index"):
                a, b = getattr(mine, field), getattr(expected, field)
                if (a is None) != (b is None) or (a is not None and not torch.equal(a.cpu(), b)):
                    raise Failed(f"{name}: `{field}` differs from the CPU's")
            if mine.clip.device.type != context.device.type:
                raise Failed(f"{name}: the clip is on {mine.clip.device}")
        # Augmentation rounds to grey levels in between: a rounding of the device can become a whole level there.
        away = [(mine.clip.cpu() - expected.clip).abs() for mine, expected in pairs]
        share = max((a > 1e-3).float().mean().item() for a in away)
        found[name] = {"largest": max(a.max().item() for a in away), "pixels apart": share}
        context.note(batches=found)
        expect(f"the share of pixels of {name} that differ", share, 0.02 if "augmented" in name else 0.0)
    return found


def _first_two(cfg: CfgNode, device: torch.device) -> list[Batch]:
    loader = build_loader(cfg, "train", device=device)
    loader.set_epoch(0)
    batches = iter(loader)
    return [next(batches), next(batches)]


def pinned_memory(context: Context) -> Figures:
    """A batch of clips in page-locked memory, and its copy to the device."""
    dataset = build_loader(_config(MVIT_PT, context), "train").dataset
    packed = collate([dataset[SampleKey(0, index)] for index in range(2)])
    if not context.needs_cuda("page-locked memory"):
        return {"bytes": packed.pixels.numel()}
    pinned = packed.pin_memory()
    if not pinned.pixels.is_pinned():
        raise Failed("the pixels are not in page-locked memory")
    mine, expected = pinned.to_batch(context.device), packed.to_batch(CPU)
    return {
        "bytes": packed.pixels.numel(),
        "apart": expect("the clip", (mine.clip.cpu() - expected.clip).abs().max().item(), 1e-3),
    }


def evaluation(context: Context) -> Figures:
    """Validation and testing with several views: scores on the device are those on the CPU."""
    found: Figures = {}
    for name, recipe in (("ViT", VIT_FT), ("MViTv2", MVIT_FT)):
        cfg = _config(recipe, context)
        seed_everything(0)
        objective = build_objective(cfg).eval()
        figures: dict[str, tuple[dict[str, float], dict[str, float], torch.Tensor]] = {}
        for device in (CPU, context.device):
            objective.to(device)
            loaders = [build_loader(cfg, split, device=device) for split in ("val", "test")]
            with exact(), torch.no_grad():
                validated = validate(objective, loaders[0], device, "off")
                tested, details = multi_view_test(objective, loaders[1], loaders[1].labels, device, "off")
                scores = objective.predict(next(iter(loaders[0]))).cpu()
            if len(json.loads(details)["samples"]) != len(loaders[1].labels):
                raise Failed(f"{name}: not every sample was tested")
            figures[str(device)] = validated, tested, scores
        (validated, tested, scores), (mine, my_test, my_scores) = figures["cpu"], figures[str(context.device)]
        found[name] = {"scores": largest(my_scores, scores), **mine}
        expect(f"the scores of {name}", found[name]["scores"], 1e-4)
        one = 100.0 / 8 + 1e-3  # one sample of the smallest split: two scores may be a rounding apart
        expect(f"top1 of {name} in validation", abs(mine["top1"] - validated["top1"]), one)
        expect(f"top1 of {name} in testing", abs(my_test["top1"] - tested["top1"]), one)
    found["pre-training"] = _validated_loss(context)
    return found


def _validated_loss(context: Context) -> float:
    cfg = _config(VIT_PT, context)
    seed_everything(0)
    objective = build_objective(cfg)
    losses = []
    for device in (CPU, context.device):
        with exact():
            losses.append(
                validate(objective.to(device), build_loader(cfg, "val", device=device), device, "off")["loss"]
            )
    return expect("the validation loss of ViT", relative(losses[1], losses[0]), 1e-4)
