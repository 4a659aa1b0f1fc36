"""Finds files of stored samples that are no longer complete. A file of the size it was written with counts as complete."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.png_check import flaw, flaw_of_file
from tarflow.evaluation.samples.store_files import load_note
from tarflow.files import listed, open_to_read
from tarflow.records import DamagedFileError

Shape = tuple[int, int, int]  # channels, height, width


def damaged_shards(folder: Path, sizes: Mapping[str, int], shape: Shape | None) -> dict[Path, str]:
    """Incomplete shards, with the reason. `sizes`: bytes of those recorded as complete, by name."""
    found = {}
    for path in listed(folder, "samples-*.tar"):
        size, written = path.lstat().st_size, sizes.get(path.name)
        if written is None:
            reason = _flaw_of_shard(path, shape)
        else:
            reason = None if size == written else f"{size} bytes instead of {written}"
        if reason:
            found[path] = reason
    return found


def _flaw_of_shard(path: Path, shape: Shape | None) -> str | None:
    ending = 2 * tarfile.BLOCKSIZE  # every tar ends with this many zero bytes
    try:
        if not path.is_file():
            raise EvaluationError(f"{path} cannot be read: it is not a regular file")
        if path.stat().st_size < ending:
            return "cut off"
        with open_to_read(path) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                content = shard.extractfile(member)
                data = content.read() if content else b""
                if len(data) != member.size:
                    return "cut off"
                reason = flaw(data, shape) if member.name.endswith(".png") else None
                if reason:
                    return f"its member {member.name} is {reason}"
            # tarfile reads a tar without its end marker silently, and a truncated copy may lack just that.
            file.seek(-ending, 2)
            return "cut off" if any(file.read()) else None
    except tarfile.TarError as error:
        return f"damaged ({error})"
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from None


def damaged_pictures(folder: Path, sizes: Mapping[str, int], shape: Shape | None) -> dict[Path, str]:
    """Missing or incomplete pictures, and the notes `samples-FIRST-LAST.json` of the ranges they belong to, with the reason.

    `sizes`: bytes of the notes recorded as complete, by name.
    """
    found: dict[Path, str] = {}
    for note in listed(folder, "samples-*.json"):
        try:
            content = load_note(note)
        except DamagedFileError as error:
            found[note] = f"damaged ({error.problem})"
            continue
        length = note.stat().st_size
        if length != sizes.get(note.name, length):  # readable, but not the note that was written
            found[note] = f"{length} bytes instead of {sizes[note.name]}"
            continue
        # Only a picture whose size differs is opened: reading every picture would take as long as drawing some.
        for index, size in ((int(i), content.sizes.get(i)) for i in content.labels):
            path = folder / "images" / f"{index:08d}.png"
            if path.is_symlink():
                found |= {note: f"{path.name} is a link", path: "a link"}
            elif not path.exists():
                found[note] = f"{path.name} is missing"
            elif not path.is_file() or path.stat().st_size != size:
                reason = flaw_of_file(path, shape)
                if reason is None and size is not None:
                    reason = f"not the one that was written: {path.stat().st_size} bytes instead of {size}"
                if reason:
                    found |= {note: f"{path.name} is {reason}", path: reason}
    return found
