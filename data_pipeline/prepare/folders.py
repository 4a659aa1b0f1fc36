"""Folders of images: class folders, splits of class folders, `dataset.json` of EDM and StyleGAN, or images alone.

A folder that can be read in two ways with different labels is an error that names the option to decide.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS, cause_of, extension_of
from tarflow.data_pipeline.images.opening import read_image
from tarflow.data_pipeline.index.kinds import what_folder
from tarflow.data_pipeline.layout.names import class_names, normal, shown
from tarflow.data_pipeline.layout.splits import ALL, SPLITS, chosen, split_named
from tarflow.data_pipeline.layout.walk import Walk, walk
from tarflow.data_pipeline.prepare.class_folders import check_no_class_is_lost
from tarflow.data_pipeline.prepare.labels import number_labels
from tarflow.data_pipeline.prepare.source import Choices, ImageSource, split_note, split_numbers
from tarflow.errors import why
from tarflow.records import parse_object, read_bounded

_LABEL_FILE = "dataset.json"
_MAX_LABELS = 1 << 30  # bytes of it
_CHUNK = re.compile(r"\d{5,}")  # 00000, 00001, ...: as often chunks of one set as classes


@dataclass
class _Part:
    """One split: its folder, its images, and a label (number, name or None) for each.

    `how`: where the labels come from, for the notes. `by_folders`: whether that is the names of folders.
    """

    root: Path
    files: list[Path]
    values: list[Any] = field(default_factory=list)
    how: str = ""
    by_folders: bool = False


def folder_source(path: Path, choices: Choices | None = None, found: Walk | None = None) -> ImageSource:
    """The images below `path`, links followed. Labels: `dataset.json` where there is one, else one class per folder.

    Folders train/, val/ and test/ are splits; classes are numbered over all of them. Folders below a class folder belong to
    their class. Hidden and non-image files are ignored and counted; the extension's case does not matter. `found`: what
    lies below `path`, if that is known already. Raises DataError for a folder without images, and where labels or
    splits could mean two things.
    """
    choices = choices or Choices()
    found = found or walk(path)
    ignored = found.ignored
    images: list[Path] = []
    others: list[Path] = []
    for file in found.files:
        if (extension := extension_of(file.name)) in IMAGE_EXTENSIONS:
            images.append(file)
        else:
            others.append(file)
            ignored[cause_of(extension)] += 1
    if not images:
        raise DataError(_nothing(path, found))
    for again, first in found.again:  # the first is enough
        raise DataError(
            f"{shown(again)} and {shown(first)} are one folder, whose images would count twice: remove one of the links"
        )
    # Labels are looked for split by split, and then have to agree.
    parts = _parts(path, images, choices)
    for name, part in parts.items():
        part.values, part.how = _labels(part, choices.labels, name)
        if part.by_folders:
            for folder in check_no_class_is_lost(part.root, *_class_folders(part, others)):
                ignored[f"folder without images {shown(folder)!r}"] += 1
    values = _together(parts, path)
    files = [file for part in parts.values() for file in part.files]
    sizes = {name: len(part.files) for name, part in parts.items()}
    notes = split_note("folder name", sizes)
    notes += sorted({f"labels: {part.how}" for part in parts.values()})
    if found.linked:
        notes.append(found.links_followed())
    labels, classes, named = np.full(len(files), -1, dtype=np.int64), None, False
    if any(value is not None for value in values):
        labels, classes, named = number_labels(values, f"folder {shown(path)}")
    return ImageSource(
        labels, classes, lambda i: read_image(files[i]), lambda i: shown(files[i]),
        ignored=+ignored, named=named, splits=split_numbers(sizes, choices), notes=notes,
    )  # fmt: skip


def _class_folders(part: _Part, others: list[Path]) -> tuple[set[str], dict[str, Counter[str]]]:
    """(the folders of a split that hold images, the other files in each folder, by extension)."""
    without: dict[str, Counter[str]] = {}
    for file in others:
        if part.root in file.parents and file.parent != part.root:
            without.setdefault(file.relative_to(part.root).parts[0], Counter())[extension_of(file.name)] += 1
    return {file.relative_to(part.root).parts[0] for file in part.files}, without


def _nothing(path: Path, found: Walk) -> str:
    """The message for a folder without images: what it holds instead, and what to do."""
    what = what_folder(path)
    if what:
        return what
    causes = ", ".join(f"{cause} {count}" for cause, count in sorted(found.ignored.items()))
    seen = f" ({causes})" if causes else ""
    return f"folder {shown(path)} holds no images{seen}: expected class folders with .jpg, .png, .webp files"


def _parts(path: Path, images: list[Path], choices: Choices) -> dict[str, _Part]:
    """Split -> its folder and images; '' where the folder is one set."""
    whole = {"": _Part(path, images)}
    tops: dict[str, list[Path]] = {}
    for file in images:
        parts = file.relative_to(path).parts
        tops.setdefault(parts[0] if len(parts) > 1 else "", []).append(file)
    named: dict[str, list[str]] = {}
    for top in tops:
        named.setdefault(split_named(top) or "", []).append(top)
    splits = {name: named[name][0] for name in SPLITS if name in named}
    several = "train" in splits and len(splits) > 1
    if choices.split is None and not several:
        # One folder called `test` among others is a class; so is the only one where class folders were asked for.
        alone = len(tops) == len(splits) and choices.labels is None and not (path / _LABEL_FILE).is_file()
        return {name: _Part(path / top, tops[top]) for name, top in splits.items()} if alone else whole
    if choices.split is None and (path / _LABEL_FILE).is_file():
        return whole
    wanted = chosen([*splits], choices.split, shown(path))
    if wanted == [ALL]:
        wanted = [*splits]
    elif choices.labels == "folders" and choices.split is None and "" in named:
        return whole
    for name in wanted:
        if len(named[name]) > 1:
            raise DataError(
                f"{shown(path)} holds several folders for the split {name}: {', '.join(named[name])}; rename them"
            )
    if choices.split in (None, ALL) and "" in named:
        others = [shown(top) if top else "images beside them" for top in named[""]]
        raise DataError(
            f"{shown(path)} holds the splits {', '.join(splits.values())} and also {', '.join(others[:5])}: take splits with "
            f"--split {','.join(splits)}, or all folders as classes with --labels folders"
        )
    return {name: _Part(path / splits[name], tops[splits[name]]) for name in wanted}


def _labels(part: _Part, asked: str | None, split: str) -> tuple[list[Any], str]:
    """(a number, a name or None for each image, where they come from)."""
    count = len(part.files)
    if asked == "none":
        return [None] * count, "none (--labels none)"
    if asked in (None, _LABEL_FILE):
        path = part.root / _LABEL_FILE
        if path.is_file():
            return _from_label_file(path, part)
        if asked:
            raise DataError(f"there is no {shown(path)} (--labels {_LABEL_FILE})")
    # Class folders: every image has to be in one.
    folders = [file.relative_to(part.root).parts[:-1] for file in part.files]
    loose = [file for file, above in zip(part.files, folders) if not above]
    if len(loose) == count:
        return [None] * count, "none (no class folders)" + (f" in {split}" if split else "")
    if loose:
        tops = len({above[0] for above in folders if above})
        raise DataError(
            f"{shown(part.root)} holds {len(loose)} images beside {tops} class folders (first: {shown(loose[0].name)}): "
            "move them into a class folder, or prepare all without labels with --labels none"
        )
    if asked is None:
        _refuse_doubtful(part, folders)
    names = ["/".join(above) if asked == "parents" else above[0] for above in folders]
    where = f"folder {shown(part.root)}"
    class_names(sorted(set(names)), where)  # refuse impossible names before they are used
    part.by_folders = True
    which = "the folder that each image lies in (--labels parents)" if asked == "parents" else "the class folders"
    return names, f"the names of {which}"


def _refuse_doubtful(part: _Part, folders: list[tuple[str, ...]]) -> None:
    """Raise DataError where class folders may be something else: chunks of one set, or groups of classes."""
    root = shown(part.root)
    tops = sorted({above[0] for above in folders})
    if all(_CHUNK.fullmatch(top) for top in tops) and len({len(top) for top in tops}) == 1 and tops[0][0] == "0":
        raise DataError(
            f"{root}: the folders {tops[0]} ... {tops[-1]} may be classes, or chunks of a set without labels, as its writer "
            f"numbered them (there is no {_LABEL_FILE}): decide with --labels folders or --labels none"
        )
    below: dict[str, set[tuple[str, ...]]] = {top: set() for top in tops}
    for above in folders:
        below[above[0]].add(above[1:])
    for top, inner in below.items():
        common = _common(inner)
        if common not in inner:  # images in several folders below, and none where their paths part
            within = "/".join((top, *common))
            example = "/".join((top, *min(inner)))
            alone = (
                f"; if {shown(top)} only holds the data set, prepare {shown(part.root / within)}"
                if len(tops) == 1
                else ""
            )
            raise DataError(
                f"{root}: the images of {shown(top)} lie in folders below it, such as {shown(example)}: the class may be "
                f"{shown(top)} (--labels folders) or {shown(example)} (--labels parents){alone}"
            )


def _common(paths: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest common beginning of the paths."""
    first, last = min(paths), max(paths)
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[:same]


def _from_label_file(path: Path, part: _Part) -> tuple[list[Any], str]:
    """Labels from `dataset.json`: {"labels": null} or {"labels": [["00000/img00000000.png", 6], ...]}."""
    form = '{"labels": [[file, label], ...]}'
    other = "--labels folders takes the class folders instead, --labels none no labels"
    try:
        pairs = _label_pairs(parse_object(read_bounded(path, _MAX_LABELS)))
    except (OSError, ValueError) as err:
        raise DataError(f"cannot read labels from {shown(path)}: {why(err)}; expected {form}; {other}") from None
    if pairs is None:
        return [None] * len(part.files), f"none ({_LABEL_FILE} holds null)"
    # Each image exactly one label, and no label for anything else: a list of another set may match by accident.
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise DataError(f"{shown(path)} has two labels for {shown(twice)}; {other}")
    names = [normal(file.relative_to(part.root).as_posix()) for file in part.files]
    without = [name for name in names if name not in by_name]
    if without:
        raise DataError(
            f"{shown(path)} has no label for {len(without)} of {len(names)} images, first {shown(without[0])}; {other}"
        )
    gone = by_name.keys() - set(names)
    if gone:
        raise DataError(
            f"{shown(path)} has labels for {len(gone)} files that are not there, first {shown(min(gone))}; {other}"
        )
    values = [by_name[name] for name in names]
    try:
        number_labels(values, shown(path))
    except DataError as err:
        raise DataError(f"{err}; {other}") from None
    if all(value is None for value in values):
        return values, f"none ({_LABEL_FILE} has null for every image)"
    return values, _LABEL_FILE


def _label_pairs(table: dict[str, Any]) -> list[tuple[str, Any]] | None:
    """(file, label) of each entry of a label file's content, None where it says that there are none. Raises ValueError."""
    if "labels" not in table:
        raise ValueError('it has no "labels"')
    listed = table["labels"]
    if listed is None:
        return None
    if not isinstance(listed, list):
        raise ValueError(f'"labels" is {repr(listed)[:80]}, not a list')
    for row, entry in enumerate(listed):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f'entry {row} of "labels" is {repr(entry)[:80]}')
    return [(normal(name.replace("\\", "/")), label) for name, label in listed]


def _together(parts: dict[str, _Part], path: Path) -> list[Any]:
    """The labels of all splits, one after the other. Raises DataError where the splits disagree on what a label is."""
    kinds: dict[str, Counter[type]] = {
        name: Counter(type(value) for value in part.values if value is not None) for name, part in parts.items()
    }
    first = "train" if "train" in parts else next(iter(parts))
    for name, part in parts.items():
        if kinds[name].keys() != kinds[first].keys():
            raise DataError(
                f"{shown(path)}: labels of {first}: {parts[first].how}; labels of {name}: {part.how}. Prepare the splits that "
                f"agree (--split {first}), or all without labels (--labels none)"
            )
        more = sorted(set(part.values) - set(parts[first].values) - {None}, key=str)
        if more and first == "train":
            lacking = ", ".join(shown(str(label)) for label in more[:5])
            raise DataError(
                f"{shown(path)}: {name} has classes that train lacks ({len(more)}): {lacking}; "
                f"train has {len(set(parts[first].values) - {None})}: fix that, or take one split with --split {first}"
            )
    return [value for part in parts.values() for value in part.values]
