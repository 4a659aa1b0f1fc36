"""Programs that tests start as processes of their own, to kill them, to signal them, or for what they load: a file each.

For ranks of a training see `tests.helpers.ranks`, which needs no program.
"""

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ENV = os.environ | {"PYTHONPATH": str(FOLDER.parents[2]), "OMP_NUM_THREADS": "1"}


def program(name: str, *arguments: object) -> list[str]:
    """The command line of one of them; it wants ENV."""
    return [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)]
