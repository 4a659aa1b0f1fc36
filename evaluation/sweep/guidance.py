"""`tarflow sweep-guidance`: which guidance, denoising, attention temperature and form of guidance give the smallest distance.

Candidates are dropped by successive halving until the last two are compared at the full number of samples. Any number of
processes share a sweep. It chooses by itself only what is clear: the best candidate is more than two standard errors
ahead of the next one, and not at an end of the range tried (see `choice.py`).

    RUN/sweeps/images-NNNNNNNNNNNN-0123456789ab/sweep.json    every round, the best, the choice, all settings
                                                guidance.svg  distance over guidance, a line per setting of the others
    RUN/sampling.json                                         the choice: the default of sample and evaluate from now on
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tarflow.evaluation import results
from tarflow.evaluation.batches import named_cause
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.metrics.names import distance_key
from tarflow.evaluation.run_config import choose
from tarflow.evaluation.samples.weights_source import WeightsSource, from_checkpoint, resolve_device
from tarflow.evaluation.sweep.candidate_score import AlreadyRecorded, CandidateScores
from tarflow.evaluation.sweep.candidates import FIRST_ROUND, SweepRequest, sweep_candidates
from tarflow.evaluation.sweep.choice import Point, why_unclear, with_error
from tarflow.evaluation.sweep.halving import Round, samples_per_round, successive_halving
from tarflow.evaluation.sweep.plot import plot_rounds
from tarflow.evaluation.sweep_file import load_sweep, shown_setting
from tarflow.evaluation.worker.real_images import RealImages
from tarflow.evaluation.worker.recipe import load_recipes
from tarflow.files import make_folder, write_text
from tarflow.records import write_object
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.pins import pinned

BEFORE_ERRORS = "this sweep was recorded without standard errors; remove its folder to do it again"


def sweep_guidance(request: SweepRequest, log: Log = print) -> dict[str, Any]:
    """Run a sweep together with any other workers; the content of its `sweep.json`.

    The best candidate becomes the run's default if it is clear, or if `choose` asks for it. Raises for settings without
    a meaning, and where every candidate loses too many samples.
    """
    checkpoint = find(request.run, request.step, request.images)
    recipe = load_recipes(request.run, request.overrides, log)[0].of(checkpoint, log)
    config, settings = recipe.config, recipe.settings
    final = request.final or settings.num_samples
    request = replace(request, start=request.start or max(2, min(FIRST_ROUND, final // 2)))
    if not 2 <= request.start <= final:
        raise EvaluationError(f"--start {request.start} must lie between 2 and the final number of samples, {final}")
    candidates = sweep_candidates(request, settings.sampling, config, log)
    device = resolve_device(request.device if request.device != "auto" else config.train.device)
    path = config.evaluation.reference
    real = RealImages(results.evals_dir(request.run), config, settings, device, path, log)
    # Pinned against retention: a sweep takes longer than the interval between checkpoints.
    with pinned(checkpoint, f"sweep-{os.uname().nodename}-{os.getpid()}"):
        with named_cause(f"loading {checkpoint.name}", device):
            source = from_checkpoint(config, checkpoint, settings.weights, device)
        scores = CandidateScores(request, source, real, config.sampling.batch_size, log)
        try:
            num_samples = samples_per_round(len(candidates), request.start, final)
            with named_cause(f"the sweep of {checkpoint.name}", device):
                rounds = successive_halving(candidates, num_samples, scores.score)
                record = _write_record(scores.record, rounds, source, real)
        except AlreadyRecorded:
            record = load_sweep(scores.record)
    scores.remove()
    _choose(request, record, final, log)
    return record


def _choose(request: SweepRequest, record: dict[str, Any], final: int, log: Log) -> None:
    """Log the best candidate, and make it the run's default where that is clear or asked for."""
    best, unclear = record.get("best") or record["chosen"], record.get("unclear", [BEFORE_ERRORS])
    where = f"sweeps/{record['name']}"
    distance = with_error(record["distance"], record.get("distance_stderr"))
    log(f"best: {shown_setting(best)}; distance {distance} with {final} samples; {where}/guidance.svg")
    for reason in unclear:
        log(f"not clear: {reason}")
    if request.choose == "best" or (request.choose == "clear" and not unclear):
        choose(request.run, best, where)
        log(f"chosen: the default of this run's samples and evaluations from now on ({request.run / 'sampling.json'})")
    else:
        why = "--choose none" if request.choose == "none" else "--choose best takes the best anyway"
        log(f"nothing is chosen, the run's default stays as it is ({why})")


def _write_record(path: Path, rounds: list[Round], source: WeightsSource, real: RealImages) -> dict[str, Any]:
    """Write the plot, then the record: once there is a record, the sweep counts as done."""
    tried, last = rounds[0].points, rounds[-1].points
    best = min(last, key=lambda point: point.order)
    if best.distance is None:
        raise EvaluationError(
            f"every setting of the sweep lost more than {real.settings.max_nonfinite_share:.0%} of its samples as not finite; "
            "try less --guidance, or sampling.param_dtype=float32"
        )
    unclear = why_unclear(tried, last)
    record = {
        "name": path.parent.name,
        **source.describe(),
        "metric": distance_key(real.features.name),
        "rounds": [{"num_samples": r.num_samples, "points": [_scored(p) for p in r.points]} for r in rounds],
        "best": best.settings,
        "distance": best.distance,
        "distance_stderr": best.stderr,
        "unclear": unclear,  # why the sweep chose nothing by itself
        "chosen": None if unclear else best.settings,
        "features": {"name": real.features.name, "sha256": real.features.sha256},
        "reference": {"images_used": real.reference.images_used, **real.reference.describe()},
        "settings": real.settings.describe(),
    }
    make_folder(path.parent.parent, path.parent.name)
    write_text(path.parent / "guidance.svg", plot_rounds(record["rounds"], record["metric"]), shared=True)
    write_object(path, record)
    return record


def _scored(point: Point) -> dict[str, Any]:
    return point.settings | {"distance": point.distance, "distance_stderr": point.stderr, "lost": point.lost}
