"""Checks the class names of the training images against those of held-out images, of the run so far, of given weights."""

from collections.abc import Iterator, Sequence

from tarflow.trainer.config.class_names import ACCEPT, difference, shown
from tarflow.trainer.config.schema import Config
from tarflow.trainer.start.finding import Finding


def compare_classes(
    config: Config,
    ours: tuple[str, Sequence[str] | None],
    theirs: tuple[str, Sequence[str] | None],
    way_out: str,
    *settings: str,
    always: bool = False,
) -> Iterator[Finding]:
    """Compare (where, names) of two sides; names None: not known, which is noted if the other side has names.

    Additional names at the end of one list change no label, so they are only noted.
    """
    (here, own), (there, other) = ours, theirs
    if not config.model.num_classes or (own is None and other is None):
        return
    if own is None or other is None:
        silent, named = (here, there) if own is None else (there, here)
        text = f"{silent} does not name its classes: not compared with those of {named}"
        yield Finding(text, settings, note=True)
        return
    text = difference((here, own), (there, other)) or ""
    if text and "class_names" in config.data.accept:
        yield Finding(f"{text}; {ACCEPT} says that this is meant", settings, note=True)
    elif text:
        text = f"{text}. {way_out}, or set {ACCEPT} if they mean the same"
        yield Finding(text, (*settings, "data.accept"), always=always)
    elif len(own) != len(other):
        longer, lacking = (here, there) if len(own) > len(other) else (there, here)
        rest = max(own, other, key=len)[min(len(own), len(other)) :]
        yield Finding(f"{lacking} lacks classes that {longer} has: {shown(rest)}", settings, note=True)
