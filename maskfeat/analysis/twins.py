"""Networks of timm and torchvision that compute the same as one of ours, and their names for its weights.

Shape legend: B samples, D token width, N tokens (the class token, if there is one, comes first), K classes.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import ResNet as TorchvisionResNet
from torchvision.models import VisionTransformer as TorchvisionViT

from maskfeat.analysis.foreign import CLASSIFIER
from maskfeat.analysis.hooks import captured
from maskfeat.analysis.hub import final_norm
from maskfeat.analysis.model import Model
from maskfeat.data.datasets.imagenet import tested_short_side
from maskfeat.models.mvit import MViT
from maskfeat.models.resnet import STAGES, ResNet
from maskfeat.models.vit import ViT
from maskfeat.objectives.classification import Classification

_VITS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""timm's names of Vision Transformers of patch 16 -> width, depth, heads."""
_TORCHVISION_DEPTHS = (18, 34, 50, 101, 152)


class Twin(NamedTuple):
    """A network of another library that computes the same as one of ours.

    Attributes:
        state: the weights under its names.
        load: makes the network of a file of these weights.
        outputs: of the network, for images: logits (B, K) of a classifier, otherwise tokens (B, N, D) and their pooled
            mean (B, D).
        how: Python that does what `load` does; {path} stands for the file.
    """

    state: dict[str, Tensor]
    load: Callable[[Path], nn.Module]
    outputs: Callable[[nn.Module, Tensor], Sequence[Tensor]]
    how: str


class Different(NamedTuple):
    """Why a library has no network that computes the same, in words."""

    why: str


def _head(model: Model, prefix: str) -> dict[str, Tensor]:
    """Return the weights of the classifier, below `prefix`; none of a backbone."""
    objective = model.objective
    if not isinstance(objective, Classification):
        return {}
    return {f"{prefix}{name}": value for name, value in objective.head.projection.state_dict().items()}


def _norm(model: Model, prefix: str) -> dict[str, Tensor]:
    """Return the weights of the final norm, below `prefix`; none where there is none."""
    norm = final_norm(model)
    return {} if norm is None else {f"{prefix}{name}": value for name, value in norm.state_dict().items()}


def _vit_arguments(model: Model, vit: ViT, classifies: bool) -> tuple[str, dict[str, Any]]:
    """Return the name of timm's nearest ViT, and the arguments in which this one differs from it."""
    block: Any = vit.blocks[0]
    name = next((name for name, (width, _, _) in _VITS.items() if width == vit.width), "base")
    width, depth, heads = _VITS[name]
    # As our heads pool: a norm of the mean (`fc_norm`), or of the tokens before.
    by_class_token = classifies and not model.mean_pooling and vit.cls_token is not None
    usual = {
        "img_size": 224,
        "patch_size": 16,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "class_token": True,
        "pos_embed": "learn",
        "final_norm": True,
        "fc_norm": None,
        "global_pool": "token",
        "num_classes": 1000,
    }
    own = {
        "img_size": vit.clip_size[0],  # squares, as the config has them
        "patch_size": vit.token_pixels[0],
        "embed_dim": vit.width,
        "depth": vit.num_blocks,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.width,
        "qkv_bias": block.attn.qkv.bias is not None,
        "class_token": vit.cls_token is not None,
        "pos_embed": "learn" if vit.pos_embed is not None else "none",
        "final_norm": final_norm(model) is not None,
        # With the mean, timm has an `fc_norm` unless it is told not to.
        "fc_norm": None if by_class_token or model.mean_pooling else False,
        "global_pool": "token" if by_class_token else "avg",
        "num_classes": model.objective.num_classes,
    }
    return f"vit_{name}_patch16_224", {key: value for key, value in own.items() if value != usual[key]}


def _shown(model: Model) -> dict[str, Any]:
    """Return what timm's data config says of a network: what it is shown."""
    data, short_side = model.cfg.DATA, tested_short_side(model.cfg)
    size = data.TEST_CROP_SIZE
    share = size / short_side
    while math.floor(size / share) < short_side:  # as timm computes the short side again
        share = math.nextafter(share, 0)
    said = {
        "input_size": (3, *model.clip_size),
        "mean": tuple(data.MEAN),
        "std": tuple(data.STD),
        "crop_pct": share,
        "interpolation": data.TEST_INTERPOLATION,
    }
    return {"pretrained_cfg_overlay": said}


def _written(value: object) -> str:
    """Return a value as Python, without braces, in which a path is put later."""
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key}={one!r}' for key, one in value.items())})"
    return repr(value)


def _created(name: str, arguments: dict[str, Any]) -> tuple[Callable[[Path], nn.Module], str]:
    """Return what makes a network of timm of a file, and how that is written."""
    text = "".join(f", {key}={_written(value)}" for key, value in arguments.items())
    return (
        lambda path: timm.create_model(name, checkpoint_path=str(path), **arguments).eval(),
        f'timm.create_model("{name}", checkpoint_path="{{path}}"{text})',
    )


def _timm_vit(model: Model, vit: ViT, classifies: bool) -> Twin:
    state = {name: value for name, value in vit.state_dict().items() if name != "mask_token"}
    state |= _norm(model, "fc_norm." if model.mean_pooling else "norm.")
    state |= _head(model, "head.")

    def outputs(network: Any, x: Tensor) -> Sequence[Tensor]:
        if classifies:
            return [network(x)]
        tokens = network.forward_features(x)
        return [tokens, network.forward_head(tokens)]

    name, arguments = _vit_arguments(model, vit, classifies)
    load, how = _created(name, arguments | _shown(model))
    return Twin(state, load, outputs, how)


_TORCHVISION_VIT = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


def _torchvision_vit(model: Model, vit: ViT, classifies: bool) -> Twin | Different:
    block: Any = vit.blocks[0]
    if model.mean_pooling or vit.cls_token is None:
        return Different("its ViT classifies the class token, this one the mean of the others")
    if vit.pos_embed is None or block.attn.qkv.bias is None or final_norm(model) is None:
        return Different("its ViT has positions, biases of q, k and v and a final norm")
    classes = model.objective.num_classes
    arguments = {
        "image_size": vit.clip_size[0],
        "patch_size": vit.token_pixels[0],
        "num_layers": vit.num_blocks,
        "num_heads": block.attn.num_heads,
        "hidden_dim": vit.width,
        "mlp_dim": block.mlp.fc1.out_features,
        "num_classes": max(classes, 1),
    }

    def load(path: Path) -> nn.Module:
        network = TorchvisionViT(**arguments)
        if not classifies:
            network.heads = nn.Identity()
        network.load_state_dict(load_file(path))
        return network.eval()

    def outputs(network: Any, x: Tensor) -> Sequence[Tensor]:
        out, tokens = _with_output(network, network.encoder, x)
        return [out] if classifies else [tokens, tokens[:, 1:].mean(dim=1)]

    state = _norm(model, "encoder.ln.") | _head(model, "heads.head.")
    for name, value in vit.state_dict().items():
        for pattern, other in _TORCHVISION_VIT:
            name = re.sub(pattern, other, name)
        state[name] = value
    state.pop("mask_token", None)
    text = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return Twin(state, load, outputs, _loading(f"VisionTransformer({text})", "heads", classifies))


def _loading(call: str, head: str, classifies: bool) -> str:
    """Return Python that makes a network of torchvision of a file."""
    lines = [
        f"network = torchvision.models.{call}",
        *([] if classifies else [f"network.{head} = torch.nn.Identity()"]),
        'network.load_state_dict(safetensors.torch.load_file("{path}"))',
    ]
    return "; ".join(lines)


def _with_output(network: nn.Module, part: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of a network, and that of a part of it."""
    with captured({0: part}) as found:
        return network(x), found[0]


def _depth(resnet: ResNet) -> int:
    counts = [len(stage) for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)]
    return next(d for d, (block, blocks) in STAGES.items() if blocks == counts and isinstance(resnet.layer1[0], block))


def _resnet_outputs(network: Any, x: Tensor, classifies: bool) -> Sequence[Tensor]:
    """Return the outputs of a ResNet, whose tokens are the positions of its last feature map."""
    out, last = _with_output(network, network.layer4, x)
    return [out] if classifies else [last.flatten(2).transpose(1, 2), out]


def _resnet_twin(model: Model, resnet: ResNet, classifies: bool, load: Callable[[Path], nn.Module], how: str) -> Twin:
    state = resnet.state_dict() | _head(model, "fc.")
    return Twin(state, load, lambda network, x: _resnet_outputs(network, x, classifies), how)


def _torchvision_resnet(model: Model, resnet: ResNet, classifies: bool) -> Twin:
    depth, classes = _depth(resnet), model.objective.num_classes
    block, blocks = STAGES[depth]

    def load(path: Path) -> nn.Module:
        network = TorchvisionResNet(block, blocks, num_classes=max(classes, 1))
        if not classifies:
            network.fc = nn.Identity()
        network.load_state_dict(load_file(path))
        return network.eval()

    named = f"torchvision.models.resnet.{block.__name__}"
    call = f"resnet{depth}(" if depth in _TORCHVISION_DEPTHS else f"ResNet({named}, {blocks}, "
    how = _loading(f"{call}num_classes={max(classes, 1)})", "fc", classifies)
    return _resnet_twin(model, resnet, classifies, load, how)


def twin(model: Model, library: str) -> Twin | Different:
    """Return the network of another library that computes the same, or why there is none.

    Args:
        model: ours, a classifier or a backbone.
        library: "timm" or "torchvision".
    """
    backbone: object = model.backbone
    classifies = model.kind == CLASSIFIER
    if isinstance(backbone, ViT):
        return (_timm_vit if library == "timm" else _torchvision_vit)(model, backbone, classifies)
    if isinstance(backbone, ResNet):
        if library == "torchvision":
            return _torchvision_resnet(model, backbone, classifies)
        depth = _depth(backbone)
        if depth in _TORCHVISION_DEPTHS:
            created = _created(f"resnet{depth}", {"num_classes": model.objective.num_classes, **_shown(model)})
            return _resnet_twin(model, backbone, classifies, *created)
        return Different(f"a ResNet-{depth} is not among timm's")
    if isinstance(backbone, MViT):
        return Different("its MViTv2 widens in the attention, this one in the MLP before (MVIT.DIM_MUL_IN_ATT False)")
    return Different(f"{type(backbone).__name__} is not among its networks")
