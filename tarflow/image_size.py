"""The size of images: a whole number of pixels stands for a square, (height, width) for a rectangle.

One spelling for each size: a rectangle with equal sides is the square's whole number, so that sizes compare with ==. Texts are
as in a configuration and on a command line, height first.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import TypeGuard

Size = int | tuple[int, int]

FORM = "a whole number of pixels for squares, or HEIGHT,WIDTH, such as 64 or 256,384"


def size_of(height: int, width: int) -> Size:
    """The size of images of so many rows and columns of pixels."""
    return height if height == width else (height, width)


def sides(size: Size | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def is_size(value: object) -> TypeGuard[Size]:
    """Whether a value from a file is a size: a positive whole number, or two of them."""
    found = value if isinstance(value, list | tuple) else [value, value]
    return len(found) == 2 and all(type(side) is int and side > 0 for side in found)


def shown(size: Size | Sequence[int]) -> str:
    """For messages: `64 x 64`, or `256 x 384 (height x width)`, since others put the width first."""
    height, width = sides(size)
    return f"{height} x {width}" + ("" if height == width else " (height x width)")


def plain(size: Size) -> int | str:
    """For records and settings in messages: `64`, or `256,384`. `parse_size` reads it."""
    return size if isinstance(size, int) else f"{size[0]},{size[1]}"


def size_option(text: str) -> Size:
    """`parse_size` for an option of the command line, whose parser prints the error behind the option's name."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def parse_size(text: str | int) -> Size:
    """The size in a text such as `64` or `256,384`. Raises ValueError for any other."""
    found = [part.strip() for part in str(text).split(",")]
    if len(found) > 2 or not all(part.isdecimal() and part.isascii() and len(part) < 10 for part in found):
        raise ValueError(f"{str(text)[:80]!r} is no size: give {FORM}")
    return size_of(int(found[0]), int(found[-1]))
