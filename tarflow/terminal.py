"""What is printed: text from data is escaped, and the reader of standard output or error may go away.

A class name, a key or a file name may contain terminal control sequences (colours, titles, the clipboard), a line break that
forges a line of ours, or characters that reverse the direction of text. All of these are shown as escapes. A reader goes away
in `tarflow data info | head -1`, and when a terminal is closed.
"""

import errno
import io
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

ELLIPSIS = "…"


def plain(value: object, limit: int = 200) -> str:
    r"""One line of at most `limit` characters in which everything is visible.

    Control characters, line ends, invisible and direction characters and undecodable bytes become escapes such as \x1b, \n
    or \u202e.
    """
    text = str(value)
    shown = _visible(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: max(limit - 1, 0)] + ELLIPSIS


def plain_lines(value: object, limit: int = 100_000) -> str:
    """The same for text of several lines, such as a message or a log.

    Line ends and tabs are kept. A carriage return, which would overwrite the line, becomes a line end.
    """
    text = str(value)
    text = text[:limit] + (ELLIPSIS if len(text) > limit else "")
    lines = re.split(r"\r\n|\r|\n", text)
    return "\n".join("\t".join(map(_visible, line.split("\t"))) for line in lines)


def message(value: object) -> str:
    """A message with all lines but the first indented, so that text from data cannot pass for a line of ours."""
    first, *rest = plain_lines(value).split("\n")
    return "\n".join([first, *(line if not line or line[0] in " \t" else f"  {line}" for line in rest)])


def _visible(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class ReaderGoneError(BrokenPipeError):
    """The reader of standard output is gone."""


class Output(io.FileIO):
    """A descriptor whose failures are handled as its command asks.

    If `lasting`, writing never fails: output goes to /dev/null once its reader is gone, and is lost on a full disk.
    Otherwise a gone reader raises ReaderGoneError, and every other error names the output.
    """

    def __init__(self, descriptor: int, name: str, lasting: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.title, self.lasting = name, lasting

    def write(self, data: Any, /) -> int:
        """Write bytes; returns their number. Raises ReaderGoneError or OSError, unless `lasting`."""
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
        """EPIPE for a pipe; EIO for a terminal (for a file, EIO is an error of the disk)."""
        terminal = stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        return error.errno == errno.EPIPE or (error.errno == errno.EIO and terminal)


@contextmanager
def guarded_outputs() -> Iterator["list[Output]"]:
    """Guard the process's own stdout and stderr; yields stdout's Output, if stdout was not redirected.

    Text that cannot be encoded is escaped (a file name need not be text), and so are terminal control sequences: to draw,
    use `styled`.
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
            if stream is not None:  # the process was started with it closed: `>&-`
                with suppress(OSError):
                    stream.flush()
        sys.stdout, sys.stderr = out, err


def styled(stream: TextIO) -> TextIO:
    """A guarded stream for a library that draws: its control sequences reach the terminal.

    Text from data must be escaped before, by `plain` and its like.
    """
    return cast(TextIO, _Drawn(stream)) if isinstance(stream, _Shown) else stream


class _Shown(io.TextIOWrapper):
    """A text stream that escapes control sequences."""

    def write(self, text: str, /) -> int:
        super().write(plain_lines(text, limit=len(text)))
        return len(text)


class _Drawn:
    """The same stream without the escaping."""

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
