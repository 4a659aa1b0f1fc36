"""A tar that is read from its beginning, within bounds: the sizes in a header are checked before what follows is read.

webdataset opens pipes, addresses and files, and groups members into samples. In between, Python's `tarfile` would read a name,
an extended header or a member of any size into memory.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from tarflow.data_pipeline.images.bounds import MAX_BYTES

_MOST_HEADER = 1 << 20  # bytes of a long name or of extended records
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Member(tarfile.TarInfo):
    """A header that is refused if what follows it is too large to read."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        most = _MOST_HEADER if self.type in _HEADERS else MAX_BYTES
        if not 0 <= self.size <= most:
            raise tarfile.ReadError(
                f"a member at byte {self.offset} has {self.size:,} bytes, at most {most:,} are read"
            )
        return super()._proc_member(tar)  # type: ignore[misc]


def samples_of(shard: str, handler: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """The samples of a shard: field -> bytes, and `__key__`.

    `handler`: takes an error; raises, or returns whether to continue.
    """
    from webdataset.tariterators import group_by_keys, url_opener

    opened = url_opener([{"url": shard}], handler=handler)
    yield from group_by_keys(_files(opened, handler), handler=handler)


def _files(sources: Iterator[dict[str, Any]], handler: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    for source in sources:
        try:
            for name, data in _members(source["stream"]):
                yield {"fname": name, "data": data, "__url__": source["url"]}
        except Exception as err:  # noqa: BLE001 - whatever a reader of tars, pipes or compressed streams raises
            handler(err)


def _members(stream: Any) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files."""
    from webdataset.tariterators import base_plus_ext

    key, held = None, 0
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar:
        for member in tar:
            vars(tar)["members"] = []  # or all headers would be kept
            if not member.isreg() or _META.match(member.name):
                continue
            of, _ = base_plus_ext(member.name)
            held = member.size + (held if of == key else 0)
            key = of
            if held > MAX_BYTES:
                raise tarfile.ReadError(f"sample {str(key)[:80]!r} has more than {MAX_BYTES:,} bytes")
            content = tar.extractfile(member)
            assert content is not None  # of a regular file
            yield member.name, content.read()
