"""The code as it was at submission: what runs after a requeue is what was submitted."""

import hashlib
import os
import shutil
from pathlib import Path

ROOMS = ("models", "data_pipeline", "trainer", "evaluation", "cluster")
SOURCE = Path(__file__).resolve().parent.parent


def code_files(source: Path = SOURCE) -> list[Path]:
    """Every file of the product's packages, relative to their common folder."""
    found = [Path("tarflow.py")]
    for room in ROOMS:
        found += [
            path.relative_to(source)
            for path in sorted((source / room).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        ]
    return found


def take(folder: Path, source: Path = SOURCE) -> Path:
    """Copy the code to `folder/HASH` unless this very code is there already; returns that path."""
    digest = hashlib.sha256()
    files = code_files(source)
    for name in files:
        digest.update(str(name).encode() + b"\0" + (source / name).read_bytes() + b"\0")
    target = folder / f"code-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    temporary = folder / f".{target.name}.{os.getpid()}"
    for name in files:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, temporary / name)
    try:
        temporary.rename(target)
    except OSError:  # another submission was quicker
        shutil.rmtree(temporary)
        if not target.is_dir():
            raise
    return target
