"""Masked feature prediction: MaskFeat and MFM pre-training, fine-tuning and testing in PyTorch."""

import sys

# Before anything that an older Python cannot read: the scripts of tools/ import this module first.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("maskfeat needs Python 3.10 or newer; this is Python " + sys.version.split()[0])

__version__ = "0.1.0"
