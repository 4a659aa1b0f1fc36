"""Several runs on one page: their curves over each other, headline results side by side, the settings that differ."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.metrics.names import is_distance, is_kernel
from tarflow.evaluation.report.curves import by_settings, drawn, likelihoods, over_images
from tarflow.evaluation.report.headline import Headline, find_headline, settings_of
from tarflow.evaluation.report.history import History, read_history
from tarflow.evaluation.report.likelihoods import Measured, compared, read_likelihoods
from tarflow.evaluation.report.markup import damaged_files, paragraphs, picture, section, table
from tarflow.evaluation.report.plots import COLOURS, Curve, Plot
from tarflow.evaluation.report.template import PAGE
from tarflow.evaluation.run_config import shown_config
from tarflow.files import write_text
from tarflow.terminal import plain
from tarflow.trainer.config.files import config_tree
from tarflow.trainer.config.schema import Config
from tarflow.trainer.run_dir import has_run_file, require_run

MOST = 12  # runs on a page: two for each colour
_STYLES = ("-", "--")
# Metrics of training: name, title, label of the axis, whether the axis begins at zero.
_LOGGED = (
    ("train/loss", "Loss", "nats per dimension", False),
    ("train/bits_per_dim", "Bits per dimension, training", "bits per dimension", False),
    ("optim/lr", "Learning rate", "learning rate", True),
    ("optim/grad_norm", "Gradient norm", "L2 norm", True),
    ("throughput/images_per_sec", "Throughput", "images per second", True),
    ("goodput/share", "Goodput", "share of the time held", True),
)  # fmt: skip
# Metrics of a headline beside distances: key of the result, label, digits.
_SCORES = (
    ("inception_score", "Inception score", 2), ("precision", "precision", 3), ("recall", "recall", 3),
    ("density", "density", 3), ("coverage", "coverage", 3), ("bits_per_dim", "bits per dimension", 4),
    ("label_agreement", "label agreement", 3),
)  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """A run among others: its label on the page, and what is known of it."""

    label: str
    colour: str
    style: str
    history: History
    config: Config | None
    headline: Headline | None
    measured: list[Measured]

    def curve(self, points: Sequence[tuple[float, float]]) -> Curve:
        return Curve(self.label, points, colour=self.colour, style=self.style)


def write_comparison(paths: Sequence[str | Path], out: Path, log: Log = lambda _: None) -> Path:
    """Write the page about 2 to `MOST` runs; returns its path. Damaged files are skipped, and named there and by `log`.

    Raises TrainerError where one is not a run, EvaluationError for too many runs, or one that is given twice.
    """
    runs, flaws = _read(paths), list[str]()
    measured, pictures = compared([(run.curve([]), run.measured) for run in runs], flaws)
    sections = [
        section("Headline results", _headlines(runs)),
        section("Curves", drawn(_plots(runs), "plot")),
        section("Likelihoods of images", drawn(measured, "likelihood") + pictures),
        section("Settings that differ", _settings(runs)),
        section("Samples", _grids(runs, flaws)),
    ]
    flaws = [flaw for run in runs for flaw in run.history.flaws] + flaws
    body = "\n".join(part for part in (damaged_files(flaws), *sections) if part)
    page = PAGE.format(
        title=f"{len(runs)} runs", about="Comparison of TarFlow runs", body=body, made=time.strftime("%Y-%m-%d %H:%M")
    )
    write_text(out, page)
    for line in flaws:
        log(plain(f"left out: {line}", 4096))
    return out


def _read(paths: Sequence[str | Path]) -> list[_Run]:
    if len(paths) > MOST:
        raise EvaluationError(f"{len(paths)} runs are too many for one page: give at most {MOST}")
    folders = [Path(path) if has_run_file(path) else require_run(path) for path in paths]
    names = [folder.resolve() for folder in folders]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise EvaluationError(f"the run {plain(twice)} is given twice")
    short = [name.name for name in names]
    found = []
    for number, (folder, name) in enumerate(zip(folders, names)):
        history = read_history(folder)
        config, known = shown_config(folder, history.flaws)
        label = plain(name.name if short.count(name.name) == 1 else folder, 60)
        colour, style = COLOURS[number % len(COLOURS)], _STYLES[number // len(COLOURS)]
        headline = find_headline(history.results, config if known else None)
        measured = read_likelihoods(folder, history.flaws)
        found.append(_Run(label, colour, style, history, config, headline, measured))
    return found


def _headlines(runs: Sequence[_Run]) -> str:
    """A row for each metric and for each setting of the results in which they differ, a column for each run."""
    values = [run.headline.result.values if run.headline else {} for run in runs]
    if not any(values):
        return paragraphs(["No evaluation yet: run `tarflow evaluate RUN --once`."])
    rows: list[tuple[Any, ...]] = [("images seen", *(f"{run.history.images_seen:,}" for run in runs))]
    rows.append(("checkpoint", *(f"{v['images_seen'] or 0:,}" if v else None for v in values)))
    names = dict.fromkeys(key for v in values for key in v if is_distance(key))
    rows += [(name, *(_with_error(v, name, "distance_stderr", 2) for v in values)) for name in names]
    kernels = dict.fromkeys(key for v in values for key in v if is_kernel(key))
    rows += [(name, *(_with_error(v, name, "kernel_stderr", 4) for v in values)) for name in kernels]
    for key, label, digits in _SCORES:
        if any(v.get(key) is not None for v in values):
            rows.append((label, *(_with_error(v, key, f"{key}_stderr", digits) for v in values)))
    settings = [settings_of(run.headline.result) if run.headline else {} for run in runs]
    differing = [
        (f"evaluated with {key}", *(s.get(key) for s in settings))
        for key in dict.fromkeys(key for s in settings for key in s)
        if len({repr(s.get(key)) for s in settings if s}) > 1
    ]
    note = "These results were not computed under the same settings: see the last rows." if differing else ""
    return (paragraphs([note], warning=True) if note else "") + table(
        ("", *(run.label for run in runs)), rows + differing
    )


def _with_error(values: dict[str, Any], key: str, stderr: str, digits: int) -> str | None:
    if values.get(key) is None:
        return None
    error = values.get(stderr)
    return f"{values[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def _plots(runs: Sequence[_Run]) -> list[Plot]:
    """Metrics of training, then those of the results under each headline's settings; one colour for each run."""
    plots = [
        Plot(title, [run.curve(run.history.series(name)) for run in runs], axis, from_zero=zero)
        for name, title, axis, zero in _LOGGED
    ]
    evaluated = [(run, run.headline) for run in runs if run.headline]
    held_out = [_scored(run, headline, "bits_per_dim", "bits_per_dim_stderr") for run, headline in evaluated]
    plots.insert(2, Plot("Bits per dimension, held-out images", held_out, "bits per dimension"))
    histograms = likelihoods([(run.label, headline.result) for run, headline in evaluated])
    for curve in histograms.curves:
        run = next(run for run, _ in evaluated if run.label == curve.label)
        curve.colour, curve.style = run.colour, run.style
    plots.append(histograms)
    for name in dict.fromkeys(headline.curve.distance[0] for _, headline in evaluated):
        curves = [
            _scored(run, headline, name, "distance_stderr")
            for run, headline in evaluated if headline.curve.distance[0] == name
        ]  # fmt: skip
        plots.append(Plot(f"Fréchet distance ({name})", curves, "Fréchet distance", from_zero=True))
    return plots


def _scored(run: _Run, headline: Headline, key: str, stderr: str) -> Curve:
    results = by_settings(run.history, headline)[str(headline.curve.values["weights"])]
    curve = over_images(run.label, results, key, stderr)
    curve.colour, curve.style = run.colour, run.style
    return curve


def _settings(runs: Sequence[_Run]) -> str:
    """The settings in which configurations differ; one that could not be read has no values."""
    trees = [_flat(run.config) for run in runs]
    rows = [
        (name, *(tree.get(name) for tree in trees))
        for name in dict.fromkeys(name for tree in trees for name in tree)
        if len({repr(tree.get(name)) for tree in trees if tree}) > 1
    ]
    return table(("setting", *(run.label for run in runs)), rows) if rows else paragraphs(["None."])


def _flat(config: Config | None) -> dict[str, Any]:
    if config is None:
        return {}
    return {f"{part}.{key}": value for part, values in config_tree(config).items() for key, value in values.items()}


def _grids(runs: Iterable[_Run], flaws: list[str]) -> str:
    """The grid of each headline."""
    figures = ""
    for run in runs:
        path = run.headline.result.picture("grid.png") if run.headline else None
        if run.headline and path:
            figures += picture(path, f"{run.label}, {run.headline.result.images_seen:,} images seen", flaws)
    return f"<div class='row'>{figures}</div>" if figures else ""
