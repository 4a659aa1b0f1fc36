"""Labels out of the members of a tar."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tarflow.data_pipeline.index.labels import parse_json_label, parse_label
from tarflow.data_pipeline.index.tar.members import TarScan

_MAX_BYTES = 1 << 20  # of a member that holds a label, alone or in JSON
_CACHED_LABELS = 10_000
_CACHED_BYTES = 4096  # of the largest content that is cached
_LISTED_KEYS = 12


@dataclass(frozen=True)
class LabelField:
    """Where labels are: in the field `name` (lower case) or, with a `path`, inside its JSON object."""

    name: bytes
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> LabelField:
        """`cls` is a field, `json:meta.class` a value in the JSON object of a field."""
        name, _, path = text.partition(":")
        return cls(name.lower().encode(), path)


class LabelReader:
    """Reads the labels of one scan. What was parsed before is cached, since classes repeat."""

    def __init__(self, scan: TarScan, field: LabelField, classes: list[str] | None) -> None:
        self.scan = scan
        self.field = field
        self.numbers = {name: number for number, name in enumerate(classes or [])}
        self._known: dict[bytes, int | None] = {}

    def read(self, member: int) -> int | None:
        """The label in a member, None where a JSON object lacks it or holds null. Raises ValueError for anything else."""
        if self.scan.sizes[member] > _MAX_BYTES:
            raise ValueError(f"has {self.scan.sizes[member]} bytes, a label at most {_MAX_BYTES}")
        content = self.scan.content(member)
        if content in self._known:
            return self._known[content]
        path = self.field.path
        label = parse_json_label(content, path, self.numbers) if path else parse_label(content, self.numbers)
        if len(self._known) < _CACHED_LABELS and len(content) <= _CACHED_BYTES:
            self._known[content] = label
        return label


def possible_label_keys(scan: TarScan) -> list[str]:
    """Keys of the first JSON member that could be labels: those of integers and short strings."""
    at = next((i for i, name in enumerate(scan.names) if name.lower().endswith(b".json")), None)
    if at is None:
        return []
    try:
        value = json.loads(scan.content(at)) if scan.sizes[at] <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(value, dict):
        return []
    keys = [key for key, inside in value.items() if isinstance(inside, (int, str)) and len(str(inside)) < 80]
    return keys[:_LISTED_KEYS]
