"""Plain formulations from the papers, against which tools/benchmark.py measures and checks the package.

Each is what one writes down with the paper beside it, in a dozen lines of ordinary PyTorch: nothing is made slow on
purpose, nothing is made fast on purpose. They serve as oracles in the tests as well.
"""

import maskfeat  # noqa: F401  (it says so where this Python is too old)
