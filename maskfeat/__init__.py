"""Masked feature prediction: MaskFeat and MFM pre-training, fine-tuning and testing in PyTorch."""

import sys

# Before anything that an older Python cannot read: the scripts of tools/ import this module first.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("maskfeat needs Python 3.10 or newer; this is Python " + sys.version.split()[0])

__version__ = "0.1.0"

_LAZY = {"load_model": "maskfeat.analysis.model", "list_models": "maskfeat.analysis.published"}
__all__ = ["__version__", *_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    """Import what `maskfeat.load_model` and `maskfeat.list_models` need when they are first used."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
