"""`python -m maskfeat` is the `maskfeat` command."""

import sys

from maskfeat.cli import main

if __name__ == "__main__":
    sys.exit(main())
