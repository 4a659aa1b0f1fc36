"""Compares lists of class names in label order: do they give every label the same meaning.

Data sets prepared separately may use one label for two classes, and only wrong metrics would show it.
"""

from collections.abc import Sequence

ACCEPT = "data.accept=[class_names]"
_SHOWN = 6


def difference(ours: tuple[str, Sequence[str]], theirs: tuple[str, Sequence[str]]) -> str | None:
    """What differs between two (where, names), naming both; None if all labels that both have mean the same."""
    (here, own), (there, other) = ours, theirs
    label = next((k for k, (a, b) in enumerate(zip(own, other)) if a != b), None)
    if label is None:
        return None
    return (
        f"the classes differ: {len(own)} of {here} ({shown(own)}), {len(other)} of {there} ({shown(other)}); "
        f"label {label} is {own[label]!r} in the one and {other[label]!r} in the other"
    )


def shown(names: Sequence[str]) -> str:
    """The first few names and the last."""
    return ", ".join(names[:_SHOWN]) + (f", ... {names[-1]}" if len(names) > _SHOWN else "")
