"""The plot of a guidance sweep: distance over guidance, a line per setting of the others, a panel per round."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tarflow.evaluation.report.plots import COLOURS
from tarflow.evaluation.sweep_file import shown_line


def plot_rounds(rounds: list[dict[str, Any]], metric: str) -> str:
    """The rounds of a `sweep.json` as SVG text.

    Bars are one standard error; candidates without a distance have no point.
    """
    keys = sorted({shown_line(p) for r in rounds for p in r["points"]})
    names = what_differs(keys)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tarflow", "font.size": 9}):
        figure = Figure(figsize=(3.2 * len(rounds) + 0.6, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, part in zip(figure.subplots(1, len(rounds), squeeze=False)[0], rounds):
            for place, key in enumerate(keys):
                points = sorted(
                    (p["guidance"], p["distance"], p.get("distance_stderr") or 0.0)
                    for p in part["points"]
                    if shown_line(p) == key and p["distance"] is not None
                )
                if points:
                    x, y, errors = zip(*points)
                    colour = COLOURS[place % len(COLOURS)]
                    axes.errorbar(
                        x, y, yerr=errors, marker="o", ms=4, lw=1.2, capsize=2, color=colour, label=names[key]
                    )
            axes.set_title(f"{part['num_samples']:,} samples", loc="left", fontsize=10)
            axes.set_xlabel("guidance")
            axes.grid(alpha=0.2)
        figure.axes[0].set_ylabel(metric)
        lines = figure.axes[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=len(rounds), frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def what_differs(lines: Sequence[str]) -> dict[str, str]:
    """Each line's name -> those parts of it that not all lines have; of a single one, all."""
    parts = {line: line.split(", ") for line in lines}
    common = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set()
    return {line: ", ".join(part for part in words if part not in common) for line, words in parts.items()}
