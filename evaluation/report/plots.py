"""Curves of a run as inline SVG: no script, no font file, readable on light and dark pages.

Text and axes take the page's colour (`currentColor`); the curves' colours stand out on both.
"""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from tarflow.evaluation.report.history import Point, thin
from tarflow.terminal import plain

COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#ef4444")
_PAGE_COLOUR = "#010203"  # a placeholder: matplotlib knows no currentColor
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tarflow",
    "text.parse_math": False,  # a name with dollars in it is a name
    "font.size": 9,
    "text.color": _PAGE_COLOUR,
    "axes.edgecolor": _PAGE_COLOUR,
    "axes.labelcolor": _PAGE_COLOUR,
    "xtick.color": _PAGE_COLOUR,
    "ytick.color": _PAGE_COLOUR,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


IMAGES_SEEN = "images seen"


@dataclass
class Curve:
    """One line of a plot; points with a marker, and error bars if given."""

    label: str
    points: Sequence[Point]
    marked: bool = False
    errors: Sequence[float | None] = ()
    colour: str = ""  # empty: by its place among the curves
    style: str = "-"


@dataclass
class Plot:
    """Curves over one axis. Vertical lines mark restarts."""

    title: str
    curves: list[Curve]
    y_label: str = ""
    x_label: str = IMAGES_SEEN
    restarts: Sequence[int] = ()
    from_zero: bool = False


def outline(low: float, high: float, counts: Sequence[float]) -> list[Point]:
    """The outline of a histogram over equal bins from `low` to `high`, as points of a curve."""
    width = (high - low) / len(counts)
    points = [(low, 0.0)]
    for number, count in enumerate(counts):
        points += [(low + number * width, float(count)), (low + (number + 1) * width, float(count))]
    return [*points, (high, 0.0)]


def svg(plot: Plot, key: str) -> str:
    """The plot as an `<svg>` element whose ids begin with `key`, so that several can share a page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        # Transparent, so that the page's background shows through in light and in dark mode.
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        for colour, curve in zip(COLOURS * (1 + len(plot.curves) // len(COLOURS)), plot.curves):
            _draw(axes, curve, curve.colour or colour)
        for i, images in enumerate(plot.restarts):
            axes.axvline(images, color=_PAGE_COLOUR, alpha=0.4, lw=0.8, ls=":", label="restart" if i == 0 else None)
        axes.set_title(plain(plot.title), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plain(plot.y_label))
        if plot.x_label == IMAGES_SEEN:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20M, not 2e7
        if all(float(x).is_integer() for curve in plot.curves for x, _ in curve.points):
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))  # no block 1.5
        axes.grid(alpha=0.15, color=_PAGE_COLOUR)
        if plot.from_zero:
            axes.set_ylim(bottom=0)
        # A single curve is named by the title.
        if len(plot.curves) + bool(plot.restarts) > 1:
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), key, plain(plot.title))


def _draw(axes: Any, curve: Curve, colour: str) -> None:
    points = list(curve.points) if curve.marked else thin(list(curve.points))
    x, y = [p[0] for p in points], [p[1] for p in points]
    if curve.marked:
        errors = [e or 0.0 for e in curve.errors] if curve.errors else None
        axes.errorbar(x, y, yerr=errors, color=colour, lw=1.2, ls=curve.style, marker="o", ms=4, capsize=2,
                      label=plain(curve.label))  # fmt: skip
    else:
        axes.plot(x, y, color=colour, lw=1.2, ls=curve.style, label=plain(curve.label))


def _inline(text: str, key: str, title: str) -> str:
    """An SVG file as an element of a page that holds others: ids and references prefixed, prolog and style removed."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    text = re.sub(r"url\(#", f"url(#{key}-", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would style the whole page
    text = text.replace("xlink:href", "href")
    opening = f'<svg role="img" aria-label="{html.escape(title)}" style="stroke-linejoin: round"'
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f"{opening} {found[1]}>", text, count=1)
    return text.replace(_PAGE_COLOUR, "currentColor").strip()
