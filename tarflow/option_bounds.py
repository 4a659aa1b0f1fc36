"""Bounds of the numbers on the command line, of every verb, before anything is done: as of those in a configuration.

An option that may not be 0 says so itself.
"""

import argparse
import math
from collections.abc import Mapping

_MONTH_S = 30 * 86_400
# Option -> its least and largest value. What is not named counts something: no fewer than 0, no more than COUNTED.
COUNTED = 10**15
BOUNDS: Mapping[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**63 - 1),
    "keep_latest": (-1, COUNTED),  # -1: all
    "ranks": (0, 1024), "tasks_per_node": (0, 1024), "nodes": (0, 1 << 16), "world_size": (0, 1 << 20), "rank": (0, 1 << 20),
    "max_restarts": (0, 10**6),
    "threads": (0, 4096), "processes": (0, 1024), "nice": (0, 19),
    "every": (0, _MONTH_S), "wait": (0, _MONTH_S), "poll": (0, _MONTH_S), "wait_for_run": (0, _MONTH_S),
    "idle_limit": (0, _MONTH_S / 60),
    "num": (0, 10**8), "start": (0, 10**8), "final": (0, 10**8), "columns": (0, 10_000), "batch_size": (0, 1 << 20),
    "count": (0, 100_000), "tile": (0, 4096), "size": (0, 1 << 20), "max_pixels": (0, 1 << 34), "shard_size": (0, 10**9),
    "quality": (0, 100), "val_fraction": (0, 1),
    "guidance": (0, 1e4), "attn_temp": (0, 1e4), "denoise": (0, 1e4), "noise_std": (0, 100), "relative_std": (0, 1),
}  # fmt: skip


def problem(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str | None:
    """What is wrong with the first number of parsed options that is outside its bounds, or no number."""
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least, most = BOUNDS.get(action.dest, (0, COUNTED))
        name = "/".join(action.option_strings)
        if isinstance(value, float) and not math.isfinite(value):
            return f"argument {name}: {value} is no finite number"
        if not least <= value <= most:
            return f"argument {name}: {str(value)[:40]} is out of bounds: it may be {least:,} to {most:,}"
    return None
