"""Links inside a tar: what a link to another member of the same tar stands for."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from heapq import heappop, heappush


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
    """([(name of a link, position in `names` of what it stands for)], links to nothing in this tar).

    Links may lead to links, in any order and as often as a tar has members: each is looked at once. In the result, those
    that lead forwards to another link come after it.
    """
    if not links:
        return [], []
    places = {posixpath.normpath(name): i for i, name in enumerate(names)}
    targets = [link.place() for link in links]
    waiting: dict[bytes, list[int]] = {}  # a place -> links to it, while nothing is known to be there
    found: list[tuple[bytes, int]] = []
    reached: set[int] = set()
    for number, target in enumerate(targets):
        if target not in places:
            waiting.setdefault(target, []).append(number)
    ready = [(1, number) for number, target in enumerate(targets) if target in places]
    while ready:  # in the order of rounds through all links, until one brings nothing new
        turn, number = heappop(ready)
        at = places[targets[number]]
        found.append((links[number].name, at))
        reached.add(number)
        place = posixpath.normpath(links[number].name)
        if place not in places:
            places[place] = at
            for later in waiting.pop(place, ()):
                heappush(ready, (turn + (later < number), later))
    left = [link for number, link in enumerate(links) if number not in reached]
    return found, left
