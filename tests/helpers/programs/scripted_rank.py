"""FOLDER WHAT: a rank without torch. It notes its start and its signals in FOLDER, then does as told.

WHAT: exit-CODE | wait (for a signal) | lose-rank-1-once | deaf (to SIGTERM and SIGINT).
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def main(folder: Path, what: str) -> None:
    rank = os.environ["RANK"]
    life = len(list(folder.glob(f"began-{rank}-*")))

    def stop(number: int, frame: FrameType | None) -> None:
        (folder / f"signal-{rank}").write_text(signal.Signals(number).name)
        sys.exit(75)

    for number in HEEDED:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDED)
    (folder / f"began-{rank}-{life}").touch()
    if what.startswith("exit-"):
        sys.exit(int(what.removeprefix("exit-")))
    elif what == "lose-rank-1-once":
        if life == 0:
            if rank == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)  # waits for its peer
    elif what == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        (folder / "deaf").touch()
        time.sleep(300)
    elif what == "wait":
        time.sleep(300)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
