"""Measure speed and memory against plain formulations: see --help and docs/speed.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed, too

from benchmarks.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
