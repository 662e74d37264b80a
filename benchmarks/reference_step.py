"""A step of MaskFeat pre-training as one writes it first: all targets, hidden ones selected, plain AdamW.

Shape legend: B samples, T frames, H x W pixels.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maskfeat.batch import Batch
from maskfeat.engine.parallelize import autocast
from maskfeat.objectives.hog import hog, hog_tokens
from maskfeat.objectives.maskfeat import MaskFeat


def frames_of(objective: MaskFeat, batch: Batch) -> Tensor:
    """The images that tokens stand for, (N, 3, H, W): of clips, the first of the frames that a token stands for."""
    if batch.clip.dim() == 4:
        return batch.clip
    return batch.clip[:, :, :: objective.backbone.frame_stride].transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def reference_target(objective: MaskFeat, batch: Batch) -> Tensor:
    """HOG of the hidden tokens of a batch, computed for all tokens and then selected: (n_hidden, F) float32."""
    hidden = objective.hidden_tokens(batch)
    images = frames_of(objective, batch)
    features = hog(images, objective.bins, objective.cell, objective.window, impl="reference")
    return hog_tokens(features, objective.cells).flatten(0, 2)[hidden.flatten()]


def reference_loss(objective: MaskFeat, batch: Batch) -> Tensor:
    """Mean squared error over the hidden tokens of a batch: a scalar with gradient."""
    hidden = objective.hidden_tokens(batch)
    tokens = objective.backbone.forward_tokens(batch.clip, batch.hidden)
    prediction = objective.pred_head(tokens.patches[hidden])
    return (prediction.float() - reference_target(objective, batch)).square().mean()


def reference_optimizer(like: Optimizer, objective: nn.Module, others: nn.Module) -> Optimizer:
    """torch.optim.AdamW with its defaults over `objective`, its groups those of `like`, which holds `others`.

    Args:
        objective, others: two copies of one model.
    """
    twin = dict(zip(others.parameters(), objective.parameters(), strict=True))
    groups = [
        {"params": [twin[p] for p in group["params"]], "weight_decay": group["weight_decay"], "lr": group["lr"]}
        for group in like.param_groups
    ]
    return torch.optim.AdamW(groups, betas=like.param_groups[0]["betas"])


def reference_step(
    objective: MaskFeat, optimizer: Optimizer, batch: Batch, clip_norm: float | None, precision: str = "off"
) -> Tensor:
    """One step of training; the loss, detached."""
    optimizer.zero_grad()
    with autocast(batch.clip.device, precision):
        loss = reference_loss(objective, batch)
    loss.backward()
    if clip_norm:
        nn.utils.clip_grad_norm_(objective.parameters(), clip_norm)
    optimizer.step()
    return loss.detach()
