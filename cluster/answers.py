"""Runs other programs with a timeout and a bound on their output."""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

LIMIT = 64 << 20  # bytes; the queue of a large cluster takes a tenth of it


class TooMuchError(subprocess.SubprocessError):
    """A program printed more than the limit."""


def answer(
    command: Sequence[str], timeout_s: float, *, begin: Callable[[], None] | None = None, limit: int = LIMIT
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with no input, in a session of its own. `begin`: called in the new process.

    Raises:
        subprocess.TimeoutExpired: it, or what it has started, still holds its output open.
        TooMuchError: it has printed more than `limit` bytes.
        OSError: it cannot be run.

    """
    end = time.monotonic() + timeout_s
    process = subprocess.Popen(  # noqa: S603 -- commands of Slurm, whose words are made in this room
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=begin,
    )  # fmt: skip
    said: dict[int, bytearray] = {}
    try:
        with selectors.DefaultSelector() as open_outputs:
            for file in (process.stdout, process.stderr):
                assert file is not None
                said[file.fileno()] = bytearray()
                open_outputs.register(file, selectors.EVENT_READ)
            while open_outputs.get_map():
                for key, _ in open_outputs.select(max(end - time.monotonic(), 0)):
                    if piece := os.read(key.fd, 1 << 16):
                        said[key.fd] += piece
                    else:
                        open_outputs.unregister(key.fileobj)
                if sum(map(len, said.values())) > limit:
                    raise TooMuchError(f"`{' '.join(command)}` printed more than {limit >> 20} MiB")
                if open_outputs.get_map() and time.monotonic() > end:
                    raise subprocess.TimeoutExpired(command, timeout_s)
        process.wait(max(end - time.monotonic(), 0.1))
    except BaseException:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # with its child processes
        process.wait()
        raise
    finally:
        for file in (process.stdout, process.stderr):
            if file is not None:
                file.close()
    out, err = (bytes(text).decode("utf-8", errors="replace") for text in said.values())
    return subprocess.CompletedProcess(command, process.returncode, out, err)
