"""Does the distance see what it should, on a trained model: over training, over denoising, over guidance.

    python -m benchmarks.evaluation_curves RUN [--quick] [--check] [--plot docs/evaluation-curves.svg]

RUN is a run of `make demo`, with every checkpoint kept. Results are those of `tarflow evaluate`, in RUN/evals: run it
again and only what is missing is evaluated, and several may run at once.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.common import Bar, finish, parse_args
from tarflow.evaluation.metrics.names import is_distance
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate

matplotlib.use("svg")

GUIDANCE = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
DENOISE = (0.0, 0.5, 1.0, 1.5)
PLAIN = {"sampling.guidance": 0, "sampling.denoise": 1, "evaluation.weights": "auto"}


def results_of(run: Path, newest: bool, samples: int, **changes: Any) -> list[dict[str, Any]]:
    """Results of the newest checkpoint, or of all, under changed settings, by images seen."""
    from tarflow.evaluation.results import read_results

    settings = PLAIN | {
        "evaluation.num_samples": samples, "evaluation.reference_images": 2 * samples, "evaluation.validation_images": 8,
        "evaluation.neighbour_samples": 0,
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    overrides = [f"{key}={value}" for key, value in settings.items()]
    outcome = evaluate(run, False, WorkerOptions(newest_only=newest, overrides=overrides), print)
    if outcome.failed:
        raise SystemExit(f"not scored: {outcome.failed}")
    from tarflow.evaluation.worker.recipe import load_settings

    wanted = load_settings(run, overrides)[1].hash
    return [values for _, values in read_results(run) if values["settings_hash"] == wanted]


def distance(result: dict[str, Any]) -> tuple[float, float]:
    """The Frechet distance of a result and its standard error."""
    return next(float(result[key]) for key in result if is_distance(key)), float(result["distance_stderr"])


Curve = tuple[list[float], list[tuple[float, float]]]


def main() -> int:
    args = parse_args(
        __doc__.splitlines()[0],
        [
            ("run", {"type": Path, "metavar": "RUN"}),
            ("--plot", {"type": Path, "metavar": "FILE", "help": "write an SVG"}),
        ],
    )
    samples = 100 if args.quick else 500
    training: dict[str, Curve] = {}
    for weights in ("raw", "auto"):
        results = results_of(args.run, False, samples, evaluation__weights=weights)
        training[results[-1]["weights"]] = ([r["images_seen"] for r in results], [distance(r) for r in results])
    denoised = [distance(results_of(args.run, True, samples, sampling__denoise=d)[-1]) for d in DENOISE]
    guided = [distance(results_of(args.run, True, samples, sampling__guidance=g)[-1]) for g in GUIDANCE]
    panels: list[tuple[str, dict[str, Curve]]] = [
        ("images seen", training),
        ("denoising multiplier, no guidance", {"newest": (list(DENOISE), denoised)}),
        ("guidance, denoised", {"newest": (list(GUIDANCE), guided)}),
    ]
    if args.plot:
        plot(args.plot, panels, f"Frechet distance of {samples} samples (not FID), bars: one standard error")
    rows = [
        (axis, name, x, value, stderr)
        for axis, curves in panels
        for name, (places, values) in curves.items()
        for x, (value, stderr) in zip(places, values)
    ]
    bars = [
        Bar(f"last over first checkpoint, {name}", values[-1][0] / values[0][0], at_most=0.95, reason="training helps")
        for name, (_, values) in training.items()
    ]
    inside = min(guided[1:-1])
    bars += [
        Bar("denoised over noisy", denoised[DENOISE.index(1.0)][0] / denoised[0][0], at_most=0.95,
            reason="the noise of training is taken out"),
        Bar("best inside the guidance sweep over its better end", inside[0] / min(guided[0], guided[-1])[0], at_most=1.0,
            reason="some guidance helps, too much does harm"),
    ]  # fmt: skip
    return finish(args, rows, ("over", "weights", "at", "distance", "stderr"), bars)


def plot(path: Path, panels: list[tuple[str, dict[str, Curve]]], title: str) -> None:
    """Three panels beside each other, as an SVG file."""
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tarflow", "font.size": 9}):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        for axes, (label, curves) in zip(figure.subplots(1, len(panels)), panels):
            for name, (places, values) in curves.items():
                axes.errorbar(
                    places, [v for v, _ in values], [e for _, e in values], marker="o", ms=4, capsize=2, label=name
                )
            axes.set_xlabel(label)
            axes.grid(alpha=0.2)
            axes.legend(frameon=False)
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    sys.exit(main())
