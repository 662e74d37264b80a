"""Weights from files, read without running anything that they contain: checkpoints of this program, released files,
torchvision's weights by name.
"""

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from zipfile import BadZipFile

import torch
import yaml
from iopath.common.file_io import HTTPURLHandler, PathManagerFactory
from torch import Tensor
from torchvision.models import get_weight

# What training scripts save beside the parameters: the options of the run. They hold values and run nothing. PyTorch
# fills no dict of a class of its own, so that yacs configs become plain ones.
_OPTIONS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
_TORCHVISION = re.compile(r"\w+_Weights\.\w+")

_paths = PathManagerFactory.get("maskfeat")
_paths.register_handler(HTTPURLHandler(), allow_override=True)


def _torchvision_weights(name: str) -> dict[str, Any]:
    """torchvision's weights by name, from its cache (TORCH_HOME) or, checked against their hash, its server."""
    try:
        weights = get_weight(name)
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"torchvision knows no weights {name}: see TRAIN.CHECKPOINT_FILE_PATH") from error
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except URLError as error:
        raise ValueError(f"{name} could not be fetched from {weights.url}: {error.reason}") from error


def _load(given: str) -> Any:
    if _TORCHVISION.fullmatch(given) and not Path(given).exists():
        return _torchvision_weights(given)
    with torch.serialization.safe_globals(_OPTIONS):
        return torch.load(_paths.get_local_path(given), map_location="cpu", weights_only=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file on the CPU, never running what it contains.

    Args:
        path: of a file here, an http(s) address, or torchvision's name of weights: ResNet50_Weights.IMAGENET1K_V1.

    Raises:
        ValueError: where it is missing, damaged, or holds more than tensors and plain values.
    """
    given = str(path)
    try:
        content = _load(given)
    except FileNotFoundError as error:
        raise ValueError(f"there is no checkpoint at {given}: see TRAIN.CHECKPOINT_FILE_PATH") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{given} is damaged or holds more than tensors and plain values, and is not loaded: {error}"
        ) from error
    # What PyTorch's reader raises on damaged files.
    except (
        RuntimeError,
        EOFError,
        BadZipFile,
        LookupError,
        OSError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        raise ValueError(f"{given} is not a readable checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{given} holds a {type(content).__name__}, expected a dict of parameters")
    return content


def model_state(content: Mapping[str, Any], key: str | None = None) -> Mapping[str, Tensor]:
    """The parameters in a checkpoint: under `key`, or else `model_state`, `model`, `state_dict`, or the file itself."""
    for place in ("model_state", "model", "state_dict") if key is None else (key,):
        if isinstance(content.get(place), Mapping):
            return content[place]
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return content
    raise ValueError(f"no parameters in this file: it holds {sorted(map(str, content))[:8]}")


def trained_model(content: Mapping[str, Any]) -> str | None:
    """MODEL.MODEL_NAME of the run that wrote a checkpoint; None where the file does not say."""
    try:
        cfg = yaml.safe_load(content["cfg"]) if isinstance(content.get("cfg"), str) else None
    except yaml.YAMLError:
        return None
    model = cfg.get("MODEL") if isinstance(cfg, Mapping) else None
    return model.get("MODEL_NAME") if isinstance(model, Mapping) else None
