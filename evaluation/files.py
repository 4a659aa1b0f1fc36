"""Writing results so that a crash leaves the old one or the new one, never half of one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling of `path`, then put it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, indented, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def append_line(path: Path, value: Any) -> None:
    """Add one JSON object as a line. A torn last line, left by a crash, is closed first and spoils no other."""
    text = json.dumps(value, allow_nan=False) + "\n"
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END) and _last_byte(file) != b"\n":
            text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return bytes(file.read(1))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; a missing file has none, a torn line is left out."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def publish_dir(temporary: Path, final: Path) -> bool:
    """Rename a finished directory into place; False if there is one already (someone was faster)."""
    for path in [*temporary.rglob("*"), temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    try:
        os.rename(temporary, final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(temporary)
        return False
    return True
