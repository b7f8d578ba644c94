"""Runs `twig` as `python -m twig`."""

import sys

from twig.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
