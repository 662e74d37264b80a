"""Load weights from files without running anything they contain: checkpoints of this program, released files, and
torchvision's weights by name.
"""

import argparse
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.hub import HASH_REGEX
from torchvision.models import get_weight

from maskfeat.checkpoint.download import Beat, download, fetch, is_url, nobody
from maskfeat.checkpoint.limits import MAX_DEPTH, RefusedFile, check_file
from maskfeat.config.yaml_io import Entry, parse_entries
from maskfeat.errors import UserError
from maskfeat.file_io import NotReadable, local_path, open_regular_file

# Training scripts save the options of the run beside the parameters. Both classes hold values and run nothing. PyTorch
# fills no dict subclass but its own, so yacs configs become ordered dicts.
_OPTIONS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
CLASSES = "classes"
"""Key of the names of the classes in the checkpoint of a classifier, by their numbers."""
KIND = "kind"
"""Of a network that was exported: "backbone" where the file has no head, or "classifier"."""
# Which of the two names a file is not known here.
_KEYS = "see TRAIN.CHECKPOINT_FILE_PATH, or of a test TEST.CHECKPOINT_FILE_PATH"
_TORCHVISION = re.compile(r"\w+_Weights\.\w+")


def _torchvision_file(name: str, beat: Beat) -> Path:
    """Return the file of torchvision's weights `name`: of torchvision's cache, else fetched and checked by hash."""
    try:
        url = get_weight(name).url
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"torchvision knows no weights {name}: {_KEYS}") from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    expected = HASH_REGEX.search(path.name)
    try:
        return fetch(url, digest=expected.group(1) if expected else "", beat=beat)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def is_torchvision_name(given: str) -> bool:
    """Return whether a text is the name of weights of torchvision, such as ResNet50_Weights.IMAGENET1K_V1."""
    return _TORCHVISION.fullmatch(given) is not None


def prefetch(given: str | Path, beat: Beat) -> None:
    """Fetch a checkpoint into the cache where it is an address or a name of torchvision's weights.

    Args:
        beat: see `download`.

    Raises:
        UserError: it cannot be fetched.
    """
    _fetched(str(given), beat)


def _fetched(given: str, beat: Beat = nobody) -> Path | None:
    if is_torchvision_name(given) and not Path(given).exists():
        return _torchvision_file(given, beat)
    return download(given, beat) if is_url(given) else None


def _load(path: Path) -> Any:
    with open_regular_file(path) as file, torch.serialization.safe_globals(_OPTIONS):
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        room = check_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        _check_content(content, room)
        return content


def _load_safetensors(path: Path) -> Any:
    """Load a file that holds tensors, and texts: its metadata may have `cfg` (YAML), `kind` and `classes` (JSON).

    Its reader compares all sizes with the file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
        state = load_file(path, device="cpu")
    except SafetensorError as error:
        raise RefusedFile(str(error)) from error
    if "cfg" not in metadata:
        return state
    words = {"cfg": metadata["cfg"], KIND: metadata.get(KIND), CLASSES: json.loads(metadata.get(CLASSES, "null"))}
    return {"model_state": state, **words}


def _check_content(content: Any, size: int) -> None:
    """Check what was loaded from a file with `size` bytes of tensors.

    A larger tensor repeats its elements (strides of 0), has none (the meta device) or was never filled.

    Raises:
        RefusedFile: if a tensor is larger, or an ordered dict has attributes that hide its methods.
    """
    pending, seen = [content], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            if any(hasattr(OrderedDict, name) for name in getattr(value, "__dict__", ())):
                raise RefusedFile("it sets attributes that hide the methods of a dict")
            pending += dict.values(value)
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, Tensor) and (value.dim() > MAX_DEPTH or value.numel() * value.element_size() > size):
            shape = "x".join(map(str, value.shape[:MAX_DEPTH]))
            raise RefusedFile(f"a tensor of {shape} elements claims more than the {size} bytes it has")


def _cause(error: BaseException) -> str:
    """Return the cause of a failed torch.load in one line, in place of its advice to load the file unsafely."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return (
            f"it holds a pickled object of type {found[1][:80]}; only tensors and plain containers are read: save it "
            "again with torch.save(model.state_dict(), path)"
        )
    return (text.rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [type(error).__name__])[0][:300]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a file on the CPU without running anything it contains.

    Args:
        path: a local file, an http(s) URL, a path whose scheme has a handler (`file_io.path_manager`), or the name of
            torchvision weights such as ResNet50_Weights.IMAGENET1K_V1.

    Returns:
        what the file holds: tensors, plain values and containers of them.

    Raises:
        UserError: if the file is missing or damaged, holds other objects, or exceeds the limits in `limits`.
    """
    given = str(path)
    local = _fetched(given) or Path(local_path(given))
    try:
        content = _load(local)
    except NotReadable as error:
        if not local.exists():
            raise UserError(f"there is no checkpoint at {given}: {_KEYS}") from error
        raise UserError(f"{given} is not a readable checkpoint: {error}") from error
    except (pickle.UnpicklingError, RefusedFile) as error:
        again = f" (it was kept as {local}: delete that to fetch it again)" if is_url(given) else ""
        raise UserError(f"{given} is not loaded: {_cause(error)}{again}") from error
    # What PyTorch's reader raises on damaged files.
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        BadZipFile,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{given} is not a readable checkpoint: {_cause(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{given} holds a {type(content).__name__}, expected a dict of parameters")
    return content


def model_state(content: Mapping[str, Any], key: str | None = None) -> Mapping[str, Tensor]:
    """Return the parameters in a checkpoint.

    Args:
        content: of the file.
        key: the entry that holds them; None = `model_state`, `model`, `state_dict`, or else the file itself.

    Raises:
        UserError: if there are none.
    """
    for entry in ("model_state", "model", "state_dict") if key is None else (key,):
        if isinstance(content.get(entry), Mapping):
            return content[entry]
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return content
    raise UserError(f"no parameters in this file: it holds {sorted(map(str, content))[:8]}")


def saved_entries(content: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the config that a checkpoint carries; {} if it has none that can be read."""
    try:
        return parse_entries(content["cfg"], Path("cfg")) if isinstance(content.get("cfg"), str) else {}
    except UserError:
        return {}


def trained_model(content: Mapping[str, Any]) -> str | None:
    """Return MODEL.MODEL_NAME of the run that wrote a checkpoint; None if the file does not say."""
    entries = saved_entries(content)
    name = entries["MODEL.MODEL_NAME"].value if "MODEL.MODEL_NAME" in entries else None
    return name if isinstance(name, str) else None


def trained_classes(content: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the class folders that a checkpoint of this program was trained on, by their numbers; None if
    it does not say. In files of other programs an entry of this name may hold anything.
    """
    names = content.get(CLASSES) if isinstance(content.get("cfg"), str) else None
    return list(names) if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None
