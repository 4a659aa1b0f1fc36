"""The top of the report: one card per metric of the headline, and how far training is."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tarflow.evaluation.metrics.names import is_kernel, is_spatial
from tarflow.evaluation.report.headline import Headline
from tarflow.evaluation.report.history import History, Result
from tarflow.evaluation.report.markup import NONE, escaped, paragraphs
from tarflow.trainer.config.schema import Config

# Peak memory of training, by what the device can report: metric, label, note.
_MEMORY = (
    ("memory/peak_allocated_gb", "peak GPU memory", "allocated by PyTorch, of the rank that needs most"),
    ("memory/peak_rss_gb", "peak memory", "resident set of a process, of the rank that needs most"),
)


class Card(NamedTuple):
    """A metric, its value, and a line of small print."""

    label: str
    value: str
    note: str


# Sample quality besides the Frechet and the kernel distance: key of the result, label, digits, note.
_SCORES = (
    ("precision", "precision", 3, "fraction of samples near a real image"),
    ("recall", "recall", 3, "fraction of real images near a sample"),
    ("density", "density", 3, "real neighbours per sample; 1 = as real images"),
    ("coverage", "coverage", 3, "fraction of real images with a sample nearby"),
    ("inception_score", "Inception score", 2, "higher is better"),
)


def cards_section(config: Config | None, history: History, headline: Headline | None, chosen: Sequence[str]) -> str:
    """The first section of the page. `chosen`: which sampling settings a sweep chose, and which sweep."""
    result = headline.result if headline else None
    cards = [*(_metrics(result) if result else ()), *_progress(config, history)]
    items = "".join(
        f"<div class='card'><div class='label'>{escaped(card.label)}</div><div class='value'>{escaped(card.value)}</div>"
        f"<div class='note'>{escaped(card.note)}</div></div>"
        for card in cards
    )
    if headline is None or result is None:
        notes = "<p>No evaluation yet: run <code>tarflow evaluate RUN --once</code>.</p>"
    else:
        choices = [f"{line[:1].upper()}{line[1:]}." for line in chosen]
        notes = paragraphs([f"Metrics of {headline.describe()}.", *choices])
        notes += paragraphs(result.values.get("warnings", []), warning=True)
    return f"<section><div class='cards'>{items}</div>{notes}</section>"


def _metrics(result: Result) -> Iterator[Card]:
    """Metrics that the result has; those that were not computed have no card."""
    values, (name, distance) = result.values, result.distance
    if distance is not None:
        note = f"{values['num_samples']:,} samples of {values['weights']}"
        yield Card(name, f"{distance:.2f}", _plus_minus(values.get("distance_stderr"), 2) + note)
    for key, value in values.items():
        if is_spatial(key) and value is not None:
            note = _plus_minus(values.get("spatial_stderr"), 2) + "spatial features"
            yield Card("sFID" if key == "sfid" else key, f"{value:.2f}", note)
            break
    for key, value in values.items():
        if is_kernel(key) and value is not None:
            yield Card("kernel distance", f"{value:.4f}", "polynomial kernel (MMD²)")
            break
    for key, label, digits, note in _SCORES:
        if values.get(key) is not None:
            yield Card(label, f"{values[key]:.{digits}f}", note)
    if values.get("bits_per_dim") is not None:
        level = values["likelihood"].get("noise_level")  # of a model that is told it
        at = f" at noise level {level:g}" if isinstance(level, int | float) else ""
        note = _plus_minus(values.get("bits_per_dim_stderr"), 4) + f"held-out images{at}"
        yield Card("bits per dimension", f"{values['bits_per_dim']:.4f}", note)
    if values.get("label_agreement") is not None:
        yield Card("label agreement", f"{values['label_agreement']:.1%}", "vote of the 5 nearest training images")


def _progress(config: Config | None, history: History) -> Iterator[Card]:
    yield Card("images seen", f"{history.images_seen:,}", f"of {config.train.max_images:,}" if config else "")
    restarts = len(history.restarts)
    yield Card("training time", _duration(history.training_seconds), f"{restarts} restart{'s' * (restarts != 1)}")
    if rates := [rate for _, rate in history.series("throughput/images_per_sec")]:
        yield Card("images per second", f"{statistics.median(rates):,.0f}", "median over training")
    for name, label, note in _MEMORY:
        if peaks := [peak for _, peak in history.series(name)]:
            yield Card(label, f"{max(peaks):.1f} GB", note)


def _plus_minus(stderr: float | None, digits: int) -> str:
    return f"± {stderr:.{digits}f}, " if stderr else ""


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return NONE
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s"
