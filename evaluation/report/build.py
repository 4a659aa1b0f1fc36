"""One page about a run, `report.html`: figures, curves, pictures, every setting. It needs nothing but itself.

Pictures are data: URIs, plots are inline SVG, there is no script, and the page forbids itself every request. Whatever
comes from a run (names, settings, class names) is escaped.
"""

import base64
import html
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tarflow.errors import noted
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.names import is_kernel
from tarflow.evaluation.report.curves import sampling_curves, training_curves
from tarflow.evaluation.report.headline import Headline, alike, find_headline
from tarflow.evaluation.report.history import History, Result, read_history
from tarflow.evaluation.report.template import PAGE
from tarflow.evaluation.run_config import shown_config
from tarflow.evaluation.samples.png_check import flaw_of_file
from tarflow.files import write_text
from tarflow.terminal import plain
from tarflow.trainer.config.files import config_tree
from tarflow.trainer.config.schema import Config
from tarflow.trainer.run_dir import has_run_file, require_run

# Scores besides the distance, as far as a result has them: key, name, digits.
_SCORES = (
    ("kernel", "kernel distance", 4), ("precision", "precision", 3), ("recall", "recall", 3), ("density", "density", 3),
    ("coverage", "coverage", 3), ("inception_score", "Inception score", 2),
)  # fmt: skip
_SCORE_NOTES = {
    "precision": "samples like real ones",
    "recall": "real ones like samples",
    "density": "real neighbours, 1 = as many",
    "coverage": "real ones with a sample near",
}
MOST_GRIDS = 9  # grids over training on the page; more would make it heavy
Say = Callable[[str], None]


def write_report(run_dir: str | Path, out: Path | None = None, say: Say = lambda line: None) -> Path:
    """Write the report of a run, with whatever there is so far; returns its path. No run: an error.

    What is damaged is left out, on the page as in what is said: everything else stands.
    """
    run_dir = Path(run_dir) if has_run_file(run_dir) else require_run(run_dir)
    chosen: list[str] = []
    history = read_history(run_dir)
    config, known = shown_config(run_dir, history.flaws, chosen.append)
    headline = find_headline(history.results, config if known else None)
    # Curves and pictures go with the headline: all of them have its settings.
    shown = alike(history.results, headline.result) if headline else []
    sections = [
        _cards(config, history, headline, chosen),
        _section("Curves", training_curves(history, headline)),
        _section("Guidance and denoising", sampling_curves(history)),
        _section("Samples over training", _grids(history, shown)),
        _newest(history, shown),
        _section("All results", _results_table(history, headline)),
        _section("What the headline depends on", _in_full(headline)),
        _section("Configuration", _configuration(config) if config is not None else ""),
    ]
    sections.insert(1, _left_out(history.flaws))
    name = run_dir.resolve().name
    page = PAGE.format(
        title=_text(name), body="\n".join(s for s in sections if s), made=time.strftime("%Y-%m-%d %H:%M")
    )
    path = out or run_dir / "report.html"
    write_text(path, page)
    for line in history.flaws:
        say(plain(f"left out: {line}", 4096))
    if headline and (grid := headline.result.picture("grid.png")):
        say(plain(f"samples: {grid}", 4096))
    return path


def _text(value: Any) -> str:
    return html.escape(plain(value, 5000))


def _left_out(flaws: Sequence[str]) -> str:
    return _section("Left out", "".join(f"<p class='warning'>{_text(line)}</p>" for line in flaws))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if body else ""


# --- figures ---------------------------------------------------------------------------------------------------------


def _cards(config: Config | None, history: History, headline: Headline | None, chosen: Sequence[str]) -> str:
    """The figures that one looks for first. `chosen`: what a sweep set."""
    cards: list[tuple[str, str, str]] = []
    if headline is not None:
        newest = headline.result.values
        name, distance = headline.result.distance
        if distance is not None:
            stderr = newest.get("distance_stderr")
            error = f"± {stderr:.2f}, " if stderr else ""
            cards.append((name, f"{distance:.2f}", f"{error}{newest['num_samples']:,} samples of {newest['weights']}"))
        for key, label, digits in _SCORES:
            value = next((v for k, v in newest.items() if is_kernel(k)), None) if key == "kernel" else newest.get(key)
            if value is not None:
                cards.append((label, f"{value:.{digits}f}", _SCORE_NOTES.get(key, "kept samples")))
        if newest.get("bits_per_dim") is not None:
            stderr = newest.get("bits_per_dim_stderr")
            note = f"± {stderr:.4f}, " if stderr else ""
            cards.append(("bits per dimension", f"{newest['bits_per_dim']:.4f}", f"{note}held-out images"))
        if newest.get("label_agreement") is not None:
            cards.append(("label agreement", f"{newest['label_agreement']:.1%}", "5 nearest training images vote"))
    of = f"of {config.train.max_images:,}" if config is not None else ""
    cards.append(("images seen", f"{history.images_seen:,}", of))
    seconds = history.training_seconds
    restarts = len(history.restarts)
    cards.append(("training time", _duration(seconds), f"{restarts} restart{'s' if restarts != 1 else ''}"))
    rates = [rate for _, rate in history.series("throughput/images_per_sec")]
    if rates:
        cards.append(("images per second", f"{statistics.median(rates):,.0f}", "median while training"))
    items = "".join(
        f"<div class='card'><div class='label'>{_text(label)}</div><div class='value'>{_text(value)}</div>"
        f"<div class='note'>{_text(note)}</div></div>"
        for label, value, note in cards
    )
    notes = [f"Scores of {headline.describe()}.", *(f"Samples and evaluations go by: {line}." for line in chosen)] \
        if headline else []  # fmt: skip
    said = "".join(f"<p>{_text(note)}</p>" for note in notes)
    if headline is None:
        said = "<p>No evaluation yet: <code>tarflow evaluate RUN --once</code> adds one.</p>"
    return (
        f"<section><div class='cards'>{items}</div>{said}{_warnings([headline.result] if headline else [])}</section>"
    )


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s"


def _warnings(results: Sequence[Result]) -> str:
    lines = [w for result in results for w in result.values.get("warnings", [])]
    return "".join(f"<p class='warning'>{_text(line)}</p>" for line in lines)


# --- pictures --------------------------------------------------------------------------------------------------------


def _image(path: Path, caption: str, flaws: list[str]) -> str:
    """A picture on the page; one that is damaged is left out."""
    data = None
    with noted(flaws):
        if problem := flaw_of_file(path, None):
            raise EvaluationError(f"{path} is {problem}")
        data = base64.b64encode(path.read_bytes()).decode()
    if data is None:
        return ""
    return (
        f"<figure><img alt='{_text(caption)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _grids(history: History, results: Sequence[Result]) -> str:
    """The grid of each of some results, or of some that are spread evenly."""
    shown = [(r, path) for r in results if (path := r.picture("grid.png"))]
    if not shown:
        return ""
    if len(shown) > MOST_GRIDS:
        shown = [shown[i * (len(shown) - 1) // (MOST_GRIDS - 1)] for i in range(MOST_GRIDS)]
    rows = shown[-1][0].values.get("grid_rows")
    named = [_class_name(str(row), history.classes) for row in rows or ()]
    note = f"<p>Rows, from the top: {', '.join(map(_text, named))}.</p>" if rows else ""
    figures = (_image(path, f"{r.images_seen:,} images seen{_said(r)}", history.flaws) for r, path in shown)
    return f"{note}<div class='row'>{''.join(figures)}</div>"


def _class_name(row: str, classes: Sequence[str]) -> str:
    """A row's class by name: a result holds its number where the evaluation knew no names."""
    return classes[int(row)] if row.isdecimal() and len(row) < 10 and int(row) < len(classes) else row


def _said(result: Result) -> str:
    name, value = result.distance
    return f", {name} {value:.2f}" if value is not None else ""


def _newest(history: History, results: Sequence[Result]) -> str:
    """Comparisons from the newest result that has pictures."""
    with_pictures = [r for r in results if r.picture("grid.png")]
    if not with_pictures:
        return ""
    result = with_pictures[-1]
    sampling = result.values["settings"]["sampling"]
    guided = f"guidance {sampling['guidance']:g}" + (", annealed" if sampling["annealed"] else "")
    pairs = [
        (
            "Noisy and denoised",
            "The flow was trained on images with noise and samples such images; one step along the score takes it out.",
            [("grid-noisy.png", "as sampled"), ("grid.png", f"denoised, multiplier {sampling['denoise']:g}")],
        ),
        (
            "Guidance off and on",
            "The same noise, without and with guidance.",
            [("grid-unguided.png", "no guidance"), ("grid.png", guided)],
        ),
    ]
    parts = []
    for title, text, names in pairs:
        paths = [(result.picture(name), caption) for name, caption in names]
        if all(path for path, _ in paths):
            figures = "".join(_image(path, caption, history.flaws) for path, caption in paths if path)
            parts.append(_section(title, f"<p>{_text(text)}</p><div class='row pair'>{figures}</div>"))
    parts += [_neighbours(history, result), _trajectory(history, result)]
    return "".join(parts)


def _neighbours(history: History, result: Result) -> str:
    path, about = result.picture("neighbours.png"), result.values.get("neighbours")
    if path is None or not about:
        return ""
    text = (
        f"Samples above the training image nearest to them in pixels, of {about['training_images']:,} searched. Over "
        f"{about['samples']:,} samples the difference to the nearest is {about['nearest_rms_median']:.1f} grey levels "
        f"in the median and {about['nearest_rms_min']:.1f} at least: near zero would be a copy."
    )
    picture = _image(path, "samples above, training images below", history.flaws)
    return _section("Nearest training images", f"<p>{_text(text)}</p>{picture}")


def _trajectory(history: History, result: Result) -> str:
    path = result.picture("trajectory.png")
    if path is None:
        return ""
    caption = (
        "one sample a row: noise, after each block, and denoised"
        if result.picture("grid-noisy.png")
        else ("one sample a row: noise, and after each block")
    )
    return _section("From noise to image", _image(path, caption, history.flaws))


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _results_table(history: History, headline: Headline | None) -> str:
    if not history.results:
        return ""
    rows = []
    for result in history.results:
        values, (name, distance) = result.values, result.distance
        sampling = values["settings"]["sampling"]
        rows.append(
            (
                result.folder.name + (" (headline)" if headline and result is headline.result else ""),
                f"{result.images_seen:,}",
                values["weights"],
                _distance_text(name, distance, values),
                _figure(values.get("precision"), 3),
                _figure(values.get("recall"), 3),
                _figure(values.get("bits_per_dim"), 4),
                _figure(values.get("label_agreement"), 3),
                values["num_samples"],
                values["nonfinite"],
                f"w={sampling['guidance']:g} on {sampling['guide']}, tau={sampling['attn_temp']:g}, "
                f"annealed={sampling['annealed']}, denoise={sampling['denoise']:g}, {sampling['param_dtype']}, "
                f"seed {sampling['seed']}",
                f"{values['seconds'].get('total', 0):.0f}",
            )
        )
    header = (
        "result",
        "images seen",
        "weights",
        "distance",
        "precision",
        "recall",
        "bits/dim",
        "agreement",
        "samples",
        "lost",
        "sampling",
        "seconds",
    )
    return _table(header, rows)


def _distance_text(name: str, distance: float | None, values: dict[str, Any]) -> str:
    if distance is None:
        return values.get("problem") or "none"
    error = values.get("distance_stderr")
    return f"{name} {distance:.2f}" + (f" ± {error:.2f}" if error else "")


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _in_full(headline: Headline | None) -> str:
    """Every setting, hash and provenance that the headline's result holds."""
    if headline is None:
        return ""
    values = headline.result.values
    rows = [
        ("result", headline.result.folder.name),
        ("weights", f"{values['weights']}, SHA-256 {values['weights_sha256']}"),
    ]
    for part in ("features", "reference", "likelihood", "samples", "settings"):
        rows += _flat(part, values.get(part) or {})
    return _table(("what", "value"), rows)


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in _flat(f"{name}.{key}", part)]
    return [(name, "–" if value is None else str(value))]


def _configuration(config: Config) -> str:
    rows = []
    for section, values in config_tree(config).items():
        fields = type(getattr(config, section)).model_fields
        for key, value in values.items():
            rows.append((f"{section}.{key}", "–" if value is None else value, fields[key].description or ""))
    return _table(("setting", "value", "meaning"), rows)
