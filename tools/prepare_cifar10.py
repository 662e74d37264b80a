"""Lay out CIFAR-10 as folders: `python tools/prepare_cifar10.py SOURCE DIR` (see --help)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed, too

from maskfeat.demos.cifar10 import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
