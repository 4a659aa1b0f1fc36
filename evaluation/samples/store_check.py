"""Which files of kept samples are no longer whole. What has the size that it was written with is taken as whole."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.png_check import flaw, flaw_of_file
from tarflow.evaluation.samples.store_files import load_note
from tarflow.files import listed
from tarflow.records import DamagedFileError

Shape = tuple[int, int, int]  # channels, height, width


def damaged_shards(folder: Path, sizes: Mapping[str, int], shape: Shape | None) -> dict[Path, str]:
    """Shards that are not whole, with the reason. `sizes`: bytes of those that were once complete, by name."""
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
    ending = 2 * tarfile.BLOCKSIZE  # of zeros, in every tar
    try:
        if not path.is_file():
            raise EvaluationError(f"{path} cannot be read: it is no regular file")
        if path.stat().st_size < ending:
            return "cut off"
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                content = shard.extractfile(member)
                data = content.read() if content else b""
                if len(data) != member.size:
                    return "cut off"
                reason = flaw(data, shape) if member.name.endswith(".png") else None
                if reason:
                    return f"its member {member.name} is {reason}"
            file.seek(-ending, 2)
            return "cut off" if any(file.read()) else None
    except tarfile.TarError as error:
        return f"damaged ({error})"
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from None


def damaged_pictures(folder: Path, sizes: Mapping[str, int], shape: Shape | None) -> dict[Path, str]:
    """Pictures that are missing or not whole, and the notes `samples-FIRST-LAST.json` of the stretches they belong to.

    `sizes`: bytes of those notes that were once complete, by name.
    """
    found: dict[Path, str] = {}
    for note in listed(folder, "samples-*.json"):
        try:
            stretch = load_note(note)
        except DamagedFileError as error:
            found[note] = f"damaged ({error.problem})"
            continue
        length = note.stat().st_size
        if length != sizes.get(note.name, length):  # it may be read, but it is not the one that was written
            found[note] = f"{length} bytes instead of {sizes[note.name]}"
            continue
        for index, size in ((int(i), stretch.sizes.get(i)) for i in stretch.labels):
            path = folder / "images" / f"{index:08d}.png"
            if not path.exists():
                found[note] = f"{path.name} is missing"
            elif not path.is_file() or path.stat().st_size != size:
                reason = flaw_of_file(path, shape)
                if reason is None and size is not None:
                    reason = f"not the one that was written: {path.stat().st_size} bytes instead of {size}"
                if reason:
                    found |= {note: f"{path.name} is {reason}", path: reason}
    return found
