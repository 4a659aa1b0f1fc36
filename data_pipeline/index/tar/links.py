"""Links inside a tar, and which of its members they stand for."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True)
class TarLink:
    """A member that is a link. Targets are relative to the root of the tar (hard) or to the link's folder (symbolic)."""

    name: bytes
    target: bytes
    symbolic: bool

    def place(self) -> bytes:
        """The name of the member that the link points to."""
        folder = posixpath.dirname(self.name) if self.symbolic else b""
        return posixpath.normpath(posixpath.join(folder, self.target))


def follow(links: list[TarLink], names: list[bytes]) -> tuple[list[tuple[bytes, int]], list[TarLink]]:
    """([(name of a link, position in `names` of what it stands for)], links to nothing in this tar).

    Links may point to links, in any order. The result is ordered as if all links were gone through round after round until a
    round resolves nothing new, so a link to a later link comes after it. Each link is only looked at once, though: a tar may
    hold a chain of as many links as it has members.
    """
    if not links:
        return [], []
    places = {posixpath.normpath(name): i for i, name in enumerate(names)}
    targets = [link.place() for link in links]
    waiting: dict[bytes, list[int]] = {}  # a place -> links to it, while nothing is known to be there
    found: list[tuple[bytes, int]] = []
    resolved: set[int] = set()
    for number, target in enumerate(targets):
        if target not in places:
            waiting.setdefault(target, []).append(number)
    ready = [(1, number) for number, target in enumerate(targets) if target in places]  # (round, link): a heap
    while ready:
        turn, number = heappop(ready)
        at = places[targets[number]]
        found.append((links[number].name, at))
        resolved.add(number)
        place = posixpath.normpath(links[number].name)
        if place not in places:
            places[place] = at
            for later in waiting.pop(place, ()):
                heappush(ready, (turn + (later < number), later))
    return found, [link for number, link in enumerate(links) if number not in resolved]
