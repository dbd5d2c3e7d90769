"""``python -m fastddpm``: the same command line as the ``fastddpm`` script."""

from fastddpm.cli import main

if __name__ == "__main__":
    main()
