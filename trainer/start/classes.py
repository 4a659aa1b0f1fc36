"""Class maps: the names behind the labels 0, 1, 2, ... of a data set, a run or a weights file.

Two sets that were prepared apart may give one label to two classes, and nothing but wrong figures would tell.
"""

from collections.abc import Iterator, Sequence

from tarflow.trainer.config.schema import Config
from tarflow.trainer.start.finding import Finding

ACCEPT = "data.accept=[class_names]"
_SHOWN = 6


def compare_classes(
    config: Config,
    ours: tuple[str, Sequence[str] | None],
    theirs: tuple[str, Sequence[str] | None],
    way_out: str,
    *settings: str,
    always: bool = False,
) -> Iterator[Finding]:
    """(where, names) of both sides; names None: not known, which is said. Labels that both sides have must mean the same.

    Names that only follow after the other side's last change no label: that is said.
    """
    (here, own), (there, other) = ours, theirs
    if own is None or other is None:
        unnamed = [where for where, names in (ours, theirs) if names is None]
        if len(unnamed) == 1 and config.model.num_classes:
            named = here if own is not None else there
            yield Finding(
                f"{unnamed[0]} does not name its classes: not compared with those of {named}", settings, note=True
            )
        return
    if list(own) == list(other) or not config.model.num_classes:
        return
    shorter = min(len(own), len(other))
    if list(own[:shorter]) == list(other[:shorter]):
        longer, lacking = (here, there) if len(own) > shorter else (there, here)
        rest = (own if len(own) > shorter else other)[shorter:]
        yield Finding(f"{lacking} lacks classes that {longer} has: {_list(rest)}", settings, note=True)
        return
    label = next(k for k, (a, b) in enumerate(zip(own, other)) if a != b)
    text = (
        f"the classes differ: {here} has {len(own)} ({_list(own)}), {there} has {len(other)} ({_list(other)}); "
        f"label {label} is {own[label]!r} in the one and {other[label]!r} in the other"
    )
    if "class_names" in config.data.accept:
        yield Finding(f"{text}; {ACCEPT} says that this is meant", settings, note=True)
        return
    yield Finding(
        f"{text}. {way_out}, or set {ACCEPT} if they mean the same", (*settings, "data.accept"), always=always
    )


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + (f", ... {names[-1]}" if len(names) > _SHOWN else "")
