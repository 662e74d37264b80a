"""What stored features depend on, as short digests: features of another network or of other files are not taken."""

import hashlib

import torch

from maskfeat.analysis.inputs import Inputs
from maskfeat.analysis.model import Model


def _digest(*parts: str | bytes | memoryview) -> str:
    """Return a short digest of texts and bytes; file names need not be UTF-8."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0" if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def network_digest(model: Model) -> str:
    """Return a digest of a network's config, which says how it computes and how its inputs are read, and weights."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.objective.state_dict().items()}
    weights = (part for name, value in state.items() for part in (name, value.view(-1).view(torch.uint8).numpy().data))
    return _digest(model.cfg.dump(), *weights)


def inputs_digest(inputs: Inputs) -> str:
    """Return a digest of the paths of inputs, in order, and of their classes."""
    return _digest(*inputs.paths, inputs.numbers.tobytes(), *(inputs.classes or ()))
