"""Class labels: the bound on them, how the bytes of a member are read as one, and what is odd about those in use.

Whatever counts classes from 0 holds one number, name or image count for each of them. A label beyond the bound is not a class
number (a year, an id, a time stamp), and tables with a row for each class would not fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice

from tarflow.data_pipeline.layout.names import normal

MAX_CLASSES = 1_000_000
_MAX_DIGITS = 40
_LISTED = 8  # missing classes


def check_label(label: int) -> int:
    """The label, if it is within the bound. Raises ValueError if not.

    Negative ones pass within the same bound: a data set may mark samples without a class with them, and a loader that needs
    classes refuses them by name.
    """
    if abs(label) >= MAX_CLASSES:
        raise ValueError(f"the label is {label}, classes are numbered from 0 to at most {MAX_CLASSES - 1}")
    return label


def parse_label(content: bytes, numbers: dict[str, int]) -> int:
    """The label that `content` holds: a decimal integer, or a name in `numbers`. Raises ValueError for anything else."""
    word = content.decode("utf-8", errors="backslashreplace").strip()
    number = numbers.get(word, numbers.get(normal(word)))
    if number is not None:
        return number
    # int() alone would take 1_000 and digits of other scripts, and work on thousands of digits.
    digits = word[1:] if word[:1] in "+-" else word
    if digits.isascii() and digits.isdigit() and len(digits) < _MAX_DIGITS:
        return check_label(int(word))
    known = " or the name of a class" if numbers else " (names need a list of classes: classes.json, --classes)"
    raise ValueError(f"the label is {word[:40]!r}, expected an integer{known}" if word else "the label is empty")


def parse_json_label(content: bytes, path: str, numbers: dict[str, int]) -> int | None:
    """The label at a dotted path of a JSON object; None where it is missing or null. Raises ValueError."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"is not JSON: {content[:40]!r}") from None
    for part in path.split("."):
        if not isinstance(value, dict):
            raise ValueError(f"is not a JSON object where {path!r} is looked up")
        value = value.get(part)
        if value is None:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{path!r} is {str(value)[:40]}, expected an integer or a class name")
    return parse_label(str(value).encode(), numbers)


def label_gaps(used: Sequence[int], classes: int) -> str | None:
    """A line about classes 0 .. `classes` - 1 without an image and negative labels; `used` is sorted. None if all is well."""
    have = {label for label in used if 0 <= label < classes}
    parts = []
    count = classes - len(have)
    if have and count:
        # Lazily: one wild label makes billions of missing ones.
        missing = list(islice((label for label in range(classes) if label not in have), _LISTED))
        listed = ", ".join(map(str, missing)) + " ..." * (count > _LISTED)
        parts.append(f"{count} of {classes} classes have no image: {listed}")
        if missing == [0]:
            parts.append(f"labels run from 1 to {max(have)}, so a model needs {classes} classes")
    if used and used[0] < 0:
        parts.append(f"some labels are below 0 (smallest {used[0]}), which training refuses")
    return "; ".join(parts) or None
