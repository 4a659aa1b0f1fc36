"""From the members of a tar to samples: which image, which label, and the rules for odd names.

The rules, the same for every shard:
- A member's key ends at the first dot after the last slash (webdataset's rule); the rest, in lower case, is its field:
  `dir.v1/0001.JPEG` has key `dir.v1/0001` and field `jpeg`; `a/22.05.png` has key `a/22` and field `05.png`.
- Members of one key form one sample wherever they stand in the shard. Keys are compared byte by byte: a name in
  composed and the same name in decomposed Unicode are two keys.
- The image is the field that is an image extension; where there is none, the only field whose last part is one
  (`05.png`). Then the label is looked for under the same inner dots (`05.cls`) as well.
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
from dataclasses import dataclass, field

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.formats import IMAGE_EXTENSIONS, UNREAD_PICTURES, cause_of
from tarflow.data_pipeline.index.labels import check_label
from tarflow.data_pipeline.index.tar_scan import TarScan

_IMAGE_BYTES = frozenset(extension.encode() for extension in IMAGE_EXTENSIONS)


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

    def problem(self, cause: str, message: str, strict: bool) -> None:
        """Strict: raise it. Otherwise count it and keep its message if it is among the first."""
        if strict:
            raise DataError(f"{message} (on_error=skip leaves such samples out and counts them)")
        self.problems[cause] += 1
        if len(self.examples) < 20:
            self.examples.append(message)


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """(key, lower-case field) of a member's name, or None for hidden members and those without an extension."""
    start = name.rfind(b"/") + 1
    dot = name.find(b".", start)
    if dot <= start:
        return None
    return name[:dot], name[dot + 1 :].lower()


def text(name: bytes) -> str:
    """A name for messages and the index; bytes that are not UTF-8 are shown as escapes."""
    return name.decode("utf-8", errors="backslashreplace")


def group(
    scan: TarScan,
    shard: str,
    *,
    strict: bool = True,
    label_field: str = "cls",
    classes: list[str] | None = None,
) -> Samples:
    """The samples of one scanned shard. Strict: DataError naming shard and member at the first problem.

    `label_field`: the field that holds the label, or `json:NAME` for a value inside a JSON field.
    """
    out = Samples()
    out.ignored["not_a_file"] += scan.not_files
    reader = LabelReader(scan, label_field, classes)
    if scan.damage:
        where = f", member {text(scan.cut_member)!r}" if scan.cut_member else ""
        out.problem("damaged_shard", f"shard {shard}: damaged{where}: {scan.damage}", strict)
    elif _regular(scan, reader, out):
        return out
    for key, fields in _table(scan, shard, out, strict).items():
        found = [what for what in fields if what in _IMAGE_BYTES]
        inner = b""
        if not found:
            found = [what for what in fields if b"." in what and what.rsplit(b".", 1)[1] in _IMAGE_BYTES]
            inner = found[0].rsplit(b".", 1)[0] + b"." if found else b""
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
                "a key ends at the first dot of the file name",
                strict,
            )
            if inner:  # dotted names merged by the key rule: no telling which labels belong to which
                continue
        at = fields[found[0]]
        if scan.sizes[at] == 0:
            out.problem("empty_image", f"shard {shard}: member {text(scan.names[at])!r} has 0 bytes", strict)
            continue
        label: int | None = None
        label_at = fields.get(reader.field, fields.get(inner + reader.field))
        if label_at is not None:
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
    out.ignored = +out.ignored
    return out


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


def _regular(scan: TarScan, labels: LabelReader, out: Samples) -> bool:
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
    pictures = [i for i, what in enumerate(fields) if what in _IMAGE_BYTES]
    if (
        len(names) % period
        or len(pictures) != 1
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
        if labels.field in fields:
            values = [labels.read(i) for i in range(fields.index(labels.field), len(names), period)]
    except ValueError:
        return False
    out.keys, out.offsets, out.sizes, out.labels = decoded, scan.offsets[pictures[0] :: period], sizes, values
    out.extensions = [text(fields[pictures[0]])] * len(keys)
    out.ignored = +out.ignored
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
        content = self.scan.content(member)
        try:
            return self._known[content]
        except KeyError:
            label = (
                _json_label(content, self.inside, self.numbers) if self.inside else parse_label(content, self.numbers)
            )
        if len(self._known) < 10_000:
            self._known[content] = label
        return label


def _json_label(content: bytes, inside: str, numbers: dict[str, int]) -> int | None:
    """The label at a dotted path of a JSON object."""
    try:
        value = json.loads(content)
    except ValueError:
        raise ValueError(f"is no JSON: {content[:40]!r}") from None
    for part in inside.split("."):
        if not isinstance(value, dict):
            raise ValueError(f"is no JSON object where {inside!r} is looked for")
        value = value.get(part)
        if value is None:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{inside!r} is {str(value)[:40]}, expected an integer or a class name")
    return parse_label(str(value).encode(), numbers)


def parse_label(content: bytes, numbers: dict[str, int]) -> int:
    """The class number in a label member. Raises ValueError saying what stands there instead."""
    word = content.decode("utf-8", errors="backslashreplace").strip()
    if word in numbers:
        return numbers[word]
    digits = word[1:] if word[:1] in "+-" else word
    if digits.isascii() and digits.isdigit() and len(digits) < 40:
        return check_label(int(word))
    known = " or the name of a class" if numbers else " (names need a list of classes: classes.json, --classes)"
    raise ValueError(f"the label is {word[:40]!r}, expected an integer{known}" if word else "the label is empty")


def _drop_half_sample(scan: TarScan, table: dict[bytes, dict[bytes, int]]) -> None:
    if scan.cut_member is not None:
        parts = split_name(scan.cut_member)
        if parts is not None:
            table.pop(parts[0], None)
    if len(table) > 1:
        first, last = next(iter(table)), next(reversed(table))
        if not table[first].keys() <= table[last].keys():
            del table[last]
