"""Be interrupted while an archive is written, or with `loud` fail in the same place without: what an archive says at its end."""

import contextlib
import os
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

from tarflow.cli import _orderly_end


def half(path: Path, loud: bool) -> None:
    with path.open("wb") as file:
        archive = zipfile.ZipFile(file, "w")
        archive.writestr("a", b"1")
        if loud:
            file.close()
            del archive
            return
        os.kill(os.getpid(), signal.SIGINT)
        archive.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, _orderly_end() as asked:
        with contextlib.suppress(KeyboardInterrupt):
            half(Path(folder) / "a.npz", sys.argv[1:] == ["loud"])
        print("ended", set(asked) == {signal.SIGINT})


if __name__ == "__main__":
    main()
