"""The same recipe with several values of some keys: see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed, too

from maskfeat.engine.sweep import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
