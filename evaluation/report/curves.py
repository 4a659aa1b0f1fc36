"""The report's curves: figures over training, and distances over the settings of sampling."""

import html
from collections.abc import Sequence
from typing import Any

from tarflow.evaluation.report.headline import Headline, alike, differences, settings_of
from tarflow.evaluation.report.history import History, Result
from tarflow.evaluation.report.plots import Curve, Plot, svg
from tarflow.terminal import plain
from tarflow.trainer.checkpoint.names import leading_name


def by_settings(history: History, headline: Headline) -> dict[str, list[Result]]:
    """The curves over training: the headline's settings with each set of weights, and what the run was evaluated with
    before its settings were changed.
    """
    wanted = settings_of(headline.result)
    found: dict[str, list[Result]] = {str(headline.result.values["weights"]): []}
    for result in alike(history.results, headline.result, apart_from=["weights"]):
        found.setdefault(str(result.values["weights"]), []).append(result)
    for result in history.results:
        changed = differences(settings_of(result), wanted)
        if result.plain and set(changed) - {"weights"}:
            other = ", ".join(f"{key} {value}" for key, (value, _) in changed.items() if key != "weights")
            found.setdefault(f"{result.values['weights']}, {other}", []).append(result)
    return found


def training_curves(history: History, headline: Headline | None) -> str:
    """Figures over images seen: of the training, and of results under the headline's settings."""
    by_weights = by_settings(history, headline) if headline else {}
    results = alike(history.results, headline.result) if headline else []
    name = headline.result.distance[0] if headline else "Frechet distance"
    agreement = [
        (r.images_seen, r.values["label_agreement"]) for r in results if r.values.get("label_agreement") is not None
    ]
    bits = [_over_images(f"held-out, {w}", rs, "bits_per_dim", "bits_per_dim_stderr") for w, rs in by_weights.items()]
    series, restarts = history.series, history.restarts
    plots = [
        Plot("Loss", [Curve("training", series("train/loss"))], restarts, units="nats per dimension"),
        Plot("Bits per dimension", [Curve("training", series("train/bits_per_dim")), *bits], restarts),
        Plot(
            f"Frechet distance ({name})",
            [_over_images(w, rs, name, "distance_stderr") for w, rs in by_weights.items()],
            from_zero=True,
        ),
        Plot("Label agreement", [Curve("agreement", agreement, marked=True)]),
        Plot("Learning rate", [Curve("learning rate", series("optim/lr"))], restarts, from_zero=True),
        Plot(
            "Throughput",
            [Curve("images/s", series("throughput/images_per_sec"))],
            restarts,
            units="images/s",
            from_zero=True,
        ),
        Plot("Gradient norm", [Curve("gradient norm", series("optim/grad_norm"))], restarts, from_zero=True),
    ]
    note = ""
    if restarts:
        places = ", ".join(f"{images:,}" for images in restarts)
        note = f"<p>Restarted at {places} images seen.</p>"
    return note + _drawn(plots, "plot")


def _over_images(label: str, results: Sequence[Result], key: str, error: str) -> Curve:
    """A figure of results over images seen, with its standard error."""
    shown = [r for r in results if r.values.get(key) is not None]
    points = [(float(r.images_seen), float(r.values[key])) for r in shown]
    return Curve(label, points, marked=True, errors=[r.values.get(error) for r in shown])


def _drawn(plots: Sequence[Plot], key: str) -> str:
    drawn = (svg(_with_points(plot), f"{key}{i}") for i, plot in enumerate(plots) if not plot.empty)
    return "".join(f"<figure class='plot'>{picture}</figure>" for picture in drawn)


def sampling_curves(history: History) -> str:
    """Distance over guidance, denoising and temperature: of results that differ in one of them, and of sweeps."""
    plots = []
    for setting, label in (("guidance", "guidance"), ("denoise", "denoising"), ("attn_temp", "attention temperature")):
        curves = []
        for name, group in history.over(setting).items():
            scored = [(value, result) for value, result in group if result.distance[1] is not None]
            errors = [result.values.get("distance_stderr") for _, result in scored]
            points = [(value, float(result.distance[1] or 0.0)) for value, result in scored]
            curves.append(Curve(name, points, marked=True, errors=errors))
        plots.append(Plot(f"Distance over {label}", curves, x=label))
    for sweep in history.sweeps:
        for part in sweep["rounds"]:
            lines: dict[str, list[tuple[float, float, float]]] = {}
            for point in part["points"]:
                if point["distance"] is not None:
                    key = f"denoise {point['denoise']:g}, temperature {point['attn_temp']:g}"
                    error = point.get("distance_stderr") or 0.0
                    lines.setdefault(key, []).append((point["guidance"], point["distance"], error))
            curves = []
            for key, line in sorted(lines.items()):
                line.sort()
                curves.append(Curve(key, [(w, d) for w, d, _ in line], marked=True, errors=[e for _, _, e in line]))
            plots.append(Plot(f"{leading_name(sweep['name'])}: {part['num_samples']:,} samples", curves, x="guidance"))
    said = (f"<p>{html.escape(plain(_outcome(sweep), 5000))}</p>" for sweep in history.sweeps if sweep.get("best"))
    return "".join(said) + _drawn(plots, "sampling")


def _outcome(sweep: dict[str, Any]) -> str:
    """What a sweep found, in a sentence."""
    best = ", ".join(f"{key} {value:g}" for key, value in sweep["best"].items())
    error = sweep.get("distance_stderr")
    distance = f"{sweep['distance']:.2f}" + (f" ± {error:.2f}" if error is not None else "")
    verdict = f"Not clear: {'; '.join(sweep['unclear'])}." if sweep.get("unclear") else "It is clear."
    return f"{sweep['name']}: best is {best} with {distance}. {verdict}"


def _with_points(plot: Plot) -> Plot:
    """The plot without curves that have no points, so that no legend names them."""
    plot.curves = [curve for curve in plot.curves if curve.points]
    return plot
