"""FOLDER: as another user, try to get at a private folder; print what came of each attempt. Needs root."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

OTHER = 12345


def tried(what: Callable[[], object]) -> str:
    try:
        what()
    except OSError as error:
        return type(error).__name__
    return "done"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    os.setgid(OTHER)
    os.setuid(OTHER)
    print(
        tried(lambda: (folder / "file").read_text()),
        tried(lambda: (folder / "planted").write_text("x")),
        tried(lambda: os.listdir(folder)),
        tried(lambda: os.replace(folder / "file", folder / "other")),
        tried(lambda: folder.rename(folder.with_name("gone"))),
    )
