"""Where a worker's lines go: the terminal for commands, nowhere or a list for those who call from Python."""

from collections.abc import Callable

Log = Callable[[str], None]


def no_log(_line: str) -> None:
    """Drop the line."""
