"""Where remote data may be: under the address of their index, and under the roots in data.allow_roots.

An index may come from a stranger. What it names is fetched by this machine, with this user's rights and from inside this
network: so a name must not lead to files of this machine, its other services or another host, directly or by a redirect.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urljoin, urlsplit

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.index import Index
from tarflow.data_pipeline.layout.names import shown

_PORTS = {"http": 80, "https": 443}
_PLAIN = re.compile(r"[\w+=@,-][\w.+=@,-]*(/[\w+=@,-][\w.+=@,-]*)*", re.ASCII)  # what nearly every shard is called


@dataclass(frozen=True)
class _Address:
    scheme: str
    host: str
    port: int | None
    path: str

    @classmethod
    def of(cls, text: str) -> _Address:
        """Raises DataError for what is not a plain address: nothing in it may be ambiguous."""
        check_name(text)
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as err:
            raise DataError(f"{shown(text)} is not an address: {err}") from None
        scheme = parts.scheme.lower()
        if not scheme or not text[len(scheme) :].startswith("://"):
            raise DataError(f"{shown(text)} is not an address: expected PROTOCOL://HOST/PATH")
        return cls(scheme, (parts.hostname or "").lower(), port or _PORTS.get(scheme), parts.path.rstrip("/"))

    @property
    def root(self) -> str:
        """The host, or the folder if there is none: what the setting would have to allow."""
        if not self.host:
            return f"{self.scheme}://{self.path.rpartition('/')[0]}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port != _PORTS.get(self.scheme) else "")

    def is_under(self, root: _Address) -> bool:
        same = (self.scheme, self.host, self.port) == (root.scheme, root.host, root.port)
        return same and (self.path == root.path or self.path.startswith(f"{root.path}/"))

    def same_host(self, other: _Address) -> bool:
        """Whether this is the same server, or the same under TLS."""
        if self.host != other.host:
            return False
        return (self.scheme, self.port) in (
            (other.scheme, other.port),
            ("https", 443 if other.port == 80 else other.port),
        )


def check_name(text: str) -> None:
    """Refuse names and addresses that could lead elsewhere.

    Raises DataError for a part that leads upwards, however it is written, for marks that libraries interpret
    (`simplecache::`), and for control characters.
    """
    plain, before = text, ""
    while plain != before:  # %252e%252e, too
        plain, before = unquote(plain), plain
    wrong = None
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in plain):
        wrong = "holds control characters"
    elif "\\" in plain:
        wrong = "holds a backslash"
    elif "::" in plain:
        wrong = "holds `::`, which chains protocols"
    elif any(part in ("..", ".") for part in plain.split("/")):
        wrong = "leads upwards (`..`): shards lie below the folder that holds index/"
    if wrong:
        raise DataError(f"{shown(text[:200])} is not a name that remote data may have: it {wrong}")


@dataclass(frozen=True)
class Roots:
    """The addresses that may be read. `own`: the index's, None if it is in the file system. `allowed`: data.allow_roots."""

    own: str | None
    allowed: Sequence[str] = ()

    def check(self, address: str) -> None:
        """Raise DataError for an address that lies under none of the roots."""
        found = _Address.of(address)
        roots = [root for root in (self.own, *self.allowed) if root]
        if not any(found.is_under(_Address.of(root)) for root in roots):
            raise DataError(
                f"shard {shown(address[:200])} does not lie under {self.own or 'the folder of its index'}: if that is "
                f"intended, data.allow_roots=[{found.root}] allows it"
            )

    def check_shards(self, index: Index) -> None:
        """Raise DataError for the first shard that may not be read, before anything is fetched."""
        for shard, path in enumerate(index.shard_paths):
            if self.own is None and "://" not in path:  # in the file system, like the index
                continue
            if self.own is not None and _PLAIN.fullmatch(path):
                continue
            if "://" not in path and path.startswith("/"):
                raise DataError(f"the index at {self.own} names the absolute path {shown(path[:200])}: {_UNDER}")
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path) and "://" not in path:
                raise DataError(f"the index at {self.own} names {shown(path[:200])}, which is not a file: {_UNDER}")
            self.check(index.shard_place(shard))


_UNDER = "shards behind an address lie below the folder that holds index/"


def redirected(address: str, here: str, location: str | None, allowed: Sequence[str]) -> str:
    """The target of a redirect by the server at `here`, when `address` was asked for.

    Raises DataError where that is another host or protocol, unless `allowed` holds it.
    """
    if not location:
        raise DataError(f"{shown(address)} redirects to nowhere")
    try:
        target = urljoin(here, location)
        to = _Address.of(target)
    except ValueError as err:
        raise DataError(f"{shown(address)} redirects to what is not an address: {err}") from None
    if to.same_host(_Address.of(address)) or any(to.is_under(_Address.of(root)) for root in allowed):
        return target
    raise DataError(
        f"{shown(address)} redirects to {shown(target[:200])}, another host or protocol: if that is intended, "
        f"data.allow_roots=[{to.root}] allows it"
    )
