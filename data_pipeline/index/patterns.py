"""Find shards by folders, glob patterns, brace ranges and lists; the result is sorted.

`{a,b}` and `{000..012}` (zeros kept) are expanded first, then `*`, `?`, `[...]` and `**` are matched against the disk.
A folder stands for every `*.tar` in it and below, links to folders followed. A pattern that matches nothing and a missing file
of a brace range are errors before anything is read. A file that is named twice counts once and is reported.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from braceexpand import braceexpand

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.kinds import what_file, what_folder
from tarflow.data_pipeline.layout.names import shown
from tarflow.data_pipeline.layout.splits import ALL, asked_splits, by_split
from tarflow.data_pipeline.layout.walk import walk
from tarflow.files import listed

_BRACES = re.compile(r"\{([^{}]*)\}")  # the innermost groups
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
MAX_NAMES = 1_000_000  # that one pattern may stand for


def expand_braces(pattern: str) -> list[str]:
    """All strings that the brace groups of `pattern` stand for, as in a shell; text without groups gives itself.

    Raises DataError for groups that a shell would leave as they are and for ranges that run backwards: both are typos. So are
    more than MAX_NAMES strings, which are counted before they are made.
    """
    for body in _BRACES.findall(pattern):
        match = _RANGE.fullmatch(body)
        if match and int(match[1]) > int(match[2]):
            raise DataError(f"the range {{{body}}} in {pattern!r} runs backwards")
        if not match and "," not in body:
            raise DataError(f"cannot read {{{body}}} in {pattern!r}: expected a range {{000..012}} or a list {{a,b}}")
    if (count := _count_names(pattern)) > MAX_NAMES:
        raise DataError(
            f"{pattern[:200]!r} stands for {count:,} names, at most {MAX_NAMES:,} are possible: use several patterns"
        )
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        raise DataError(f"the braces in {pattern!r} do not match") from None


def _count_names(pattern: str) -> int:
    """How many names a pattern stands for: its groups are replaced by their counts, from the innermost outwards."""

    def product(text: str) -> int:
        return math.prod(int(count) for count in re.findall(r"\0(\d+)\0", text))

    pattern = pattern.replace("\0", "")
    while group := _BRACES.search(pattern):
        ends = _RANGE.fullmatch(group[1])
        count = int(ends[2]) - int(ends[1]) + 1 if ends else sum(map(product, group[1].split(",")))
        pattern = f"{pattern[: group.start()]}\0{min(count, 1 << 64)}\0{pattern[group.end() :]}"
    return product(pattern)


def find_shards(patterns: str | Path | Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """(sorted shard paths, notes about duplicates and links). One string is one pattern; give several as a list.

    Raises DataError for a pattern that matches nothing, for missing files, and for two patterns in one string.
    """
    if isinstance(patterns, (str, Path)):
        patterns = [patterns]
    if not patterns:
        raise DataError("no shards given: name a folder, a pattern or a list of tar files")
    found: dict[Path, str] = {}
    notes: list[str] = []
    missing: list[str] = []
    for pattern in map(str, patterns):
        if "://" in pattern:
            raise DataError(
                f"{pattern!r} is an address: index the shards where they lie in a file system and put the folder index/ "
                "beside them; training then reads both from the address"
            )
        for path in _one_pattern(pattern, missing, notes):
            real = path.resolve()
            if real in found:
                notes.append(f"shard {path} is named twice (by {found[real]!r} and {pattern!r}): it counts once")
            else:
                found[real] = pattern
    if missing:
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(f"{len(missing)} shard files are missing: {named}")
    return sorted(found), notes


def of_one_split(shards: list[Path], asked: str | None) -> tuple[list[Path], list[str]]:
    """(the shards of the split asked for, notes); all of them where they name one split or none.

    Raises DataError where the shards' names mention several splits and none was asked for: as one set, a run would train on
    the images that its metrics are measured on.
    """
    root = Path(os.path.commonpath([path.parent for path in shards]))
    groups = by_split(shards, root)
    found = ", ".join(f"{name} ({_count(members)})" for name, members in groups.items() if name)
    if asked is None:
        if len(groups) == 1 or not found:
            return shards, []
        rest = f"; {_count(groups[''])} of them none" if "" in groups else ""
        raise DataError(
            f"the shards in {shown(root)} name the splits {found}{rest}: index one at a time, e.g. "
            f"--split {next(iter(groups))} --out FOLDER, or all as one set with --split {ALL}"
        )
    wanted = asked_splits(asked)
    if wanted == [ALL]:
        return shards, [f"the splits {found} are taken as one set (--split {ALL})"] if found else []
    if len(wanted) > 1 or wanted[0] not in groups:
        raise DataError(
            f"--split {asked}: an index is of one split; the shards in {shown(root)} name: {found or 'none'}"
        )
    return groups[wanted[0]], [
        f"the split {wanted[0]}: {len(groups[wanted[0]])} of {len(shards)} shards, by their names"
    ]


def _count(shards: list[Path]) -> str:
    return f"{len(shards)} shard{'s' * (len(shards) > 1)}"


def _one_pattern(pattern: str, missing: list[str], notes: list[str]) -> list[Path]:
    """The files that a pattern stands for; those that do not exist are added to `missing`."""
    path = Path(pattern)
    if path.is_file():
        what = what_file(path)
        if what and path.suffix != ".tar":
            raise DataError(f"{shown(path)} is not a tar of samples but {what}")
        return [path]
    if path.is_dir():
        return _tars_in(path, notes)
    # Two patterns in one string would match nothing, which says little.
    words = pattern.split()
    if len(words) > 1 and sum(any(mark in word for mark in "{*?") for word in words) > 1:
        raise DataError(f"{pattern!r} looks like {len(words)} patterns in one string: give them as separate arguments")
    names = expand_braces(pattern)
    found: list[Path] = []
    for name in names:
        if any(mark in name for mark in "*?[") and not Path(name).is_file():
            matched = [path for path in _matches(name, notes) if _is_shard(path)]
            if not matched:
                raise DataError(f"pattern {pattern!r} matches no file" + (f" ({name!r})" if name != pattern else ""))
            found += matched
        elif Path(name).is_file():
            found.append(Path(name))
        elif len(names) == 1 and not missing:
            raise DataError(f"there is no file, folder or match for {pattern!r}")
        else:
            missing.append(name)
    return found


def _tars_in(folder: Path, notes: list[str]) -> list[Path]:
    """The tars in a folder and below it. Raises DataError where there are none, saying what is there instead."""
    tars = [file for file in _walked(folder, notes) if file.suffix == ".tar"]
    if not tars:
        what = what_folder(folder)
        raise DataError(
            f"folder {shown(folder)!r} holds no *.tar files{_not_files(folder)}" + (f"; {what}" if what else "")
        )
    return tars


def _walked(folder: Path, notes: list[str]) -> list[Path]:
    """All files below a folder; links that were followed or skipped are noted."""
    found = walk(folder)
    for path in found.no_files:
        if path != folder:
            _is_shard(path)
    if found.linked:
        notes.append(found.links_followed())
    notes += [f"{shown(again)} is the folder {shown(first)}: it counts once" for again, first in found.again[:5]]
    return found.files


def _is_shard(path: Path) -> bool:
    """Whether a path is a file. Raises DataError for what has a shard's name and is none.

    Left out, it would be missing from the set without a word.
    """
    if path.is_file() or path.suffix != ".tar":
        return path.is_file()
    what = "a folder" if path.is_dir() else "not a regular file, or a link to nothing"
    raise DataError(f"{shown(path)} is {what}: put the shard in its place, or list the shards that are meant")


def _not_files(folder: Path) -> str:
    """Names in a folder that would be shards, or a list of shards, if they were regular files."""
    names = [
        path.name
        for path in listed(folder)
        if path.suffix == ".tar" or (path.suffix == ".json" and not path.is_file() and not path.is_dir())
    ]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f" ({', '.join(map(shown, names[:3]))}{more} in it: not a regular file, or a link to nothing)" if names else ""
    )


def _matches(pattern: str, notes: list[str]) -> list[Path]:
    """What matches a pattern. `**` follows links too, but enters each folder once: links may form circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return [Path(match) for match in glob.glob(pattern)]
    at = parts.index("**")
    found = []
    for base in map(Path, glob.glob(str(Path(*parts[:at])))):
        found += [file for file in _walked(base, notes) if _fits(file.relative_to(base).parts, parts[at:])]
    return found


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether names of folders and a file fit the parts of a pattern, in which `**` stands for any number of folders."""
    if not parts or not names:
        return not parts and not names
    if parts[0] == "**":
        return _fits(names, parts[1:]) or _fits(names[1:], parts)
    return fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])
