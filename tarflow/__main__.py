"""`python -m tarflow VERB ...`, and under torchrun: `torchrun ... -m tarflow train ...`."""

import sys

from tarflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
