"""Pieces of HTML that the report is made of. Whatever comes from a run (names, settings, class names) is escaped here."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tarflow.errors import noted
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.png_check import flaw_of_file
from tarflow.files import read_bytes
from tarflow.terminal import plain

NONE = "–"  # shown where there is no value


def escaped(value: Any) -> str:
    """Any value as text that is safe inside an element and inside a quoted attribute."""
    return html.escape(plain(value, 5000))


def section(title: str, body: str) -> str:
    """A section with a heading; nothing without a body."""
    return f"<section><h2>{escaped(title)}</h2>{body}</section>" if body else ""


def paragraphs(lines: Iterable[str], warning: bool = False) -> str:
    """A paragraph a line."""
    opening = "<p class='warning'>" if warning else "<p>"
    return "".join(f"{opening}{escaped(line)}</p>" for line in lines)


def picture(path: Path, caption: str, flaws: list[str]) -> str:
    """A PNG as a figure that carries its own bytes. A damaged one is skipped and added to `flaws`."""
    data = png_bytes(path, flaws)
    return figure(data, caption) if data else ""


def png_bytes(path: Path, flaws: list[str]) -> bytes | None:
    """The bytes of an intact PNG; None for a damaged one, which is added to `flaws`."""
    with noted(flaws):
        if problem := flaw_of_file(path, None):
            raise EvaluationError(f"{path} is {problem}")
        return read_bytes(path)
    return None


def figure(png: bytes, caption: str) -> str:
    """A PNG with a caption."""
    data = base64.b64encode(png).decode()
    return (
        f"<figure><img alt='{escaped(caption)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


def damaged_files(flaws: Iterable[str]) -> str:
    """The section that names files which could not be read."""
    return section("Damaged files, not shown", paragraphs(flaws, warning=True))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that scrolls sideways on narrow screens; None is shown as a dash."""
    head = "".join(f"<th>{escaped(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    return f"<td>{escaped(NONE if value is None else value)}</td>"
