"""Small JSON files that tarflow writes and reads back, each kind with a model, and one loader for all.

A record is sealed: `checksum` is the CRC-32 of all its other fields, so changes by a disk, an editor or a stranger are
detected. Files of versions before the seal have none; their fields are validated all the same.

    class RunFile(Record):
        what = "identity of a run"
        way_out = "restore it from a copy"
        run_id: str = Field(pattern="^[0-9a-f]{32}$")

    run = load_record(run_dir / "run.json", RunFile)
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tarflow.errors import UserError
from tarflow.files import append_line, open_to_read, write_text
from tarflow.terminal import plain

SEAL = "checksum"
LINES_LIMIT = 1 << 30  # bytes of a file of lines: the metrics of a hundred million steps take less
LIMIT = 16 << 20  # bytes of a record, or of one line of a file of lines


class DamagedFileError(UserError):
    """A damaged or foreign file; the message names the file, the place in it, what is wrong, and the way out."""

    def __init__(self, path: Path, problem: str, way_out: str = "", *, where: str = "", what: str = "") -> None:
        problem, where = plain(problem, 1000), plain(where)  # a field's name is the file's own
        self.path, self.problem, self.way_out, self.where = Path(path), problem, way_out, where
        name = f"{path} ({what})" if what else str(path)
        text = f"{name} is damaged or was not written by tarflow: {f'{where}: ' if where else ''}{problem}"
        super().__init__(f"{text}; {way_out}" if way_out else text)


class Record(BaseModel):
    """Base of every kind of record. Types are strict, numbers finite, unknown fields errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    what: ClassVar[str] = ""  # what the file is for, in error messages
    way_out: ClassVar[str] = "restore it from a copy"
    limit: ClassVar[int] = LIMIT
    must_be_sealed: ClassVar[bool] = False  # files without a seal, as of earlier versions, are refused


RecordT = TypeVar("RecordT", bound=Record)


def load_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Read one record.

    Raises:
        DamagedFileError: it is too large, not a JSON object, its seal does not match, or a field is missing, unknown or
            out of bounds.
        FileNotFoundError, OSError: it is missing or unreadable.

    """
    try:
        return as_record(parse_object(read_bounded(path, kind.limit)), kind)
    except _FlawError as flaw:
        raise DamagedFileError(path, flaw.problem, kind.way_out, where=flaw.where, what=kind.what) from None


def save_record(path: Path, record: Record, *, shared: bool = True) -> None:
    """Write a sealed record in one step. `shared`: several processes may write it."""
    write_text(path, json.dumps(sealed(record.model_dump(mode="json")), indent=2) + "\n", shared=shared)


def read_object(
    path: Path,
    kind: type[Record] | None = None,
    *,
    what: str = "",
    way_out: str = Record.way_out,
    limit: int = LIMIT,
) -> dict[str, Any]:
    """Read a JSON object as plain values, for fields without a model (settings of another version); checks its seal.

    `kind`: a model to validate against all the same. Raises as `load_record`.
    """
    if kind is not None:
        what, way_out, limit = kind.what, kind.way_out, kind.limit
    try:
        value = opened(parse_object(read_bounded(path, limit)))
        if kind is not None:
            as_record(value, kind)
        return value
    except _FlawError as flaw:
        raise DamagedFileError(path, flaw.problem, way_out, where=flaw.where, what=what) from None


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write a sealed JSON object; several processes may write it."""
    write_text(path, json.dumps(sealed(value), indent=2, allow_nan=False) + "\n", shared=True)


@dataclass
class Lines:
    """The rows of a file of JSON lines, and which lines were left out."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)  # numbers of lines, from 1
    torn: bool = False  # the last line is incomplete: a kill or a full disk, not damage
    emptied: bool = False  # the file exists and is empty: `append_record_line` creates it with its first line

    def __str__(self) -> str:
        lines = ", ".join(str(number) for number in self.damaged[:5]) + (", ..." if len(self.damaged) > 5 else "")
        return f"{len(self.damaged)} damaged line{'s' * (len(self.damaged) > 1)} left out ({lines})" if lines else ""

    def flaws(self, path: Path) -> list[str]:
        """What is wrong with the file, as text for display."""
        said = [str(self)] if self.damaged else []
        said += ["its last line is cut off"] if self.torn else []
        said += ["it is empty, and is made with its first line"] if self.emptied else []
        return [f"{path}: {'; '.join(said)}"] if said else []


def append_record_line(path: Path, value: dict[str, Any]) -> None:
    """Append a JSON object as a sealed line, durably. A torn last line is terminated first."""
    append_line(path, json.dumps(sealed(value), allow_nan=False), durable=True)


def read_lines(path: Path, tail: int | None = None) -> Lines:
    """The rows of a file of sealed lines; none if it is missing. `tail`: read only this many bytes from its end.

    Lines without a seal are accepted only above the first sealed one, where a version before the seal wrote them; their
    numbers that are not finite are read as null. Raises DamagedFileError if it is too large or not a regular file.
    """
    lines = Lines()
    if not os.path.lexists(path):
        return lines
    if not path.is_file():
        raise DamagedFileError(path, "it is not a regular file", "move it away")
    if tail is None and path.stat().st_size > LINES_LIMIT:
        raise DamagedFileError(path, f"it has more than {LINES_LIMIT} bytes", "move it away")
    any_sealed = False
    with open_to_read(path) as file:
        if tail is not None and (size := file.seek(0, os.SEEK_END)) > tail:
            file.seek(size - tail - 1)
            if b"\0" in file.readline(LIMIT):  # the rest of a line that starts before the tail
                lines.damaged.append(0)
        else:
            file.seek(0)
        for number, line in enumerate(_bounded_lines(file), start=1):
            if not line.strip():
                continue
            try:
                if len(line) == LIMIT or b"\0" in line:  # zeros: what a power cut leaves of a file that was growing
                    lines.damaged.append(number)
                    continue
                value = parse_object(line, constant=_none)
                if any_sealed and SEAL not in value:
                    raise _FlawError("it carries no checksum")
                any_sealed = any_sealed or SEAL in value
                lines.rows.append(opened(value))
            except _FlawError:
                if line.endswith(b"\n") or _holds_an_object(line):  # not just an incomplete line
                    lines.damaged.append(number)
                else:
                    lines.torn = True
    lines.emptied = not (lines.rows or lines.damaged or lines.torn)
    return lines


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with the checksum of its fields."""
    return {**value, SEAL: _checksum(value)}


def opened(value: dict[str, Any]) -> dict[str, Any]:
    """The object without its seal, which is verified if present."""
    if SEAL not in value:
        return value
    bare = {key: item for key, item in value.items() if key != SEAL}
    if value[SEAL] != _checksum(bare):
        raise _FlawError("its checksum does not fit its fields", SEAL)
    return bare


def as_record(value: dict[str, Any], kind: type[RecordT]) -> RecordT:
    """The record in a JSON object, sealed or not. Raises ValueError for the first invalid field."""
    if kind.must_be_sealed and SEAL not in value:
        raise _FlawError("it carries no checksum")
    try:
        return kind.model_validate_json(json.dumps(opened(value)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _FlawError(first["msg"][:1].lower() + first["msg"][1:], where) from None


def read_bounded(path: Path, limit: int = LIMIT) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises ValueError for anything else."""
    if os.path.lexists(path) and not path.is_file():  # exists() would miss a dangling link
        raise _FlawError("it is not a regular file")
    with open_to_read(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _FlawError(f"it has more than {limit} bytes")
    return data


def parse_object(data: bytes, constant: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Parse a JSON object with finite numbers and no duplicate fields. Raises ValueError.

    `constant`: converts NaN and Infinity, which are errors otherwise.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_field_twice,
            parse_float=_finite,
            parse_constant=constant or _no_constant,
        )
    except RecursionError:
        raise _FlawError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise _FlawError("it is not text") from None
    except json.JSONDecodeError as error:
        raise _FlawError(f"it is not JSON ({error})") from None
    except _FlawError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise _FlawError(str(error)) from None
    if not isinstance(value, dict):
        raise _FlawError("it is not a JSON object")
    return value


class _FlawError(ValueError):
    """What is wrong with a file whose name is not known yet."""

    def __init__(self, problem: str, where: str = "") -> None:
        self.problem, self.where = plain(problem, 1000), plain(where)  # a field's name is the file's own
        super().__init__(f"{self.where}: {self.problem}" if where else self.problem)


def _checksum(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{zlib.crc32(text.encode()):08x}"


def _no_field_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _FlawError("a field stands in it twice")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _FlawError(f"{text[:20]} is not a finite number")
    return number


def _no_constant(text: str) -> float:
    raise _FlawError(f"{text} is not a finite number")


def _none(_: str) -> None:
    return None


def _holds_an_object(line: bytes) -> bool:
    """Whether the line starts with a complete JSON value."""
    try:
        json.JSONDecoder().raw_decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _bounded_lines(file: Any) -> Iterable[bytes]:
    """The lines of a file; one that is too long is split into pieces, which are invalid JSON."""
    while line := file.readline(LIMIT):
        yield line
