"""Checkpoint files: PySlowFast's format and naming, written atomically, read without running anything.

OUTPUT_DIR/checkpoints/[TASK_]checkpoint_epoch_00010.pyth holds `epoch` (counted from 0; the name counts from 1),
`model_state` (released names), `optimizer_state`, `cfg` (YAML text), `scaler_state` under fp16, and `ema_state` with
TRAIN.EMA.
"""

import argparse
import logging
import os
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

logger = logging.getLogger(__name__)

AVERAGE = "ema_state"
"""Where a checkpoint keeps the average of the weights (TRAIN.EMA)."""

# What training scripts save beside the parameters: the options of the run. They hold values and run nothing. PyTorch
# fills no dict of a class of its own, so that yacs configs become plain ones.
_OPTIONS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
_TORCHVISION = re.compile(r"\w+_Weights\.\w+")

_paths = PathManagerFactory.get("maskfeat")
_paths.register_handler(HTTPURLHandler(), allow_override=True)


def checkpoint_path(output_dir: str | Path, task: str, epoch: int) -> Path:
    """Where the checkpoint after `epoch` (counted from 0) of a run lies."""
    name = f"checkpoint_epoch_{epoch + 1:05d}.pyth"
    return Path(output_dir) / "checkpoints" / (f"{task}_{name}" if task else name)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` holds either all of it or what it held before.

    Raises:
        OSError: where the disk is full or fails; the message names the file, and nothing half-written is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a short write as a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"could not write the checkpoint {path}: {error}") from error


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


def find_checkpoints(output_dir: str | Path, task: str) -> list[Path]:
    """Checkpoints of this task in OUTPUT_DIR, oldest first; those of other tasks are left out."""
    prefix = re.escape(f"{task}_" if task else "")
    pattern = re.compile(rf"{prefix}checkpoint_epoch_(\d+)\.pyth")
    folder = Path(output_dir) / "checkpoints"
    found = [path for path in folder.glob("*.pyth") if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem.rsplit("_", 1)[1]))


def last_checkpoint(output_dir: str | Path, task: str, model_name: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint from which this run may go on, and its content.

    Raises:
        ValueError: where checkpoints under this run's names were written by another model (pre-training and
            fine-tuning with the same TASK and OUTPUT_DIR): going on would mix or overwrite them.
    """
    found = find_checkpoints(output_dir, task)
    if not found:
        return None
    path = found[-1]
    content = read_checkpoint(path)
    wrote = trained_model(content)
    if wrote not in (None, model_name):
        raise ValueError(
            f"{path} was written by MODEL.MODEL_NAME {wrote}, this run trains {model_name}: "
            "give it an OUTPUT_DIR or a TASK of its own"
        )
    return path, content


def given_or_last(
    given: str, output_dir: str | Path, task: str, model_name: str
) -> tuple[Path | str, dict[str, Any]] | None:
    """The checkpoint that a key names, or else the newest of this run, and its content; None where there is neither."""
    return (given, read_checkpoint(given)) if given else last_checkpoint(output_dir, task, model_name)
