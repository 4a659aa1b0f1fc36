"""What a scan of a tar finds: its members, its links, and its damage."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tarflow.data_pipeline.index.tar.headers import BLOCK
from tarflow.data_pipeline.index.tar.links import TarLink, follow
from tarflow.files import open_to_read


@dataclass
class TarScan:
    """The members of a tar. `names`, `offsets` (of the content) and `sizes` in bytes run in parallel, regular files only.

    `contents`: the bytes of small members by position in `names`. `not_files`: how many members are folders, links, devices.
    `links`: once followed, those to nothing in this tar; the others are members with the bytes of what they point to, after
    all others. `sparse`: names of members whose bytes lie in pieces. `damage`: what is wrong with the file, or None;
    `cut_member`: the member that a cut went through.
    """

    path: Path
    file_bytes: int = 0
    names: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)
    not_files: int = 0
    links: list[TarLink] = field(default_factory=list)
    sparse: list[bytes] = field(default_factory=list)
    damage: str | None = None
    cut_member: bytes | None = None

    def content(self, i: int) -> bytes:
        """The bytes of member i; read from the file unless it was small enough to be kept."""
        kept = self.contents.get(i)
        if kept is not None:
            return kept
        with open_to_read(self.path) as file:
            file.seek(self.offsets[i])
            return file.read(self.sizes[i])

    def damaged_header(self, position: int) -> None:
        """The block at `position` is not a header: what follows cannot be found."""
        self.damage = f"no valid member header at byte {position}"

    def damaged_end(self, position: int) -> None:
        """The file ends without an end mark, where the next header would be at `position`."""
        how = ", inside a header" if position < self.file_bytes else " without an end-of-archive marker: it may be cut"
        self.damage = f"the file ends at byte {self.file_bytes}{how}"

    def damaged_content(self, position: int, size: int) -> None:
        """The file ends inside the content, of `size` bytes, of the member whose header is at `position`."""
        needed = position + BLOCK + size
        self.damage = f"the file ends at byte {self.file_bytes}, the member at byte {position} needs {needed}"

    def follow_links(self) -> None:
        """Make members of the links to members."""
        found, self.links = follow(self.links, self.names)
        for name, at in found:
            if at in self.contents:
                self.contents[len(self.names)] = self.contents[at]
            self.names.append(name)
            self.offsets.append(self.offsets[at])
            self.sizes.append(self.sizes[at])
        self.not_files -= len(found)
