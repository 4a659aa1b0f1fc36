"""The code as it was at submission: what runs after a requeue is what was submitted, and knows which commit it was.

A run directory may come from someone else, or be one that others write into. So a copy that is there already is used only
if it is this very code, file by file, and nothing besides that Python could import.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tarflow.code_version import NOTE, code_version
from tarflow.files import discard
from tarflow.interpreter import HOME
from tarflow.leases import unique_name

PACKAGE = "tarflow"


def code_files(source: Path = HOME) -> list[Path]:
    """Every file of the package, relative to the folder that holds it; its rooms may be links, as in a checkout."""
    found = []
    for folder, folders, names in os.walk(source / PACKAGE, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        found += [Path(folder, name).relative_to(source) for name in sorted(names)]
    return found


def take(folder: Path, source: Path = HOME) -> Path:
    """Copy the code to `folder/code-HASH` unless this very code is there already; returns that path.

    A note in the copy says which commit it was, and whether there were changes beyond it.
    """
    note = json.dumps({key: value for key, value in code_version().items() if key != "version"})
    files = [file for file in code_files(source) if file.name != NOTE]
    digest = _digest(note, source, files)
    name, number = f"code-{digest[:12]}", 1
    target = folder / name
    while os.path.lexists(target):
        if _is_the_same(target, digest, [*files, Path(PACKAGE, NOTE)]):
            return target
        number += 1
        target = folder / f"{name}-{number}"
    temporary = folder / f".{target.name}.{unique_name()}"
    try:
        for file in files:
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, temporary / file)
        (temporary / PACKAGE / NOTE).write_text(note)
        try:
            temporary.rename(target)
        except OSError:  # another submission was quicker
            if not target.is_dir():
                raise
            return take(folder, source)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _digest(note: str, folder: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(note.encode())
    for name in files:
        digest.update(str(name).encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    return digest.hexdigest()


def _is_the_same(copy: Path, digest: str, files: Sequence[Path]) -> bool:
    """Whether a copy holds these files, no link and nothing else. What Python has compiled in it is removed: it would be
    run unread, whatever it is."""
    found = set()
    for folder, folders, names in os.walk(copy):
        if "__pycache__" in folders:
            discard(Path(folder, "__pycache__"))
            folders.remove("__pycache__")
        inside = [Path(folder, name) for name in (*folders, *names)]
        if any(path.is_symlink() or not (path.is_dir() or path.is_file()) for path in inside):
            return False
        found |= {path.relative_to(copy) for path in inside if not path.is_dir()}
    if copy.is_symlink() or found != set(files):
        return False
    note = (copy / PACKAGE / NOTE).read_text(errors="replace")
    return _digest(note, copy, [name for name in files if name.name != NOTE]) == digest
