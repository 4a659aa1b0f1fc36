"""Which fields and labels the shards of a set hold: the lines that indexing reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tarflow.data_pipeline.index.labels import label_gaps
from tarflow.data_pipeline.index.samples import Samples
from tarflow.data_pipeline.layout.names import shown

_LISTED = 12  # fields
_LIKELY = ("label", "class", "target", "y", "id", "txt")  # fields that hold labels in other people's shards


@dataclass
class LabelsSeen:
    """The labels of a set: where they came from, how many samples have none, which classes never occur.

    `form`: `tar` or `mds`. `classes`: the names, where known. `names_from`: the file they were found in, if not given.
    `looked_in`: fields or columns where labels were looked for. `images`: how many images came from each field.
    """

    form: str = "tar"
    classes: list[str] | None = None
    names_from: str = ""
    looked_in: set[str] = field(default_factory=set)
    images: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    labelled: int = 0
    used: set[int] = field(default_factory=set)
    fields: Counter[str] = field(default_factory=Counter)
    json_keys: list[str] = field(default_factory=list)

    def add(self, found: Samples) -> None:
        """Count a shard."""
        self.samples += len(found.keys)
        self.labelled += sum(label is not None for label in found.labels)
        self.used |= {label for label in found.labels if label is not None}
        self.fields += found.fields
        self.images += Counter(found.extensions)
        self.looked_in |= {found.label_from} - {""}
        self.json_keys = self.json_keys or found.json_keys

    def lines(self) -> list[str]:
        """A line for each: fields, images, labels, and what is odd about them."""
        what = "columns" if self.form == "mds" else "fields"
        listed = ", ".join(f"{shown(name)} {count:,}" for name, count in self.fields.most_common(_LISTED))
        out = [f"{what} seen: {listed}{' ...' * (len(self.fields) > _LISTED)}"] if self.fields else []
        if self.images:
            out.append(
                "images: from "
                + ", ".join(f"{shown(name)} {count:,}" for name, count in self.images.most_common(_LISTED))
            )
        source = ", ".join(sorted(map(shown, self.looked_in))) or "columns of known names"
        if self.labelled:
            without = self.samples - self.labelled
            rest = f"; {without:,} have none" if without else ""
            out.append(f"labels: {self.labelled:,} of {self.samples:,} samples, from {source}{rest}")
            if self.names_from and self.classes is not None:
                out.append(f"class names: {len(self.classes):,}, from {self.names_from}")
            last = max(self.used)
            gaps = label_gaps(sorted(self.used), last + 1 if self.classes is None else len(self.classes))
            out += [gaps] if gaps else []
            if self.classes is not None and last >= len(self.classes):
                out.append(
                    f"labels run to {last}, but the list of classes (classes.json, --classes) holds {len(self.classes)} names: "
                    "training refuses the labels beyond"
                )
        elif self.samples:
            out.append(f"labels: none of {self.samples:,} samples has one (looked for in {source}){self._hint()}")
        return out

    def _hint(self) -> str:
        """Where labels may be instead."""
        likely = [name for name in self.fields if name.rsplit(".", 1)[-1] in _LIKELY]
        ways = []
        if self.form == "tar" and self.json_keys:
            keys = ", ".join(map(shown, self.json_keys))
            ways.append(f"--label-field json:KEY takes them from .json, which holds {keys}")
        if likely:
            others = "columns" if self.form == "mds" else "fields"
            ways.append(f"--label-field NAME from another of the {others}: {', '.join(map(shown, likely))}")
        return "; " + "; or ".join(ways) if ways else ""
