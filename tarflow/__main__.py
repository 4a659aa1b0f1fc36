"""`python -m tarflow VERB ...`, and under torchrun: `torchrun ... -m tarflow train ...`."""

import os
import sys
from contextlib import suppress

# `python -m` looks into the current folder first, where a file of a data set may have the name of a module. What is loaded by
# now was found before anything here could run; the command `tarflow` and `python -P -m tarflow` never look there.
if not sys.flags.safe_path:
    with suppress(OSError):  # the folder was removed
        if sys.path[0] in ("", os.getcwd()):
            del sys.path[0]

from tarflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
