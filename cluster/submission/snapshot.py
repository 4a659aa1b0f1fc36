"""The code as it was at submission: what runs after a requeue is what was submitted, and knows which commit it was."""

import hashlib
import json
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from tarflow.code_version import NOTE, code_version
from tarflow.files import read_bytes
from tarflow.interpreter import HOME

PACKAGE = "tarflow"
CACHE = "__pycache__"


def code_files(source: Path = HOME) -> list[Path]:
    """Every file of the package, relative to the folder that holds it; its rooms may be links, as in a checkout."""
    found = []
    for folder, folders, names in os.walk(source / PACKAGE, followlinks=True):
        folders[:] = sorted(name for name in folders if name != CACHE)
        found += [Path(folder, name).relative_to(source) for name in sorted(names)]
    return found


def take(folder: Path, source: Path = HOME) -> Path:
    """Copy the code to `folder/code-HASH` unless this very code is there already; returns that path.

    A note in the copy says which commit it was, and whether there were changes beyond it. What stands under that name with
    another content is not run, and not touched: some job may still run it.
    """
    note = json.dumps({key: value for key, value in code_version().items() if key != "version"})
    files = [name for name in code_files(source) if name.name != NOTE]
    digest = _digest(source, files, note)
    target, number = folder / f"code-{digest[:12]}", 1
    while os.path.lexists(target):
        if _holds(target, digest):
            return target
        number += 1
        target = folder / f"code-{digest[:12]}-{number}"
    temporary = folder / f".{target.name}.{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        for name in files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, temporary / name)
        (temporary / PACKAGE / NOTE).write_text(note)
        try:
            temporary.rename(target)
        except OSError:  # another submission was quicker
            if not _holds(target, digest):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _holds(target: Path, digest: str) -> bool:
    """Whether a snapshot holds exactly this code, and nothing else that Python would run.

    Links are refused. Compiled files are removed, since they may not come from these sources.
    """
    if target.is_symlink() or any(
        path.is_symlink() or not (path.is_dir() or path.is_file()) for path in target.rglob("*")
    ):
        return False
    if {path.name for path in target.iterdir()} - {CACHE} != {PACKAGE}:
        return False
    for cache in list(target.rglob(CACHE)):
        shutil.rmtree(cache, ignore_errors=True)
    note = ""
    with suppress(OSError, ValueError):
        note = (target / PACKAGE / NOTE).read_text()
    files = [name for name in code_files(target) if name.name != NOTE]
    return _digest(target, files, note) == digest


def _digest(source: Path, files: list[Path], note: str) -> str:
    digest = hashlib.sha256(note.encode())
    for name in files:
        digest.update(os.fsencode(name) + b"\0" + read_bytes(source / name) + b"\0")
    return digest.hexdigest()
