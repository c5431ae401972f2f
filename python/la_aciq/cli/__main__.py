"""`python -m la_aciq.cli` is `la-aciq`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
