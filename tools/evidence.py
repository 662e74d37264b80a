"""Show that pre-training learns: `python tools/evidence.py --suite cifar10 --budget cpu --source DIR` (see --help)."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to the data workers
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed, too

from maskfeat.demos.evidence import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
