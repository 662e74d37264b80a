"""Lay out Caltech-101 in folders: `python tools/prepare_caltech101.py SOURCE DIR` (see --help)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed, too

from maskfeat.demos.caltech101 import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
