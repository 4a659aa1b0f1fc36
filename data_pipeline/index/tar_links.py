"""Links inside a tar: what a link to another member of the same tar stands for."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass


@dataclass(frozen=True)
class TarLink:
    """A member that is a link. A hard link's `target` counts from the root of the tar, a symbolic one's from its folder."""

    name: bytes
    target: bytes
    symbolic: bool

    def place(self) -> bytes:
        """The name of the member that is meant."""
        folder = posixpath.dirname(self.name) if self.symbolic else b""
        return posixpath.normpath(posixpath.join(folder, self.target))


def followed(links: list[TarLink], names: list[bytes]) -> tuple[list[tuple[bytes, int]], list[TarLink]]:
    """([(name of a link, position in `names` of what it stands for)], links to nothing in this tar)."""
    if not links:
        return [], []
    places = {posixpath.normpath(name): i for i, name in enumerate(names)}
    found: list[tuple[bytes, int]] = []
    while True:  # links may lead to links
        left = []
        for link in links:
            at = places.get(link.place())
            if at is None:
                left.append(link)
            else:
                found.append((link.name, at))
                places.setdefault(posixpath.normpath(link.name), at)
        if len(left) == len(links) or not left:
            return found, left
        links = left
