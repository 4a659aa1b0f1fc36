"""How many random cases a test draws: all in CI (the variable CI is set), a share of them on the way there.

Only the number differs: every draw is held to the same claim. Tests with a grid of cases do the whole grid everywhere.
"""

import os

IN_CI = bool(os.environ.get("CI"))
SHARE = 4


def draws(in_ci: int) -> int:
    """So many in CI, a quarter of them elsewhere, never under five."""
    return in_ci if IN_CI else max(5, in_ci // SHARE)
