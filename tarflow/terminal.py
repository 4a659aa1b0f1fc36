"""Escapes text from data before it is printed to a terminal.

A class name, a key or a file name may contain terminal control sequences (colours, titles, the clipboard), a line break that
forges a line of ours, or characters that reverse the direction of text. All of these are shown as escapes.
"""

import re

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
