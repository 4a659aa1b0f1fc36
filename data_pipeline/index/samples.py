"""The samples of one shard, tar or MDS: by which rules they are found, where they lie, and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tarflow.data_pipeline.errors import DataError

MAX_EXAMPLES = 20  # messages about problems that are kept


@dataclass(frozen=True)
class Rules:
    """How samples are found in shards: the options of `tarflow data index`.

    `strict`: raise at the first problem instead of leaving the sample out and counting it. `label_field`: the field with the
    label, `json:PATH` for a value inside a JSON field, or the column of an MDS set; None = `cls`, or a column of a known name.
    `image_field`: the field or column with the image, None = the only one. `classes`: names that labels may use. `measure`:
    whether to read the size of every image.
    """

    strict: bool = True
    label_field: str | None = None
    image_field: str | None = None
    classes: list[str] | None = None
    measure: bool = False


@dataclass
class Samples:
    """The samples of one shard, as parallel lists; `labels` holds None where there is no label.

    `extensions`: the field or column of each image. `widths` and `heights` of the stored images, in pixels, only where they
    were asked for. `ignored`: members that form no sample, by cause. `problems`: what was left out, by cause, with the first
    messages in `examples`. `fields`: how many samples have each. `label_from`: the field or column where labels were looked
    for. `json_keys`: keys of the first .json member that may hold labels, of a shard without any.
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
    fields: Counter[str] = field(default_factory=Counter)
    json_keys: list[str] = field(default_factory=list)
    label_from: str = ""

    def add(self, key: str, offset: int, size: int, extension: str, label: int | None) -> None:
        """Append a sample."""
        self.keys.append(key)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.extensions.append(extension)
        self.labels.append(label)

    def problem(self, cause: str, message: str, strict: bool) -> None:
        """Strict: raise it. Otherwise count it and keep its message if it is among the first."""
        if strict:
            raise DataError(f"{message} (on_error=skip leaves such samples out and counts them)")
        self.problems[cause] += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(message)
