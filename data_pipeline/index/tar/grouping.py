"""From the members of a tar to samples: which image, which label, and the rules for odd names.

The rules, the same for every shard:
- A member's key ends at the first dot after the last slash (webdataset's rule); the rest, in lower case, is its field:
  `dir.v1/0001.JPEG` has key `dir.v1/0001` and field `jpeg`; `a/22.05.png` has key `a/22` and field `05.png`.
- Members of one key form one sample wherever they stand in the shard. Keys are compared byte by byte: a name in
  composed and the same name in decomposed Unicode are two keys.
- The image is the field that is an image extension; where there is none, the only field whose last part is one
  (`05.png`). Then the label is looked for under the same inner dots (`05.cls`) as well, and as `png.cls`, which some
  writers make of `0001.png`. Where a sample has several images, `--image-field` says which.
- Hidden members (`.x.jpg`), members without an extension, `__name__` members and everything that is no regular file
  are ignored and counted. So are samples without an image.
- A second member with the same key and field: strict names it, skip keeps the first and counts.
- Labels are decimal integers (white space around them is accepted) or, where the classes are known, class names; they
  stand in a member of their own or, with `json:NAME`, in a JSON member (img2dataset's), where NAME may be dotted.
- A damaged tar: strict stops; skip keeps the complete samples before the damage, never a half one: the sample that the
  damage hit is dropped, and so is the last sample if it lacks a field that the first one has.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection

from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS, UNREAD_PICTURES, cause_of
from tarflow.data_pipeline.index.labels import parse_json_label, parse_label
from tarflow.data_pipeline.index.samples import Samples, text
from tarflow.data_pipeline.index.tar.members import TarScan

_MOST_FIELDS = 64  # kinds of fields that are counted: dotted names may make one for every sample
_MOST_KEYS = 12
_MOST_LABEL = 1 << 20  # bytes of a member that holds a label, alone or in JSON
_REMEMBERED = 4096  # bytes of the largest that is remembered
_IMAGE_BYTES = frozenset(extension.encode() for extension in IMAGE_EXTENSIONS)


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """(key, lower-case field) of a member's name, or None for hidden members and those without an extension."""
    start = name.rfind(b"/") + 1
    dot = name.find(b".", start)
    if dot <= start:
        return None
    return name[:dot], name[dot + 1 :].lower()


def group(
    scan: TarScan,
    shard: str,
    *,
    strict: bool = True,
    label_field: str = "cls",
    classes: list[str] | None = None,
    image_field: str | None = None,
) -> Samples:
    """The samples of one scanned shard. Strict: DataError naming shard and member at the first problem.

    `label_field`: the field that holds the label, or `json:NAME` for a value inside a JSON field. `image_field`: the one
    that holds the image, None = the only one with an image extension.
    """
    out = Samples(label_from=label_field)
    out.ignored["link_to_nothing"] += len(scan.links)
    out.ignored["not_a_file"] += scan.not_files - len(scan.links)
    reader = LabelReader(scan, label_field, classes)
    wanted = image_field.lower().encode() if image_field else None
    _samples(scan, shard, reader, wanted, out, strict)
    out.ignored = +out.ignored
    if not any(label is not None for label in out.labels):
        out.json_keys = _json_keys(scan)
    return out


def _samples(scan: TarScan, shard: str, reader: LabelReader, wanted: bytes | None, out: Samples, strict: bool) -> None:
    """Fill `out` with the samples of a scan; `wanted` is the field of the image, where one was asked for."""
    for member in scan.sparse:
        _, what = split_name(member) or (b"", b"")
        ending = what.rsplit(b".", 1)[-1]
        if what != wanted and ending not in _IMAGE_BYTES and ending != reader.field.rsplit(b".", 1)[-1]:
            out.ignored["sparse"] += 1
            continue
        out.problem(
            "sparse_member",
            f"shard {shard}: member {text(member)!r} is stored sparse, with its holes left out: pack it without --sparse",
            strict,
        )
    if scan.damage:
        where = f", member {text(scan.cut_member)!r}" if scan.cut_member else ""
        out.problem("damaged_shard", f"shard {shard}: damaged{where}: {scan.damage}", strict)
    elif _regular(scan, reader, wanted, out):
        return
    table = _table(scan, shard, out, strict)
    kinds = Counter(map(tuple, table.values()))  # most samples have the same fields: looked at once
    out.fields = _counted(kinds)
    roles = {fields: _roles(fields, wanted, reader.field) for fields in kinds}
    for key, fields in table.items():
        found, label_in = roles[tuple(fields)]
        if not found:
            last = [text(what).rpartition(".")[2] for what in fields]
            unread = next((extension for extension in last if extension in UNREAD_PICTURES), None)
            out.ignored[cause_of(unread) if unread else "no_image"] += 1
            continue
        if len(found) > 1:
            both = " and ".join(repr(text(scan.names[fields[what]])) for what in found[:2])
            out.problem(
                "several_images",
                f"shard {shard}: sample {text(key)!r} has {len(found)} images ({both}): "
                f"a key ends at the first dot of the file name; --image-field {text(found[0])} takes that one",
                strict,
            )
            if b"." in found[0]:  # dotted names merged by the key rule: no telling which labels belong to which
                continue
        at = fields[found[0]]
        if scan.sizes[at] == 0:
            out.problem("empty_image", f"shard {shard}: member {text(scan.names[at])!r} has 0 bytes", strict)
            continue
        label: int | None = None
        if label_in is not None:
            label_at = fields[label_in]
            try:
                label = reader.read(label_at)
            except ValueError as err:
                name = text(scan.names[label_at])
                out.problem("malformed_label", f"shard {shard}: member {name!r}: {err}", strict)
                continue
        out.keys.append(text(key))
        out.offsets.append(scan.offsets[at])
        out.sizes.append(scan.sizes[at])
        out.extensions.append(text(found[0]))
        out.labels.append(label)


def _counted(kinds: Counter[tuple[bytes, ...]]) -> Counter[str]:
    """How many samples have each field, for a bounded number of fields."""
    counts: Counter[str] = Counter()
    for fields, count in kinds.items():
        for what in map(text, fields):
            if what in counts or len(counts) < _MOST_FIELDS:
                counts[what] += count
    return counts


def _roles(fields: Collection[bytes], wanted: bytes | None, label: bytes) -> tuple[list[bytes], bytes | None]:
    """(the fields that are images, the field that holds the label)."""
    found = _images(fields, wanted)
    return found, _label_field(fields, found[0], label) if found else None


def _images(fields: Collection[bytes], wanted: bytes | None) -> list[bytes]:
    """The fields of a sample that are images: the wanted one, else those of a plain extension, else the dotted ones."""
    if wanted is not None:
        return [wanted] if wanted in fields else []
    plain = [what for what in fields if what in _IMAGE_BYTES]
    return plain or [what for what in fields if b"." in what and what.rsplit(b".", 1)[1] in _IMAGE_BYTES]


def _label_field(fields: Collection[bytes], image: bytes, wanted: bytes) -> bytes | None:
    """The field that holds the label: the wanted one, else it under the image's inner dots, else it behind the image's."""
    inner = image.rsplit(b".", 1)[0] + b"." if b"." in image else b""
    return next((what for what in (wanted, inner + wanted, image + b"." + wanted) if what in fields), None)


def _json_keys(scan: TarScan) -> list[str]:
    """Keys of the first JSON member that could be labels: integers and short texts."""
    at = next((i for i, name in enumerate(scan.names) if name.lower().endswith(b".json")), None)
    if at is None:
        return []
    try:
        value = json.loads(scan.content(at)) if scan.sizes[at] <= _MOST_LABEL else None
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(value, dict):
        return []
    return [key for key, inside in value.items() if isinstance(inside, (int, str)) and len(str(inside)) < 80][
        :_MOST_KEYS
    ]


def _table(scan: TarScan, shard: str, out: Samples, strict: bool) -> dict[bytes, dict[bytes, int]]:
    """Key -> field -> member, without what is ignored and without the half sample of a damaged shard."""
    table: dict[bytes, dict[bytes, int]] = {}
    for i, name in enumerate(scan.names):
        parts = split_name(name)
        if parts is None:
            base = name[name.rfind(b"/") + 1 :]
            out.ignored["hidden" if base.startswith(b".") else "no_extension"] += 1
            continue
        key, what = parts
        if name.startswith(b"__") and name.endswith(b"__"):
            out.ignored["meta"] += 1
            continue
        fields = table.get(key)
        if fields is None:
            table[key] = {what: i}
        elif what in fields:
            out.problem("duplicate_member", f"shard {shard}: member {text(name)!r} appears twice", strict)
        else:
            fields[what] = i
    if scan.damage and table:
        _drop_half_sample(scan, table)
    return table


def _regular(scan: TarScan, labels: LabelReader, wanted: bytes | None, out: Samples) -> bool:
    """The quick way for shards as writers leave them: every sample with the same fields in the same order, no odd names.

    Adds nothing and gives False where any of that does not hold; the general way then gives the same or names what is
    wrong. Works on whole columns of members, which is several times as fast as going member by member.
    """
    names = scan.names
    if not names or b"/" in names[0] or b"." not in names[0]:
        return False
    prefix = names[0][: names[0].index(b".") + 1]
    period = next((i for i, name in enumerate(names) if not name.startswith(prefix)), len(names))
    fields = [name[len(prefix) :] for name in names[:period]]
    pictures = [fields.index(what) for what in _images(fields, wanted)]
    if (
        len(names) % period
        or len(pictures) != 1
        or (wanted is None and b"." in fields[pictures[0]])
        or len(set(fields)) < period
        or b"".join(fields) != b"".join(fields).lower()
    ):
        return False
    keys = [name[: -1 - len(fields[0])] for name in names[::period]]
    together = b"\n".join(keys)
    if any(mark in together for mark in (b".", b"/", b"__")) or together.count(b"\n") != len(keys) - 1 or not all(keys):
        return False
    for i, what in enumerate(fields):
        ending = b"." + what
        if names[i::period] != [key + ending for key in keys]:
            return False
    sizes = scan.sizes[pictures[0] :: period]
    if 0 in sizes or len(set(keys)) < len(keys):
        return False
    try:
        decoded = together.decode().split("\n")
        values: list[int | None] = [None] * len(keys)
        label = _label_field(fields, fields[pictures[0]], labels.field)
        if label is not None:
            values = [labels.read(i) for i in range(fields.index(label), len(names), period)]
    except ValueError:
        return False
    out.keys, out.offsets, out.sizes, out.labels = decoded, scan.offsets[pictures[0] :: period], sizes, values
    out.extensions = [text(fields[pictures[0]])] * len(keys)
    out.fields = Counter({text(what): len(keys) for what in fields})
    return True


class LabelReader:
    """Labels out of members; what was parsed before is remembered, since classes repeat."""

    def __init__(self, scan: TarScan, label_field: str, classes: list[str] | None) -> None:
        self.scan = scan
        kind, _, self.inside = label_field.partition(":")
        self.field = kind.lower().encode()
        self.numbers = {name: number for number, name in enumerate(classes or [])}
        self._known: dict[bytes, int | None] = {}

    def read(self, member: int) -> int | None:
        """The label in a member, None where a JSON object lacks it or says null. Raises ValueError saying what is wrong."""
        if self.scan.sizes[member] > _MOST_LABEL:
            raise ValueError(f"has {self.scan.sizes[member]} bytes, a label at most {_MOST_LABEL}")
        content = self.scan.content(member)
        try:
            return self._known[content]
        except KeyError:
            label = (
                parse_json_label(content, self.inside, self.numbers)
                if self.inside
                else parse_label(content, self.numbers)
            )
        if len(self._known) < 10_000 and len(content) <= _REMEMBERED:
            self._known[content] = label
        return label


def _drop_half_sample(scan: TarScan, table: dict[bytes, dict[bytes, int]]) -> None:
    if scan.cut_member is not None:
        parts = split_name(scan.cut_member)
        if parts is not None:
            table.pop(parts[0], None)
    if len(table) > 1:
        first, last = next(iter(table)), next(reversed(table))
        if not table[first].keys() <= table[last].keys():
            del table[last]
