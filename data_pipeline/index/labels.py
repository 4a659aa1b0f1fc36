"""The bound on labels: whatever counts classes from 0 holds one number, name or image count for each of them.

A label beyond it is no class number (a year, an id, a time stamp), and tables with a row for each class would not fit anywhere.
"""

from __future__ import annotations

MAX_CLASSES = 1_000_000


def check_label(label: int) -> int:
    """The label, if it may be one. Raises ValueError saying why not.

    Negative ones pass within the same bound: a data set may mark what has no class with them, and a loader that needs
    classes refuses them by name.
    """
    if abs(label) >= MAX_CLASSES:
        raise ValueError(f"the label is {label}, classes are numbered from 0 to at most {MAX_CLASSES - 1}")
    return label
