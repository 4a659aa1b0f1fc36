"""Names of classes, in label order: whether two lists give the labels the same meaning.

Sets that were prepared apart may give one label to two classes, and nothing but wrong figures would tell.
"""

from collections.abc import Sequence

ACCEPT = "data.accept=[class_names]"
_SHOWN = 6


def difference(ours: tuple[str, Sequence[str]], theirs: tuple[str, Sequence[str]]) -> str | None:
    """(where, names) of both sides -> what differs, naming both; None where every label that both have means the same."""
    (here, own), (there, other) = ours, theirs
    label = next((k for k, (a, b) in enumerate(zip(own, other)) if a != b), None)
    if label is None:
        return None
    return (
        f"the classes differ: {len(own)} of {here} ({shown(own)}), {len(other)} of {there} ({shown(other)}); "
        f"label {label} is {own[label]!r} in the one and {other[label]!r} in the other"
    )


def shown(names: Sequence[str]) -> str:
    """The first names, and the last."""
    return ", ".join(names[:_SHOWN]) + (f", ... {names[-1]}" if len(names) > _SHOWN else "")
