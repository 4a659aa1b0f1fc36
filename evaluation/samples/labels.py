"""Parses labels as typed (`0,smileys,none`), by number or class name."""

import csv
import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from tarflow.data_pipeline.index.classes import parse_classes
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import NO_LABEL

MOST_SHOWN = 12
_NUMBER = re.compile(r"-?\d{1,18}")


def parse_labels(text: str, num_classes: int, classes: Sequence[str] | None) -> tuple[int, ...]:
    """Parse comma-separated class numbers or names, or `none` (-1); a name that contains a comma is quoted.

    `number:7`, `name:7` and `name:none` disambiguate where a class is named like another one's number or `none`. Raises
    EvaluationError for an unknown class, with the nearest name, and for an ambiguous one.
    """
    try:
        parts = [part.strip() for part in next(csv.reader([text], skipinitialspace=True), [])]
    except csv.Error as error:
        raise EvaluationError(f"--labels {text!r} is not a comma-separated list: {error}") from None
    if not any(parts):
        raise EvaluationError("--labels is empty: give comma-separated class numbers or names, or none")
    return tuple(label_number(part, num_classes, classes, "--labels") for part in parts)


def label_number(part: str | int, num_classes: int, classes: Sequence[str] | None, where: str) -> int:
    """The number of one label, given as a number, a name or `none` (-1). `where` begins the message of an error."""
    part = str(part)
    kind, colon, rest = part.partition(":")
    kinds = {kind} if colon and kind in ("number", "name") else {"number", "name", "none"}
    word = rest if len(kinds) == 1 else part

    # All readings that the text allows, so that an ambiguous one is an error and not the first that fits.
    meanings: dict[int, str] = {}
    if "none" in kinds and word.lower() == "none":
        meanings[NO_LABEL] = "no label"
    if "number" in kinds and _NUMBER.fullmatch(word):
        number = int(word)
        meanings[number] = "no label" if number == NO_LABEL else f"class number {number}"
    if "name" in kinds and classes is not None and word in classes:
        number = list(classes).index(word)
        meanings[number] = f"class number {number}, whose name is {word!r}"
    possible = {label: meaning for label, meaning in meanings.items() if NO_LABEL <= label < num_classes}
    if len(possible) > 1:
        raise EvaluationError(
            f"{where}: {part!r} could be {' or '.join(possible.values())}: write number:{word}, name:{word} or -1"
        )
    if possible:
        return next(iter(possible))
    raise EvaluationError(f"{where}: {_no_class(word, bool(meanings), num_classes, classes)}")


def _no_class(word: str, is_number: bool, num_classes: int, classes: Sequence[str] | None) -> str:
    if not num_classes:
        return f"{word!r} is not a class: the model has none; leave --labels out"
    if is_number:
        return f"label {word} is not one of the model's {num_classes} classes: {describe_classes(num_classes, classes)}"
    if classes is None:
        return (
            f"{word!r} is not a number, and the names of the model's {num_classes} classes are unknown: give numbers "
            f"(0..{num_classes - 1}), or --classes FILE with the names in label order"
        )
    lower = {name.lower(): name for name in reversed(classes)}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5)
    hint = f"did you mean {lower[near[0]]!r}?" if near else f"classes: {describe_classes(num_classes, classes)}"
    return f"no class is named {word!r}; {hint}"


def describe_classes(num_classes: int, classes: Sequence[str] | None) -> str:
    """List the classes for a message: `0 food, 1 smileys`, or `0..1, or none for no label` without names."""
    if not classes or list(classes) == [str(number) for number in range(num_classes)]:  # names that say no more
        return f"0..{num_classes - 1}, or none for no label"
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:MOST_SHOWN]))
    return shown + (f" and {len(classes) - MOST_SHOWN} more" if len(classes) > MOST_SHOWN else "")


def given_names(
    given: Path | Sequence[str] | None,
    known: Sequence[str] | None,
    num_classes: int,
    where: str,
    option: str = "--classes",
) -> Sequence[str] | None:
    """Class names: those known from `where`, or those of `option`, themselves or in a file, which must not contradict them."""
    if given is None:
        return known
    names = parse_classes(given) if isinstance(given, Path) else list(given)
    option += f" {given}" if isinstance(given, Path) else ""
    if known is not None and list(known) != names:
        differ = next(
            (i for i, pair in enumerate(zip(known, names)) if pair[0] != pair[1]), min(len(known), len(names))
        )
        ours, theirs = (repr(s[differ]) if differ < len(s) else "no class" for s in (known, names))
        raise EvaluationError(
            f"{option}: class {differ} is {theirs} there, and {ours} in {where}; leave the option out"
        )
    if len(names) > num_classes:
        raise EvaluationError(f"{option} holds {len(names)} names, but {where} has {num_classes} classes")
    return names
