"""What a disk, an editor or a stranger does to a file. Every mutation is drawn from a seeded generator."""

import json
import os
import random
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEAL = "checksum"
HUGE = 4 << 30  # bytes of a file that is nothing but a hole
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**30, 1e308, -0.5, float("nan"), float("-inf"), "", "x", "../../x", "/etc/passwd", [], {}, [[]],
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "two\nlines", "\0", "x" * 100_000, "\ud800",
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """What was done. `valid`: the file may be one that the product itself could have written, with other values."""

    text: str
    valid: bool = False
    twin: bool = False
    place: bool = False  # something else lies in the file's place


def damage(path: Path, form: str, twin: Path, home: Path, rng: random.Random) -> Damage:
    """Damage a file in place. `form`: what is known of its inside; `twin`: the same file of another home."""
    ways: list[Callable[..., Damage]] = [_bytes] * 5 + [_place] + [_twin]
    inside: dict[str, Callable[..., Damage]] = {
        "json": _json, "lines": _line, "yaml": _yaml, "npz": _zip, "zip": _zip, "safetensors": _header,
    }  # fmt: skip
    if form in inside:
        ways += [inside[form]] * (5 if form in ("json", "lines", "yaml") else 3)
    way = rng.choice(ways)
    return way(path, twin, home, rng)


# --- bytes --------------------------------------------------------------------------------------------------------------


def _bytes(path: Path, twin: Path, home: Path, rng: random.Random) -> Damage:
    data = bytearray(path.read_bytes())
    size = len(data)
    name = rng.choice(["bit", "bit", "bit", "bytes", "cut", "empty", "append", "double", "delete", "swap", "zeros"])
    start, length = rng.randrange(size or 1), rng.randint(1, max(1, min(size, 64)))
    if name in ("empty",) or not size:
        data[:] = b""
        text = "emptied"
    elif name == "bit":
        bit = rng.randrange(8)
        data[start] ^= 1 << bit
        text = f"bit {bit} of byte {start} flipped"
    elif name == "bytes":
        places = [rng.randrange(size) for _ in range(rng.randint(2, 6))]
        for place in places:
            data[place] = rng.randrange(256)
        text = f"bytes {places} rewritten"
    elif name == "cut":
        del data[start:]
        text = f"cut to {start} of {size} bytes"
    elif name == "append":
        data += rng.choice([b"\n", b"\0" * 512, b"{}\n", b"garbage", rng.randbytes(100), b"[1", bytes(data[:200])])
        text = f"{len(data) - size} bytes appended"
    elif name == "double":
        data[start:start] = data[start : start + length]
        text = f"bytes {start} to {start + length} doubled"
    elif name == "delete":
        del data[start : start + length]
        text = f"bytes {start} to {start + length} deleted"
    elif name == "zeros":
        block = start // 512 * 512
        end = min(size, block + 512)
        data[block:end] = bytes(end - block)
        text = f"bytes {block} to {end} zeroed"
    else:
        other = rng.randrange(size)
        a, b = sorted((start, other))
        length = min(length, b - a, size - b)
        data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]
        text = f"{length} bytes at {a} and {b} swapped"
    path.write_bytes(data)
    return Damage(text)


def _place(path: Path, twin: Path, home: Path, rng: random.Random) -> Damage:
    """Something else where the file was."""
    name = rng.choice(["folder", "fifo", "dangling link", "link to itself", "link to another file", "huge hole"])
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if name == "folder":
        path.mkdir()
        (path / "something").write_text("x")
    elif name == "fifo":
        os.mkfifo(path)
    elif name == "dangling link":
        path.symlink_to(home / "nowhere")
    elif name == "link to itself":
        path.symlink_to(path.name)
    elif name == "link to another file":
        path.symlink_to(home / "another.txt")
    else:
        with open(path, "wb") as file:
            file.truncate(HUGE)
    return Damage(f"a {name} in its place", place=True)


def _twin(path: Path, twin: Path, home: Path, rng: random.Random) -> Damage:
    """The same file of another run or data set: whole and sound, but not this one's."""
    data = twin.read_bytes()
    same = data == path.read_bytes()
    path.write_bytes(data)
    return Damage("replaced by the same file of another home", same, twin=True)


# --- JSON ---------------------------------------------------------------------------------------------------------------


def _json(path: Path, twin: Path, home: Path, rng: random.Random) -> Damage:
    text, done = _edited(path.read_text(), rng)
    path.write_text(text, errors="surrogatepass")
    return done


def _line(path: Path, twin: Path, home: Path, rng: random.Random) -> Damage:
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    match rng.choice(["edit", "edit", "edit", "repeat", "remove", "order", "torn"]):
        case "edit":
            lines[number], done = _edited(lines[number], rng, one_line=True)
            done = Damage(f"line {number + 1}: {done.text}", done.valid)
        case "repeat":
            lines.insert(number, lines[number])
            done = Damage(f"line {number + 1} twice", valid=True)
        case "remove":
            del lines[number]
            done = Damage(f"line {number + 1} removed", valid=True)
        case "order":
            lines.reverse()
            done = Damage("lines in reverse order", valid=True)
        case _:
            path.write_text("\n".join(lines)[: -rng.randint(1, len(lines[-1]))])
            return Damage("the last line torn", valid=True)
    path.write_text("".join(line + "\n" for line in lines), errors="surrogatepass")
    return done


def _edited(text: str, rng: random.Random, one_line: bool = False) -> tuple[str, Damage]:
    """A JSON text with one thing changed; if it is sealed, the seal is kept, made to fit, or taken off."""
    tree = json.loads(text)
    places = [place for place in _places(tree) if place[-1] != SEAL]
    what = rng.choice(
        ["value", "value", "value", "number", "number", "remove", "rename", "extra", "twice", "deep", "list"]
    )
    if not places or what in ("deep", "list"):
        if what == "deep":
            return "[" * 5000 + "]" * 5000, Damage("5,000 lists in each other")
        return json.dumps([tree]), Damage("the object in a list")
    place = rng.choice(places)
    parent = tree
    for key in place[:-1]:
        parent = parent[key]
    key, name = place[-1], ".".join(map(str, place))
    valid = False
    if what == "value":
        parent[key] = rng.choice(VALUES)
        done = f"{name} set to {parent[key]!r:.40}"
    elif what == "number":
        numbers = [p for p in places if isinstance(_at(tree, p), int | float) and not isinstance(_at(tree, p), bool)]
        place = rng.choice(numbers or [place])
        name, old = ".".join(map(str, place)), _at(tree, place)
        new = rng.choice([old + 1, -old, old * 1000]) if numbers else "other"
        _at(tree, place[:-1])[place[-1]] = new
        done, valid = f"{name} changed from {old!r:.40} to {new!r:.40}", True
    elif what == "remove":
        del parent[key]
        done = f"{name} removed"
    elif what == "rename" and isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)
        done = f"{name} renamed"
    elif what == "twice" and isinstance(parent, dict):
        marked = json.dumps({**tree, "\x00": 0}, indent=None if one_line else 1)
        double = json.dumps(str(place[0])) + ": 7"
        return marked.replace('"\\u0000": 0', double), Damage(f"{place[0]} stands in it twice")
    else:
        if isinstance(tree, dict):
            tree["extra\x1b[31m"] = 1
        else:
            tree.append("\x1b[31mextra")
        done = "a field more"
    seal = rng.choice(["kept", "fitting", "gone"]) if isinstance(tree, dict) and SEAL in tree else ""
    if seal in ("fitting", "gone"):
        bare = {k: v for k, v in tree.items() if k != SEAL}
        plain = json.dumps(bare, sort_keys=True, separators=(",", ":"))
        tree = {**bare, SEAL: f"{zlib.crc32(plain.encode(errors='surrogatepass')):08x}"} if seal == "fitting" else bare
        done, valid = f"{done}; the checksum {'made to fit' if seal == 'fitting' else 'taken off'}", True
    else:
        valid = False
    text = json.dumps(tree, indent=None if one_line else 1)
    if rng.random() < 0.1 and (numbers := re.findall(r"(?<=: )-?\d+(?=[,\s}])", text)):
        text, done = text.replace(f": {numbers[0]}", ": 1e400", 1), f"{done}; 1e400 for {numbers[0]}"
    return text, Damage(done, valid)


def _places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from _places(value, (*at, key))


def _at(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


# --- YAML ---------------------------------------------------------------------------------------------------------------


def _yaml(path: Path, twin: Path, home: Path, rng: random.Random) -> Damage:
    text = path.read_text()
    lines = text.splitlines()
    values = [n for n, line in enumerate(lines) if re.match(r"\s*[\w-]+: \S", line)]
    number = rng.choice(values)
    head, _, value = lines[number].partition(": ")
    name = head.strip()
    bomb = "&a0 [x]\n" + "".join(f"l{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12))
    new, what = rng.choice(
        [
            (None, "removed"),
            ("!!python/object/apply:os.system ['touch planted']", "a tag"),
            ("[" * 3000 + "]" * 3000, "3,000 lists in each other"),
            ("{a: " * 3000 + "}" * 3000, "3,000 mappings in each other"),
            ("1e400", "1e400"), (".nan", "NaN"), ("-1", "-1"), ("0", "0"), ("3e11", "3e11"), ("2000000000", "2000000000"),
            ("9" * 5000, "5,000 digits"), ('"\\e[31mred"', "ANSI"), ('"two\\nlines"', "a newline"), ("../../../x", "../"),
            ("null", "null"), ("[1, 2]", "a list"), ("yes", "yes"), ("*nobody", "an unknown alias"), ("&me [*me]", "itself"),
            (bomb, "a billion aliases"), (f"{value}\n{lines[number]}", "twice"), ("'", "an open quote"),
            ("s-{0..9999}{0..9999}{0..9999}.tar", "a range of ranges"), ("x" * 200_000, "200,000 letters"),
        ]
    )  # fmt: skip
    lines[number : number + 1] = [] if new is None else [f"{head}: {new}"]
    path.write_text("\n".join(lines) + "\n")
    return Damage(f"{name}: {what}", valid=new not in (None,))


# --- archives -----------------------------------------------------------------------------------------------------------


def _zip(path: Path, twin: Path, home: Path, rng: random.Random) -> Damage:
    """A member renamed, left out, of another content, or said to be huge; the archive itself stays sound."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = rng.randrange(len(members))
    name, content = members[number]
    what = rng.choice(["renamed", "left out", "twice", "changed", "huge", "emptied", "of objects"])
    if what == "renamed":
        members[number] = (rng.choice([f"x{name}", f"../{name}", name.upper()]), content)
    elif what == "left out":
        del members[number]
    elif what == "twice":
        members.append(members[number])
    elif what == "changed" and content:
        place = rng.randrange(len(content))
        members[number] = (name, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif what == "huge":
        members[number] = (name, re.sub(rb"'shape': \([^)]*\)(.{4})", rb"'shape': (9999999999,),", content, count=1))
    elif what == "of objects":
        members[number] = (name, re.sub(rb"'descr': '[^']*'", b"'descr': '|O'", content, count=1))
    else:
        members[number] = (name, b"")
    with (
        zipfile.ZipFile(path, "w") as archive,
        warnings.catch_warnings(action="ignore"),
    ):  # of a name that is there twice
        for member, data in members:
            archive.writestr(member, data)
    return Damage(f"member {name} {what}", valid=what in ("changed", "twice"))


def _header(path: Path, twin: Path, home: Path, rng: random.Random) -> Damage:
    """The JSON at the head of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text, done = _edited(data[8 : 8 + size].decode(), rng, one_line=True)
    head = text.encode(errors="surrogatepass")
    head += b" " * (-len(head) % 8)
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
    return Damage(f"header: {done.text}", done.valid)
