"""Standard output and errors, when whoever reads them goes away: `tarflow data info | head -1`, a terminal that is closed."""

import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from tarflow.terminal import plain_lines


class ReaderGoneError(BrokenPipeError):
    """Nobody reads standard output any more."""


class Output(io.FileIO):
    """A descriptor that fails as its command wants it.

    While `lasting`, nothing fails: once nobody reads what is written it goes nowhere, and what a full disk refuses is lost.
    Otherwise a reader that is gone raises ReaderGoneError, and every other error names the output.
    """

    def __init__(self, descriptor: int, name: str, lasting: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.title, self.lasting = name, lasting

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            gone = self._reader_is_gone(error)
            if gone:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            if self.lasting:
                return memoryview(data).nbytes
            if gone:
                raise ReaderGoneError(error.errno, error.strerror) from None
            raise OSError(error.errno, error.strerror, self.title) from None

    def _reader_is_gone(self, error: OSError) -> bool:
        """Of a pipe EPIPE says so, of a terminal EIO, which of a file is the disk's error."""
        terminal = stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        return error.errno == errno.EPIPE or (error.errno == errno.EIO and terminal)


@contextmanager
def guarded_outputs() -> Iterator["list[Output]"]:
    """Have the process's own stdout and stderr guarded for a while; yields stdout's Output, if it is its own.

    What cannot be encoded is escaped (a file's name need not be text), and so is what a terminal would obey: who means to
    draw asks for `styled`.
    """
    out, err = sys.stdout, sys.stderr
    guards = []
    try:
        if isinstance(out, io.TextIOWrapper) and out is sys.__stdout__:
            guards.append(Output(out.fileno(), "/dev/stdout", lasting=False))
            sys.stdout = _text(out, guards[0])
        if isinstance(err, io.TextIOWrapper) and err is sys.__stderr__:
            sys.stderr = _text(err, Output(err.fileno(), "/dev/stderr", lasting=True))
        yield guards
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed from the beginning: `>&-`
                with suppress(OSError):
                    stream.flush()
        sys.stdout, sys.stderr = out, err


def styled(stream: TextIO) -> TextIO:
    """A guarded stream for a library that draws: its colours and movements reach the terminal. What it draws of data must
    have gone through `tarflow.terminal`.
    """
    return cast(TextIO, _Drawn(stream)) if isinstance(stream, _Shown) else stream


class _Shown(io.TextIOWrapper):
    """Shows escape sequences and the like, whoever writes them."""

    def write(self, text: str, /) -> int:
        super().write(plain_lines(text, limit=len(text)))
        return len(text)


class _Drawn:
    """The same stream, on which nothing is escaped."""

    def __init__(self, stream: _Shown) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return io.TextIOWrapper.write(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _text(like: io.TextIOWrapper, output: Output) -> io.TextIOWrapper:
    like.flush()
    binary = output if like.write_through else io.BufferedWriter(output)  # python -u
    return _Shown(
        binary, encoding=like.encoding, errors="backslashreplace", line_buffering=like.line_buffering,
        write_through=like.write_through,
    )  # fmt: skip
