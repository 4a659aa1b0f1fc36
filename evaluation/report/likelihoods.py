"""What `tarflow likelihood` measured of a run, if it is below RUN/likelihoods: histograms, most and least likely images."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tarflow.errors import noted
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.report.curves import drawn
from tarflow.evaluation.report.markup import paragraphs, picture, section
from tarflow.evaluation.report.plots import Curve, Plot, outline
from tarflow.evaluation.result_file import LIKELIHOOD_PICTURES, LikelihoodFile
from tarflow.files import listed
from tarflow.records import load_record
from tarflow.trainer.run_dir import run_id

FOLDER = "likelihoods"  # of a run
MOST_SHOWN = 8  # measurements on a page
Measured = tuple[Path, dict[str, Any]]  # its folder, and what its summary says


def read_likelihoods(run_dir: Path, flaws: list[str]) -> list[Measured]:
    """The measurements of a run, by name. A damaged one, and one of another run, is skipped and added to `flaws`."""
    found, run = [], None
    with noted([]):  # what is wrong with run.json is found by others
        run = run_id(run_dir)
    for path in listed(run_dir / FOLDER, "*/likelihood.json"):
        with noted(flaws):
            values = load_record(path, LikelihoodFile).model_dump()
            theirs = values["provenance"].get("run")
            if None not in (run, theirs) and theirs != run:
                raise EvaluationError(f"{path} was measured under the run {theirs}, and this is {run}")
            found.append((path.parent, values))
    return found


def likelihood_sections(measured: Sequence[Measured], flaws: list[str]) -> str:
    """A section for each, or for the first `MOST_SHOWN`, whose page then names the others."""
    shown = "".join(_section(*one, f"likelihood{i}", flaws) for i, one in enumerate(measured[:MOST_SHOWN]))
    if more := [folder.name for folder, _ in measured[MOST_SHOWN:]]:
        shown += paragraphs([f"Of {len(measured)} measurements of likelihoods, not shown: {', '.join(more)}."])
    return shown


def _section(folder: Path, values: dict[str, Any], key: str, flaws: list[str]) -> str:
    plot = _plot(f"{values['measured'] - values['nonfinite']:,} images", [Curve("images", histogram(values))])
    text = [f"{values['data']}: {headline(values)}", f"{values['origin']}, weights {values['weights']}"]
    if not values["histogram"]:
        text.append(
            "An earlier version measured them, without histogram and pictures: measure again into a new folder."
        )
    return section(
        f"Likelihoods: {folder.name}", paragraphs(text) + drawn([plot], key) + pictures(folder, values, "", flaws)
    )


def headline(values: dict[str, Any]) -> str:
    """The mean with its error, of how many images."""
    lost = f", {values['nonfinite']} of them not finite" if values["nonfinite"] else ""
    if values["bits_per_dim"] is None:
        return f"no image has a finite likelihood{lost}"
    error = f" ± {values['stderr']:.4f}" if values.get("stderr") is not None else ""
    return f"{values['bits_per_dim']:.4f}{error} bits per dimension over {values['measured']:,} images{lost}"


def histogram(values: dict[str, Any]) -> list[tuple[float, float]]:
    """The outline of its histogram in shares of its images; nothing where there is none."""
    found = values.get("histogram")
    if not found:
        return []
    return outline(found["low"], found["high"], [count / sum(found["counts"]) for count in found["counts"]])


def pictures(folder: Path, values: dict[str, Any], label: str, flaws: list[str]) -> str:
    """Its most and its least likely images, each in a figure that says their numbers and bits per dimension."""
    figures = ""
    for end, name in LIKELIHOOD_PICTURES.items():
        ranked = values.get(f"{end}_likely") or []
        if ranked and not (folder / name).is_file():
            flaws.append(f"{folder / name} is missing")
        elif ranked:
            numbers = ", ".join(f"{number} ({bits:.3f})" for number, bits in ranked)
            figures += picture(folder / name, f"{label}{end} likely, in bits per dimension: {numbers}", flaws)
    return f"<div class='row pair'>{figures}</div>" if figures else ""


def compared(runs: Iterable[tuple[Curve, Sequence[Measured]]], flaws: list[str]) -> tuple[list[Plot], str]:
    """Of several runs, each with a curve in its style: a plot for each set of images under the same noise, and pictures.

    Of a run that measured the same images several times, the weights that saw most of them.
    """
    plots: dict[str, Plot] = {}
    shown = ""
    for style, measured in runs:
        newest: dict[str, Measured] = {}
        for one in measured:
            images = json.dumps([one[1]["images"], one[1]["noise"]], sort_keys=True)
            if images not in newest or _seen(newest[images]) <= _seen(one):
                newest[images] = one
        for images, (folder, values) in newest.items():
            plot = plots.setdefault(images, _plot(f"Likelihood of {Path(values['data']).name}", []))
            plot.curves.append(Curve(style.label, histogram(values), colour=style.colour, style=style.style))
            shown += pictures(folder, values, f"{style.label}, {Path(values['data']).name}: ", flaws)
    return list(plots.values()), shown


def _seen(one: Measured) -> int:
    return int(one[1].get("images_seen") or 0)


def _plot(title: str, curves: list[Curve]) -> Plot:
    return Plot(title, curves, "share of images", "bits per dimension", from_zero=True)
