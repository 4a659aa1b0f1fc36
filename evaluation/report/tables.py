"""The report's tables: every result, the headline's result in full, and the configuration."""

from collections.abc import Iterator
from typing import Any

from tarflow.evaluation.report.headline import Headline
from tarflow.evaluation.report.history import History, Result
from tarflow.evaluation.report.markup import NONE, table
from tarflow.trainer.config.files import config_tree
from tarflow.trainer.config.schema import Config

_COLUMNS = (
    "result", "images seen", "weights", "distance", "precision", "recall", "bits/dim", "label agreement", "samples",
    "non-finite", "sampling", "time (s)",
)  # fmt: skip


def results_table(history: History, headline: Headline | None) -> str:
    """One row per result, whatever its settings."""
    rows = [_result_row(result, headline is not None and result is headline.result) for result in history.results]
    return table(_COLUMNS, rows) if rows else ""


def _result_row(result: Result, is_headline: bool) -> tuple[Any, ...]:
    values = result.values
    sampling = values["settings"]["sampling"]
    return (
        result.folder.name + (" (headline)" if is_headline else ""),
        f"{result.images_seen:,}",
        values["weights"],
        _distance(result),
        _rounded(values.get("precision"), 3),
        _rounded(values.get("recall"), 3),
        _rounded(values.get("bits_per_dim"), 4),
        _rounded(values.get("label_agreement"), 3),
        values["num_samples"],
        values["nonfinite"],
        f"w={sampling['guidance']:g} on {sampling['guide']}, tau={sampling['attn_temp']:g}, "
        f"annealed={sampling['annealed']}, denoise={sampling['denoise']:g}, {sampling['param_dtype']}, "
        f"seed {sampling['seed']}",
        f"{values['seconds'].get('total', 0):.0f}",
    )


def _distance(result: Result) -> str:
    name, distance = result.distance
    if distance is None:
        return result.values.get("problem") or "none"
    stderr = result.values.get("distance_stderr")
    return f"{name} {distance:.2f}" + (f" ± {stderr:.2f}" if stderr else "")


def _rounded(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def headline_table(headline: Headline | None) -> str:
    """Every setting, hash and provenance that the headline's result holds."""
    if headline is None:
        return ""
    values = headline.result.values
    rows = [
        ("result", headline.result.folder.name),
        ("weights", f"{values['weights']}, SHA-256 {values['weights_sha256']}"),
    ]
    for part in ("features", "reference", "likelihood", "samples", "settings"):
        rows += _flat(part, {k: v for k, v in (values.get(part) or {}).items() if k != "histogram"})  # it has a plot
    return table(("field", "value"), rows)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Nested values as rows of (dotted name, value)."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part)
    else:
        yield name, value


def config_table(config: Config | None) -> str:
    """Every setting of the run with its description."""
    if config is None:
        return ""
    rows = []
    for section, values in config_tree(config).items():
        fields = type(getattr(config, section)).model_fields
        rows += [(f"{section}.{key}", value, fields[key].description or "") for key, value in values.items()]
    return table(("setting", "value", "meaning"), rows)
