"""The verbs of training: `tarflow train`, `ema` and `checkpoint`, one file each (see `tarflow/cli.py` for the pattern).

A file here holds options and what is printed; it may import every part of the room, but only inside its `run`.
"""
