"""Text that came with data, on its way to a terminal: shown, never obeyed.

A class name, a key or a file's name may hold what a terminal takes for a command (colours, titles, the clipboard), a line
break that forges a line of ours, or marks that turn the order of letters around. All of these are shown as escapes.
"""

import re

ELLIPSIS = "…"


def plain(value: object, limit: int = 200) -> str:
    """One line of at most `limit` characters, in which everything can be seen: controls, line ends, invisible characters,
    directions of writing and bytes that are no text stand as escapes such as \\x1b, \\n or \\u202e.
    """
    text = str(value)
    shown = _visible(text[: limit + 1])
    return shown if len(shown) <= limit else shown[: max(limit - 1, 0)] + ELLIPSIS


def plain_lines(value: object, limit: int = 100_000) -> str:
    """The same for text of several lines, as a message or a log has them: line ends and tabs stay what they are, and a
    carriage return, with which a line would write over itself, ends it.
    """
    text = str(value)
    text = text[:limit] + (ELLIPSIS if len(text) > limit else "")
    lines = re.split(r"\r\n|\r|\n", text)
    return "\n".join("\t".join(map(_visible, line.split("\t"))) for line in lines)


def message(value: object) -> str:
    """A message of several lines, the later ones indented: what data put into it cannot pass for a line of ours."""
    first, *rest = plain_lines(value).split("\n")
    return "\n".join([first, *(line if not line or line[0] in " \t" else f"  {line}" for line in rest)])


def _visible(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
