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
- Labels are decimal integers (white space around them is accepted) or, where the classes are known, class names.
- A damaged tar: strict stops; skip keeps the complete samples before the damage, never a half one: the sample that the
  damage hit is dropped, and so is the last sample if it lacks a field that the first one has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from data_pipeline.errors import DataError
from data_pipeline.tar_scan import TarScan

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm pnm".split()  # noqa: SIM905 - one line reads better
)
_IMAGE_BYTES = frozenset(extension.encode() for extension in IMAGE_EXTENSIONS)


@dataclass
class Samples:
    """The samples of one shard, as parallel lists; `labels` holds None where there is no label member."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


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
    """The samples of one scanned shard. Strict: DataError naming shard and member at the first problem."""
    out = Samples()
    out.ignored["not_a_file"] += scan.not_files

    def problem(cause: str, message: str) -> None:
        if strict:
            raise DataError(f"shard {shard}: {message} (on_error=skip leaves such samples out and counts them)")
        out.problems[cause] += 1
        if len(out.examples) < 20:
            out.examples.append(f"shard {shard}: {message}")

    if scan.damage:
        where = f", member {text(scan.cut_member)!r}" if scan.cut_member else ""
        problem("damaged_shard", f"damaged{where}: {scan.damage}")
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
            problem("duplicate_member", f"member {text(name)!r} appears twice")
        else:
            fields[what] = i
    if scan.damage and table:
        _drop_half_sample(scan, table)

    wanted = label_field.lower().encode()
    numbers = {name: number for number, name in enumerate(classes or [])}
    for key, fields in table.items():
        found = [what for what in fields if what in _IMAGE_BYTES]
        inner = b""
        if not found:
            found = [what for what in fields if b"." in what and what.rsplit(b".", 1)[1] in _IMAGE_BYTES]
            inner = found[0].rsplit(b".", 1)[0] + b"." if found else b""
        if not found:
            out.ignored["no_image"] += 1
            continue
        if len(found) > 1:
            both = " and ".join(repr(text(scan.names[fields[what]])) for what in found[:2])
            problem(
                "several_images",
                f"sample {text(key)!r} has {len(found)} images ({both}): a key ends at the first dot of the file name",
            )
            if inner:  # dotted names merged by the key rule: no telling which labels belong to which
                continue
        at = fields[found[0]]
        if scan.sizes[at] == 0:
            problem("empty_image", f"member {text(scan.names[at])!r} has 0 bytes")
            continue
        label: int | None = None
        label_at = fields.get(wanted, fields.get(inner + wanted))
        if label_at is not None:
            try:
                label = parse_label(scan.content(label_at), numbers)
            except ValueError as err:
                problem("malformed_label", f"member {text(scan.names[label_at])!r}: {err}")
                continue
        out.keys.append(text(key))
        out.offsets.append(scan.offsets[at])
        out.sizes.append(scan.sizes[at])
        out.extensions.append(text(found[0]))
        out.labels.append(label)
    out.ignored = +out.ignored
    return out


def parse_label(content: bytes, numbers: dict[str, int]) -> int:
    """The class number in a label member. Raises ValueError saying what stands there instead."""
    word = content.decode("utf-8", errors="backslashreplace").strip()
    if word in numbers:
        return numbers[word]
    digits = word[1:] if word[:1] in "+-" else word
    if digits.isascii() and digits.isdigit() and len(digits) < 19:
        return int(word)
    known = " or the name of a class" if numbers else ""
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
