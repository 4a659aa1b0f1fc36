"""The verbs of the evaluation, one file each (see `tarflow/cli.py` for the pattern), and the options they share.

A file here holds options and what is printed; it may import every part of the room, but only inside its `run`.
"""
