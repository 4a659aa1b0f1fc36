"""From the members of a tar to samples: which image, which label, and the rules for odd names.

The rules, the same for every shard:
- A member's key ends at the first dot after the last slash (webdataset's rule); the rest, in lower case, is its field:
  `dir.v1/0001.JPEG` has key `dir.v1/0001` and field `jpeg`; `a/22.05.png` has key `a/22` and field `05.png`.
- Members of one key form one sample wherever they stand in the shard. Keys are compared byte by byte: a name in
  composed and the same name in decomposed Unicode are two keys.
- The image is the field that is an image extension; where there is none, the only field whose last part is one
  (`05.png`). Then the label is looked for under the same inner dots (`05.cls`) as well, and as `png.cls`, which some
  writers make of `0001.png`. Where a sample has several images, `--image-field` names the one to take.
- Hidden members (`.x.jpg`), members without an extension, `__name__` members and everything that is not a regular file
  are ignored and counted. So are samples without an image.
- A second member with the same key and field: strict names it, skip keeps the first and counts.
- Labels are decimal integers (white space around them is accepted) or, where the classes are known, class names; they
  stand in a member of their own or, with `json:NAME`, in a JSON member (img2dataset's), where NAME may be dotted.
- A damaged tar: strict stops; skip keeps the complete samples before the damage, never a half one: the sample that the
  damage hit is dropped, and so is the last sample if it lacks a field that the first one has.
"""

from __future__ import annotations

from collections import Counter

from tarflow.data_pipeline.images.formats import UNREAD_PICTURES, cause_of
from tarflow.data_pipeline.index.samples import Rules, Samples
from tarflow.data_pipeline.index.tar.fields import (
    extension_of,
    image_fields,
    is_image,
    label_field,
    split_name,
    text,
)
from tarflow.data_pipeline.index.tar.labels import LabelField, LabelReader, possible_label_keys
from tarflow.data_pipeline.index.tar.members import TarScan
from tarflow.data_pipeline.index.tar.regular import add_regular_samples

LABEL_FIELD = "cls"  # webdataset's name for it
_COUNTED_FIELDS = 64  # dotted names may make a field of their own for every sample


def group(scan: TarScan, shard: str, rules: Rules, quick: bool = True) -> Samples:
    """The samples of one scanned shard. Strict: DataError naming `shard` and member at the first problem.

    `quick`: try the quick way for regular shards first, with the same result.
    """
    return _Grouping(scan, shard, rules).run(quick)


class _Grouping:
    """The members of one shard on their way into samples."""

    def __init__(self, scan: TarScan, shard: str, rules: Rules) -> None:
        self.scan = scan
        self.shard = shard
        self.strict = rules.strict
        field = rules.label_field or LABEL_FIELD
        self.labels = LabelReader(scan, LabelField.parse(field), rules.classes)
        self.image = rules.image_field.lower().encode() if rules.image_field else None
        self.out = Samples(label_from=field)

    def run(self, quick: bool) -> Samples:
        scan, out = self.scan, self.out
        out.ignored["link_to_nothing"] += len(scan.links)
        out.ignored["not_a_file"] += scan.not_files - len(scan.links)
        self._note_sparse()
        if scan.damage:
            where = f", member {text(scan.cut_member)!r}" if scan.cut_member else ""
            self._problem("damaged_shard", f"damaged{where}: {scan.damage}")
        if scan.damage or not (quick and add_regular_samples(scan, self.labels, self.image, out)):
            self._add_samples()
        out.ignored = +out.ignored  # without the zeros
        if not any(label is not None for label in out.labels):
            out.json_keys = possible_label_keys(scan)
        return out

    def _problem(self, cause: str, message: str) -> None:
        self.out.problem(cause, f"shard {self.shard}: {message}", self.strict)

    def _note_sparse(self) -> None:
        """Members whose bytes lie in pieces cannot be read by offset: a problem where they are images or labels."""
        label = extension_of(self.labels.field.name)
        for member in self.scan.sparse:
            _, what = split_name(member) or (b"", b"")
            if what != self.image and not is_image(what) and extension_of(what) != label:
                self.out.ignored["sparse"] += 1
                continue
            self._problem(
                "sparse_member",
                f"member {text(member)!r} is stored sparse, with its holes left out: pack it without --sparse",
            )

    def _add_samples(self) -> None:
        """Member by member, whatever their names and order."""
        table = self._table()
        # Most samples have the same fields, and roles go by the fields alone: they are looked at once per set of fields.
        kinds = Counter(map(tuple, table.values()))
        self.out.fields = _count_fields(kinds)
        roles = {fields: self._roles(fields) for fields in kinds}
        for key, fields in table.items():
            images, label = roles[tuple(fields)]
            self._add(key, fields, images, label)

    def _table(self) -> dict[bytes, dict[bytes, int]]:
        """Key -> field -> member, without what is ignored and without the half sample of a damaged shard."""
        table: dict[bytes, dict[bytes, int]] = {}
        for i, name in enumerate(self.scan.names):
            parts = split_name(name)
            if parts is None:
                base = name[name.rfind(b"/") + 1 :]
                self.out.ignored["hidden" if base.startswith(b".") else "no_extension"] += 1
                continue
            key, what = parts
            if name.startswith(b"__") and name.endswith(b"__"):
                self.out.ignored["meta"] += 1
                continue
            fields = table.setdefault(key, {})
            if what in fields:
                self._problem("duplicate_member", f"member {text(name)!r} appears twice")
            else:
                fields[what] = i
        if self.scan.damage and table:
            _drop_half_sample(self.scan, table)
        return table

    def _roles(self, fields: tuple[bytes, ...]) -> tuple[list[bytes], bytes | None]:
        """(the fields that are images, the field that holds the label)."""
        images = image_fields(fields, self.image)
        return images, label_field(fields, images[0], self.labels.field.name) if images else None

    def _add(self, key: bytes, fields: dict[bytes, int], images: list[bytes], label_in: bytes | None) -> None:
        """Add one sample, or count why it is left out. `fields`: field -> member."""
        scan = self.scan
        if not images:
            extensions = [text(extension_of(what)) for what in fields]
            unread = next((extension for extension in extensions if extension in UNREAD_PICTURES), None)
            self.out.ignored[cause_of(unread) if unread else "no_image"] += 1
            return
        if len(images) > 1:
            both = " and ".join(repr(text(scan.names[fields[what]])) for what in images[:2])
            self._problem(
                "several_images",
                f"sample {text(key)!r} has {len(images)} images ({both}): "
                f"a key ends at the first dot of the file name; --image-field {text(images[0])} takes that one",
            )
            if b"." in images[0]:  # dotted names merged by the key rule: no telling which labels belong to which
                return
        at = fields[images[0]]
        if scan.sizes[at] == 0:
            self._problem("empty_image", f"member {text(scan.names[at])!r} has 0 bytes")
            return
        label = None
        if label_in is not None:
            try:
                label = self.labels.read(fields[label_in])
            except ValueError as err:
                self._problem("malformed_label", f"member {text(scan.names[fields[label_in]])!r}: {err}")
                return
        self.out.add(text(key), scan.offsets[at], scan.sizes[at], text(images[0]), label)


def _count_fields(kinds: Counter[tuple[bytes, ...]]) -> Counter[str]:
    """How many samples have each field, for a bounded number of fields. `kinds`: fields of a sample -> how many have them."""
    counts: Counter[str] = Counter()
    for fields, count in kinds.items():
        for what in map(text, fields):
            if what in counts or len(counts) < _COUNTED_FIELDS:
                counts[what] += count
    return counts


def _drop_half_sample(scan: TarScan, table: dict[bytes, dict[bytes, int]]) -> None:
    """Drop the sample that the damage hit, and the last one where members of it may be missing."""
    if scan.cut_member is not None:
        parts = split_name(scan.cut_member)
        if parts is not None:
            table.pop(parts[0], None)
    if len(table) > 1:
        first, last = next(iter(table)), next(reversed(table))
        if not table[first].keys() <= table[last].keys():
            del table[last]
