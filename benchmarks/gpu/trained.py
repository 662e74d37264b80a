"""Trained networks on the GPU: loading, features and exports, against the CPU."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch.export.passes import move_to_device_pass

from benchmarks.gpu.checks import (
    CPU,
    MVIT_FT,
    VIT_FT,
    VIT_PT,
    Recipe,
    exact,
    expect,
    image_files,
    largest,
    small_config,
)
from benchmarks.gpu.parts import Context, Failed, Figures
from maskfeat.analysis import extract_features
from maskfeat.analysis.export import export
from maskfeat.analysis.model import load_model
from maskfeat.build import build_objective
from maskfeat.engine.rng import seed_everything
from maskfeat.objectives.classification import Classification

RECIPES = {"ViT": VIT_FT, "MViTv2": MVIT_FT, "pre-trained ViT": VIT_PT}
EXPORTS = (("ViT", "timm", "vit.safetensors"), ("ViT", "torch.export", "vit.pt2"), ("MViTv2", "torch.export", "m.pt2"))


def _file(name: str, recipe: Recipe, context: Context) -> Path:
    """A checkpoint of a small network with random weights."""
    cfg = small_config(recipe, context)
    seed_everything(0)
    objective = build_objective(cfg)
    path = context.folder / f"{name.replace(' ', '_')}.pyth"
    torch.save({"model_state": objective.released_state(), "cfg": cfg.dump()}, path)
    return path


def features(context: Context) -> Figures:
    """Tokens, features and blocks of a loaded network on the device are those on the CPU."""
    found: Figures = {}
    for name, recipe in RECIPES.items():
        path = _file(name, recipe, context)
        mine, expected = load_model(path, device=context.device), load_model(path, device=CPU)
        if mine.device.type != context.device.type:
            raise Failed(f"{name} was loaded on {mine.device}")
        clip = torch.randn(2, 3, *expected.backbone.clip_size, generator=torch.Generator().manual_seed(0))
        with exact():
            pairs = [(mine.features(clip), expected.features(clip)), (mine.tokens(clip).x, expected.tokens(clip).x)]
            pairs += [
                (a.x, b.x) for a, b in zip(mine.blocks(clip, [0, -1]), expected.blocks(clip, [0, -1]), strict=True)
            ]
        apart = max(largest(a, b) for a, b in pairs)
        found[name] = expect(f"features of {name}", apart, 1e-4)
    return found


def extracted(context: Context) -> Figures:
    """The program that writes features writes on its default device what it writes on the CPU."""
    _, root = image_files(context)
    path = _file("ViT", VIT_FT, context)
    rows = []
    for number, device in enumerate(([], ["--device", "cpu"])):
        output = context.folder / f"features_{number}.npz"
        given = ["--checkpoint", str(path), "--data", f"{root}/val", "--output", str(output), "--workers", "1", *device]
        with exact():
            if extract_features.main(given):
                raise Failed("extract-features failed; see the log")
        with np.load(output) as content:
            rows.append(torch.from_numpy(content["features"]))
    return {"images": len(rows[0]), "apart": expect("features", largest(*rows), 1e-3)}


def exports(context: Context) -> Figures:
    """Exports of a network compute what it computes on the device."""
    found: Figures = {}
    for name, to, file in EXPORTS[: 2 if context.toy else None]:
        path = _file(name, RECIPES[name], context)
        on_cpu, on_device = load_model(path, device=CPU), load_model(path, device=context.device)
        found[f"{name}, {to}"], _ = export(on_cpu, to, context.folder / file)
        clip = torch.randn(3, 3, *on_cpu.backbone.clip_size, generator=torch.Generator().manual_seed(0))
        with exact(), torch.no_grad():
            mine, expected = (
                cast(Classification, model.objective).logits(clip.to(model.device)) for model in (on_device, on_cpu)
            )
            if to == "torch.export":
                program = torch.export.load(context.folder / file)
                moved = move_to_device_pass(program, on_device.device).module()  # with its number, which is compared
                (mine,) = moved(clip.to(on_device.device))
        expect(f"logits of {name} exported to {to}", largest(mine, expected), 1e-4)
    return found
