"""Pre-train, fine-tune and test: `python tools/run_net.py --cfg configs/....yaml KEY VALUE ...` (see --help)."""

import sys

from maskfeat.run import main

if __name__ == "__main__":
    sys.exit(main())
