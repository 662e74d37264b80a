"""States as other programs write them: their names and shapes, at small sizes."""

import argparse
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

WIDTH, DEPTH = 128, 3


def timm_vit(**changed: Any) -> nn.Module:
    """A small ViT of timm whose norms and biases are not at their first values, in evaluation mode."""
    options = {"img_size": 64, "patch_size": 16, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "num_classes": 7}
    with torch.device("cpu"):  # older versions of timm cannot be built on the meta device
        model = timm.models.vision_transformer.VisionTransformer(**{**options, **changed}).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def mae_file() -> dict[str, Any]:
    """MAE's pre-training: an encoder with a norm, a mask token of the decoder, and the decoder."""
    inner = 64
    extra = {
        "mask_token": torch.zeros(1, 1, inner),
        "decoder_pos_embed": torch.zeros(1, 17, inner),
        "decoder_embed.weight": torch.zeros(inner, WIDTH),
        "decoder_embed.bias": torch.zeros(inner),
        "decoder_blocks.0.norm1.weight": torch.zeros(inner),
        "decoder_norm.weight": torch.zeros(inner),
        "decoder_pred.weight": torch.zeros(768, inner),
    }
    return {"model": {**timm_vit(num_classes=0).state_dict(), **extra}}


def resnet_state(depth: int, classes: int | None, channels: int | None = None) -> dict[str, Tensor]:
    """torchvision's ResNet with its classifier, and MFM's decoder of `channels` where that is given."""
    model = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes or 1)
    state = dict(model.state_dict())
    width = state["fc.weight"].shape[1]
    if classes is None:
        del state["fc.weight"], state["fc.bias"]
    if channels is not None:
        state["decoder.0.weight"] = torch.zeros(channels * 32**2, width, 1, 1)
        state["decoder.0.bias"] = torch.zeros(channels * 32**2)
    return state


def mfm_vit_state(norm: bool = True) -> dict[str, Tensor]:
    """Pre-training of MFM's paper: prefixes, and a decoder of three channels."""
    inner = {name: value for name, value in timm_vit(num_classes=0).state_dict().items() if norm or "norm." not in name}
    state = {f"encoder.{name}": value for name, value in inner.items()}
    return {**state, "decoder.0.weight": torch.zeros(768, WIDTH, 1, 1), "decoder.0.bias": torch.zeros(768)}


def training_script(state: dict[str, Tensor]) -> dict[str, Any]:
    """The file of a training script in torchvision's manner."""
    return {"model": state, "optimizer": {}, "lr_scheduler": {}, "epoch": 9, "args": argparse.Namespace(lr=0.1)}


def as_meta(manifest: dict[str, list[int]]) -> dict[str, Any]:
    """A file with these names and shapes, without memory."""
    return {"model_state": {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}}
