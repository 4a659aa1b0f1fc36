"""All files below a folder, through symbolic links too, each folder once: what `prepare`, `index` and `score` read.

Data sets are often folders of links to where the images lie, and links may form circles.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.layout.names import shown

_MOST_NAMED = 1000


@dataclass
class Walk:
    """What lies below a folder. `files`: sorted by path, without hidden ones.

    `ignored`: `hidden` (begins with a dot, or lies in such a folder), `broken_link`, `link_loop` (a link to a folder that
    it lies in) and `not_a_file` (pipes, sockets, devices). `linked`: folders that were entered through a link. `again`:
    (folder, the same folder seen before under another name); it counts once. `no_files`: the first paths of broken links,
    empty folders and what is not a file.
    """

    files: list[Path] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    linked: list[Path] = field(default_factory=list)
    again: list[tuple[Path, Path]] = field(default_factory=list)
    no_files: list[Path] = field(default_factory=list)

    def links_followed(self) -> str:
        """A line about the linked folders, of which there is at least one."""
        count = len(self.linked)
        return f"{count} linked folder{'s' * (count > 1)} followed, first: {shown(self.linked[0])}"


def walk(root: Path) -> Walk:
    """Everything below `root`. Raises DataError for a folder that cannot be read: nothing is skipped silently."""
    found = Walk()
    waiting = [root]
    seen: dict[tuple[int, int], Path] = {}
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            # By device and inode, not by name: a link may lead back to a folder above it, or a second time to the same one.
            first = seen.setdefault((status.st_dev, status.st_ino), folder)
            if first is not folder:
                if folder.is_relative_to(first):
                    found.ignored["link_loop"] += 1
                else:
                    found.again.append((folder, first))
                continue
            if folder.is_symlink() and folder != root:
                found.linked.append(folder)
            with os.scandir(folder) as entries:
                below = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError as err:
            raise DataError(f"cannot read the folder {shown(folder)}: {err.strerror}") from None
        if not below and len(found.no_files) < _MOST_NAMED:
            found.no_files.append(folder)
        for entry in below:
            # Whatever is skipped is counted by its reason, for one line at the end.
            if entry.name.startswith("."):
                found.ignored["hidden"] += _count(entry)
            elif entry.is_dir():
                waiting.append(Path(entry.path))
            elif entry.is_file():
                found.files.append(Path(entry.path))
            else:
                found.ignored["broken_link" if entry.is_symlink() else "not_a_file"] += 1
                if len(found.no_files) < _MOST_NAMED:
                    found.no_files.append(Path(entry.path))
    found.files.sort()
    return found


def _count(entry: os.DirEntry[str]) -> int:
    """How many files a hidden entry stands for."""
    if not entry.is_dir(follow_symlinks=False):
        return 1
    return sum(len(names) for _, _, names in os.walk(entry.path))
