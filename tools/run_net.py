"""Pre-train, fine-tune and test: `python tools/run_net.py --cfg configs/....yaml KEY VALUE ...` (see --help)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed, too

from maskfeat.distributed.processes import run_program  # noqa: E402
from maskfeat.engine.run import main  # noqa: E402

if __name__ == "__main__":
    run_program(main)
