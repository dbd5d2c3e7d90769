"""``python -m fastddpm``: the same command line as the ``fastddpm`` script."""

import sys

from fastddpm.cli import main

if __name__ == "__main__":
    sys.exit(main())
