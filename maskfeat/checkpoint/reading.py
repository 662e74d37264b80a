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
from torch import Tensor
from torch.hub import HASH_REGEX
from torchvision.models import get_weight

from maskfeat.checkpoint.download import download, is_url
from maskfeat.checkpoint.weight_scan import Refused, scan
from maskfeat.config.yaml_io import parse_entries
from maskfeat.file_io import NotReadable, local_path, open_regular_file

# What training scripts save beside the parameters: the options of the run. They hold values and run nothing. PyTorch
# fills no dict of a class of its own, so that yacs configs become plain ones.
_OPTIONS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
_TORCHVISION = re.compile(r"\w+_Weights\.\w+")


def _torchvision_file(name: str) -> Path:
    """torchvision's weights by name, in its cache (TORCH_HOME) or, checked against their hash, from its server."""
    try:
        url = get_weight(name).url
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"torchvision knows no weights {name}: see TRAIN.CHECKPOINT_FILE_PATH") from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        promised = HASH_REGEX.search(path.name)
        try:
            torch.hub.download_url_to_file(url, str(path), promised and promised.group(1), progress=False)
        except URLError as error:
            raise ValueError(f"{name} could not be fetched from {url}: {error.reason}") from error
    return path


def _local_file(given: str) -> Path:
    if _TORCHVISION.fullmatch(given) and not Path(given).exists():
        return _torchvision_file(given)
    return download(given) if is_url(given) else Path(local_path(given))


def _load(path: Path) -> Any:
    with open_regular_file(path) as file, torch.serialization.safe_globals(_OPTIONS):
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        scan(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def _load_safetensors(path: Path) -> Any:
    """A file of tensors alone, whose reader compares all sizes with the file."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise Refused("it takes the package safetensors to read it") from error
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise Refused(str(error)) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file on the CPU, never running what it contains.

    What a file claims is compared with what it has before anything is allocated for it, see `weight_scan`.

    Args:
        path: of a file here, an http(s) address, a path whose scheme has a handler (`file_io.path_manager`), or
            torchvision's name of weights: ResNet50_Weights.IMAGENET1K_V1.

    Raises:
        ValueError: where it is missing, damaged, or holds more than tensors and plain values.
    """
    given = str(path)
    local = _local_file(given)
    try:
        content = _load(local)
    except NotReadable as error:
        if not local.exists():
            raise ValueError(f"there is no checkpoint at {given}: see TRAIN.CHECKPOINT_FILE_PATH") from error
        raise ValueError(f"{given} is not a readable checkpoint: {error}") from error
    except (pickle.UnpicklingError, Refused) as error:
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
        entries = parse_entries(content["cfg"], Path("cfg")) if isinstance(content.get("cfg"), str) else {}
    except ValueError:
        return None
    name = entries["MODEL.MODEL_NAME"].value if "MODEL.MODEL_NAME" in entries else None
    return name if isinstance(name, str) else None
