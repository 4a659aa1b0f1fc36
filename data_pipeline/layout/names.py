"""Names of classes and files from outside: which can be stored, and how the others are shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tarflow.data_pipeline.errors import DataError

LONGEST = 255  # characters; the longest name of a folder in common file systems


def shown(name: str | Path) -> str:
    """A path or a name for messages: what is not UTF-8 or would move the cursor is shown as escapes."""
    return "".join(map(_shown, str(name)))


def _shown(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # a byte of a file's name, as Python keeps it
        return f"\\x{ord(c) - 0xDC00:02x}"
    return repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c


def storable(path: str | Path) -> bool:
    """Whether this path is UTF-8: text files and pyarrow take nothing else."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def class_names(names: Sequence[str], where: str) -> list[str]:
    """`names` in composed Unicode, so that the same name made on two systems is one.

    Raises DataError for what cannot be told apart, shown on one line or stored: an empty name, one that is not UTF-8, with
    control characters, longer than `LONGEST`, or equal to another one except for composition and surrounding space.
    `where`: where the names stand, for the message.
    """
    known: dict[str, str] = {}
    seen: set[str] = set()
    for name in names:
        same = normal(name).strip()
        wrong = None
        if not same:
            wrong = "is empty"
        elif len(same) > LONGEST:
            wrong = f"has {len(same)} characters, at most {LONGEST} are possible"
        elif any("\ud800" <= c <= "\udfff" for c in same):
            wrong = "is not UTF-8"
        elif any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in same):
            wrong = "holds a control character, such as a line break"
        elif name in seen:
            raise DataError(f"{where} names a class twice: {shown(name)}")
        elif same in known:
            wrong = f"differs from '{shown(known[same])}' only in Unicode's composed and decomposed form, or in spaces"
        if wrong:
            text = shown(name[:80])
            raise DataError(f"{where}: the class name '{text}' {wrong}: rename it")
        known[same] = name
        seen.add(name)
    return [normal(name) for name in names]


def normal(name: str) -> str:
    """The composed form of a name (NFC): what is stored and compared."""
    return unicodedata.normalize("NFC", name)


def only_case(names: Sequence[str]) -> str | None:
    """A note about names that differ in case alone, which is often a typo; None if there are none."""
    folded: dict[str, str] = {}
    pairs = [f"'{folded[n.casefold()]}' and '{n}'" for n in names if folded.setdefault(n.casefold(), n) != n]
    return f"classes that differ in case alone are kept apart: {', '.join(pairs[:5])}" if pairs else None
