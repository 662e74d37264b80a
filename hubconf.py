"""Entry point of `torch.hub.load`: the same as `maskfeat.load_model`."""

from typing import Any

from maskfeat.analysis.model import Model, load_model

dependencies = [
    *("torch", "torchvision", "timm", "safetensors", "yacs", "iopath", "yaml", "av", "PIL", "numpy", "simplejson"),
]


def maskfeat(source: str = "maskfeat_vit_base_in1k", **options: Any) -> Model:
    """Return a trained network.

    Args:
        source: a published name, a path or an address.
        options: `cfg`, `device` and others of `maskfeat.load_model`.
    """
    return load_model(source, **options)
