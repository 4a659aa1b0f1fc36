"""The code as it was at submission: what runs after a requeue is what was submitted, and knows which commit it was."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from tarflow.code_version import NOTE, code_version
from tarflow.interpreter import HOME

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
    digest = hashlib.sha256(note.encode())
    files = [name for name in code_files(source) if name.name != NOTE]
    for name in files:
        digest.update(str(name).encode() + b"\0" + (source / name).read_bytes() + b"\0")
    target = folder / f"code-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    temporary = folder / f".{target.name}.{os.getpid()}"
    for name in files:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, temporary / name)
    (temporary / PACKAGE / NOTE).write_text(note)
    try:
        temporary.rename(target)
    except OSError:  # another submission was quicker
        shutil.rmtree(temporary)
        if not target.is_dir():
            raise
    return target
