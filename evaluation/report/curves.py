"""The report's curves: metrics over training, and the distance over each sampling setting."""

from collections.abc import Iterator, Sequence
from typing import Any

from tarflow.evaluation.report.headline import Headline, alike, differences, settings_of
from tarflow.evaluation.report.history import History, Result
from tarflow.evaluation.report.markup import paragraphs
from tarflow.evaluation.report.plots import Curve, Plot, outline, svg
from tarflow.evaluation.sweep_file import shown_line, shown_setting
from tarflow.trainer.checkpoint.names import leading_name

MOST_HISTOGRAMS = 4  # on one plot
# Sampling settings that a plot is made over: name of the setting, label of the axis.
AXES = (
    ("guidance", "guidance weight"),
    ("denoise", "denoising multiplier"),
    ("attn_temp", "attention temperature"),
    ("temperature", "temperature"),
    ("noise_level", "noise level t1"),
    ("denoise_steps", "denoising steps"),
)


def by_settings(history: History, headline: Headline) -> dict[str, list[Result]]:
    """Results that belong on the curves over training, by the curve's label.

    One curve per set of weights under the headline's settings, and one for each group of settings that were the run's own
    before they were changed.
    """
    wanted = settings_of(headline.curve)
    found: dict[str, list[Result]] = {str(headline.curve.values["weights"]): []}
    for result in alike(history.results, headline.curve, apart_from=["weights"]):
        found.setdefault(str(result.values["weights"]), []).append(result)
    for result in history.results:
        changed = differences(settings_of(result), wanted)
        if result.plain and set(changed) - {"weights"}:
            other = ", ".join(f"{key} {value}" for key, (value, _) in changed.items() if key != "weights")
            found.setdefault(f"{result.values['weights']}, {other}", []).append(result)
    return found


def training_curves(history: History, headline: Headline | None) -> str:
    """Metrics over images seen: those that training logged, and those of results under the headline's settings."""
    restarts = history.restarts
    note = ""
    if restarts:
        note = paragraphs([f"Restarted at {', '.join(f'{images:,}' for images in restarts)} images seen."])
    return note + drawn([*_training_plots(history, headline)], "plot")


def _training_plots(history: History, headline: Headline | None) -> Iterator[Plot]:
    series, restarts = history.series, history.restarts
    groups = by_settings(history, headline) if headline else {}
    name = headline.curve.distance[0] if headline else "none"
    held_out = [
        over_images(f"held-out, {label}", results, "bits_per_dim", "bits_per_dim_stderr")
        for label, results in groups.items()
    ]
    distances = [over_images(label, results, name, "distance_stderr") for label, results in groups.items()]
    comparable = alike(history.results, headline.curve) if headline else []

    yield Plot("Loss", [Curve("training", series("train/loss"))], "nats per dimension", restarts=restarts)
    bits = [Curve("training", series("train/bits_per_dim")), *held_out]
    yield Plot("Bits per dimension", bits, "bits per dimension", restarts=restarts)
    yield likelihoods(
        [(f"{result.images_seen:,} images seen", result) for result in spaced(comparable, MOST_HISTOGRAMS)]
    )
    yield Plot(f"Fréchet distance ({name})", distances, "Fréchet distance", from_zero=True)
    yield Plot("Label agreement", [over_images("agreement", comparable, "label_agreement")], "fraction of samples")
    rate = [Curve("learning rate", series("optim/lr"))]
    yield Plot("Learning rate", rate, "learning rate", restarts=restarts, from_zero=True)
    throughput = [Curve("throughput", series("throughput/images_per_sec"))]
    yield Plot("Throughput", throughput, "images per second", restarts=restarts, from_zero=True)
    norm = [Curve("gradient norm", series("optim/grad_norm"))]
    yield Plot("Gradient norm", norm, "L2 norm", restarts=restarts, from_zero=True)


def likelihoods(results: Sequence[tuple[str, Result]]) -> Plot:
    """Held-out images by their exact likelihood under each result, by label."""
    curves = [Curve(label, outline(*result.histogram)) for label, result in results if result.histogram is not None]
    return Plot("Likelihood of held-out images", curves, "share of images", "bits per dimension", from_zero=True)


def spaced(results: Sequence[Result], most: int) -> list[Result]:
    """These results, or `most` of them, evenly spaced, with the first and the last."""
    if len(results) <= most:
        return list(results)
    return [results[i * (len(results) - 1) // (most - 1)] for i in range(most)]


def over_images(label: str, results: Sequence[Result], key: str, stderr_key: str = "") -> Curve:
    """A metric of results over images seen, with its standard error where there is one."""
    shown = [result for result in results if result.values.get(key) is not None]
    points = [(float(result.images_seen), float(result.values[key])) for result in shown]
    errors = [result.values.get(stderr_key) for result in shown] if stderr_key else []
    return Curve(label, points, marked=True, errors=errors)


def sampling_curves(history: History) -> str:
    """The distance over guidance, denoising and temperature: of results that differ in one of them, and of sweeps."""
    plots = [_setting_plot(history, setting, label) for setting, label in AXES]
    for sweep in history.sweeps:
        plots += [_round_plot(sweep, part) for part in sweep["rounds"]]
    outcomes = paragraphs(_outcome(sweep) for sweep in history.sweeps if sweep.get("best"))
    return outcomes + drawn(plots, "sampling")


def _setting_plot(history: History, setting: str, label: str) -> Plot:
    """Results of one checkpoint that differ in this setting alone."""
    curves = []
    for name, group in history.over(setting).items():
        scored = [(value, result) for value, result in group if result.distance[1] is not None]
        errors = [result.values.get("distance_stderr") for _, result in scored]
        points = [(value, float(result.distance[1] or 0.0)) for value, result in scored]
        curves.append(Curve(name, points, marked=True, errors=errors))
    return Plot(f"Distance over {label}", curves, "Fréchet distance", x_label=label)


def _round_plot(sweep: dict[str, Any], part: dict[str, Any]) -> Plot:
    """One round of a sweep: distance over guidance, a curve for each setting of the others."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for point in part["points"]:
        if point["distance"] is not None:
            stderr = point.get("distance_stderr") or 0.0
            lines.setdefault(shown_line(point), []).append((point["guidance"], point["distance"], stderr))
    curves = []
    for key, line in sorted(lines.items()):
        line.sort()
        curves.append(Curve(key, [(w, d) for w, d, _ in line], marked=True, errors=[e for _, _, e in line]))
    title = f"{leading_name(sweep['name'])}: {part['num_samples']:,} samples"
    return Plot(title, curves, "Fréchet distance", x_label="guidance weight")


def _outcome(sweep: dict[str, Any]) -> str:
    """What a sweep found, in a sentence or two."""
    stderr = sweep.get("distance_stderr")
    distance = f"{sweep['distance']:.2f}" + (f" ± {stderr:.2f}" if stderr is not None else "")
    verdict = f"No clear winner: {'; '.join(sweep['unclear'])}." if sweep.get("unclear") else "A clear winner."
    return f"{sweep['name']}: the best is {shown_setting(sweep['best'])}, at a distance of {distance}. {verdict}"


def drawn(plots: Sequence[Plot], key: str) -> str:
    """Plots that have points as figures. Curves without points are dropped first, so that no legend names them."""
    for plot in plots:
        plot.curves = [curve for curve in plot.curves if curve.points]
    images = (svg(plot, f"{key}{i}") for i, plot in enumerate(plots) if plot.curves)
    return "".join(f"<figure class='plot'>{image}</figure>" for image in images)
