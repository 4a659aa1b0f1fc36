"""The samples of one shard, tar or MDS, and what scanning met besides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tarflow.data_pipeline.errors import DataError


@dataclass
class Samples:
    """The samples of one shard, as parallel lists; `labels` holds None where there is no label member.

    `widths` and `heights` of the stored images, in pixels, only where they were asked for.
    """

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    widths: list[int | None] | None = None
    heights: list[int | None] | None = None
    ignored: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)  # how many samples have each
    json_keys: list[str] = field(default_factory=list)  # in the first .json, of a shard without labels
    label_from: str = ""  # the field or column where labels were looked for

    def problem(self, cause: str, message: str, strict: bool) -> None:
        """Strict: raise it. Otherwise count it and keep its message if it is among the first."""
        if strict:
            raise DataError(f"{message} (on_error=skip leaves such samples out and counts them)")
        self.problems[cause] += 1
        if len(self.examples) < 20:
            self.examples.append(message)


def text(name: bytes) -> str:
    """A name for messages and the index; bytes that are not UTF-8 are shown as escapes."""
    return name.decode("utf-8", errors="backslashreplace")
