"""`tarflow sweep-guidance`: which guidance, denoising and attention temperature give the smallest distance.

Successive halving (Jamieson & Talwalkar, arXiv 1502.07943): every setting of the grid is scored on a small number of
samples, the better half on more, until the last two are compared at the full number. All settings of a round are scored
on equally many samples with the same noise, so that few samples mislead all of them alike. A round goes on from the
samples of the one before. Any number of processes share a sweep.

A sweep chooses by itself only what is clear: the best setting lies more than two standard errors before the next one and
not at the end of the range tried (see `sweep_choice.py`).

    RUN/sweeps/images-NNNNNNNNNNNN-0123456789ab/sweep.json    every round, the best, the choice, all settings
                                                guidance.svg  distance over guidance, a line per denoising and temperature
    RUN/sampling.json                                         the choice: the default of sample and evaluate from now on
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from tarflow.evaluation import results
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.frechet_distance import FrechetInfluence, frechet_distance
from tarflow.evaluation.metrics.names import distance_key
from tarflow.evaluation.result_file import Count, Figure
from tarflow.evaluation.run_config import choose
from tarflow.evaluation.samples.draw import NO_LABEL, Sampler, check_guidance
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.weights_source import WeightsSource, from_checkpoint, resolve_device
from tarflow.evaluation.shared_work import SharedWork, stretches
from tarflow.evaluation.sweep_file import RECORD, load_sweep
from tarflow.evaluation.worker.chunk_file import SAMPLES, Chunk, is_whole
from tarflow.evaluation.worker.chunk_results import Keep, SamplesPart
from tarflow.evaluation.worker.evaluate import Stopwatch, draw_chunk
from tarflow.evaluation.worker.pictures import GridImages
from tarflow.evaluation.worker.real_images import RealImages
from tarflow.evaluation.worker.recipe import load_recipes
from tarflow.evaluation.worker.sweep_choice import Point, why_unclear, with_error
from tarflow.evaluation.worker.sweep_plot import plot_rounds
from tarflow.files import make_folder, put_once, write_text
from tarflow.leases import unique_name
from tarflow.records import DamagedFileError, Record, load_record, save_record, write_object
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.pins import pinned

MOST_SETTINGS = 1000  # that one sweep tries
Say = Callable[[str], None]
KEPT = 2000  # samples whose influence on the distance is kept, for standard errors


@dataclass
class SweepRequest:
    """What to try; an empty list stands for the run's own value."""

    run: Path
    guidance: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    denoise: Sequence[float] = ()
    attn_temp: Sequence[float] = ()
    start: int = 500  # samples of the first round
    final: int = 0  # samples of the last round; 0 = evaluation.num_samples
    step: int | None = None
    images: int | None = None
    choose: Literal["clear", "best", "none"] = "clear"  # what becomes the run's default
    device: str = "auto"
    overrides: list[str] = field(default_factory=list)


def sweep_guidance(request: SweepRequest, say: Say = print) -> dict[str, Any]:
    """Run a sweep with whoever else is at it; the content of its `sweep.json`.

    The best setting becomes the run's default if that is clear, or if `choose` asks for it. Raises for settings that mean
    nothing, and where every setting loses too many samples.
    """
    (recipe, *_) = load_recipes(request.run, request.overrides, say)
    config, settings = recipe.config, recipe.settings
    final = request.final or settings.num_samples
    if not 2 <= request.start <= final:
        raise EvaluationError(f"--start {request.start} must lie between 2 and the final number of samples, {final}")
    grid = _grid(request, settings.sampling, config.train.noise, config.model.num_classes, say)
    for candidate in grid:
        check_guidance(candidate, config.model.num_classes, config.train.label_dropout)
    device = resolve_device(request.device if request.device != "auto" else config.train.device)
    path = config.evaluation.reference
    real = RealImages(results.evals_dir(request.run), config, settings, device, path, say)
    checkpoint = find(request.run, request.step, request.images)
    with pinned(checkpoint, f"sweep-{os.uname().nodename}-{os.getpid()}"):
        source = from_checkpoint(config, checkpoint, settings.weights, device)
        sweep = _Sweep(request, source, real, config.sampling.batch_size, say)
        try:
            rounds = sweep.halve(grid, final)
            record = _write(sweep, rounds)
        except _Finished:  # by another process, or by this command before
            record = load_sweep(sweep.record)
    sweep.remove()
    best, unclear = record.get("best") or record["chosen"], record.get("unclear", [BEFORE_ERRORS])
    where = f"sweeps/{record['name']}"
    listed = ", ".join(f"{key} {value:g}" for key, value in best.items())
    distance = with_error(record["distance"], record.get("distance_stderr"))
    say(f"best: {listed}; distance {distance} with {final} samples; {where}/guidance.svg")
    for reason in unclear:
        say(f"not clear: {reason}")
    if request.choose == "best" or (request.choose == "clear" and not unclear):
        choose(request.run, best, where)
        say(f"chosen: the default of this run's samples and evaluations from now on ({request.run / 'sampling.json'})")
    else:
        why = "--choose none" if request.choose == "none" else "--choose best takes the best all the same"
        say(f"nothing is chosen, the run's default stays as it is ({why})")
    return record


BEFORE_ERRORS = "this sweep was recorded without standard errors; remove its folder to do it again"


class _Finished(Exception):  # noqa: N818  (no error)
    """The sweep has its record."""


def _write(sweep: "_Sweep", rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the record and the plot, in this order of need: the record last, since it says that all is there."""
    real = sweep.real
    best = min(rounds[-1]["points"], key=lambda point: point.order)
    if best.distance is None:
        raise EvaluationError(
            f"every setting of the sweep lost more than {real.settings.max_nonfinite_share:.0%} of its samples as not finite; "
            "try less --guidance, or sampling.param_dtype=float32"
        )
    folder = sweep.record.parent
    unclear = why_unclear(rounds[0]["points"], rounds[-1]["points"])
    record = _record(rounds, best, unclear, sweep.source, real, folder)
    make_folder(folder.parent, folder.name)
    write_text(folder / "guidance.svg", plot_rounds(record["rounds"], record["metric"]), shared=True)
    write_object(sweep.record, record)
    return record


def _grid(
    request: SweepRequest, own: ResolvedSampling, noise: str, num_classes: int, say: Say
) -> list[ResolvedSampling]:
    """Every combination that differs from the others; what has no effect is said."""
    denoise = list(request.denoise) or [own.denoise_multiplier]
    temperatures = list(request.attn_temp) or [own.settings.attn_temp]
    for name, values, low in (
        ("--guidance", request.guidance, 0.0), ("--denoise", denoise, 0.0), ("--attn-temp", temperatures, 1e-4),
    ):  # fmt: skip
        if bad := [v for v in values if not low <= v < math.inf]:
            raise EvaluationError(f"{name} {bad[0]:g} must be a number of at least {low:g}")
    if noise == "uniform" and any(denoise):
        raise EvaluationError("--denoise needs a model trained with gaussian noise; this run has train.noise=uniform")
    if (number := len(request.guidance) * len(denoise) * len(temperatures)) > MOST_SETTINGS:
        raise EvaluationError(
            f"--guidance x --denoise x --attn-temp make {number:,} settings, and {MOST_SETTINGS} is the most"
        )
    unlabelled = not num_classes or set(own.labels) == {NO_LABEL}
    found: dict[tuple[float, float, float], ResolvedSampling] = {}
    for w, m, t in product(request.guidance, denoise, temperatures):
        if w and unlabelled and t == 1:
            say(f"left out: guidance {w:g} with attention temperature 1 has no effect without labels")
            continue
        key = (w, m, t if w else temperatures[0])  # without guidance the temperature has no effect
        found.setdefault(key, own.with_changes(guidance=w, denoise=m, attn_temp=key[2]))
    if not found:
        raise EvaluationError("nothing is left to sweep: without labels give --attn-temp values other than 1")
    return list(found.values())


class Figures(Record):
    """What a setting's samples of one round come to: kept beside the chunks until the sweep is done."""

    what: ClassVar[str] = "figures of a sweep's setting"
    way_out: ClassVar[str] = "remove it, and the sweep computes it again"

    distance: Figure | None
    lost: Count = 0
    influence: list[Figure | None] = Field(default_factory=list, max_length=KEPT)
    count: Count = 0


def _is_whole(path: Path) -> bool:
    try:
        load_record(path, Figures)
    except DamagedFileError:
        return False
    return True


class _Sweep:
    """The samples of a sweep: a folder of chunks per setting, each chunk as large as the first round."""

    def __init__(
        self, request: SweepRequest, source: WeightsSource, real: RealImages, batch_size: int, say: Say
    ) -> None:
        self.source, self.real, self.say = source, real, say
        self.size, self.batch_size = request.start, batch_size
        about = [source.sha256, real.features.sha256, real.settings.hash, request.start, list(request.guidance)]
        about += [list(request.denoise), list(request.attn_temp), request.final]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        self.about = {"sweep": digest, "checkpoint": source.checkpoint, "weights": source.sha256}
        self.folder = request.run / "sweeps" / f"{source.checkpoint}-{digest}.work"
        self.record = self.folder.with_suffix("") / RECORD
        if os.path.lexists(self.record):
            load_sweep(self.record)  # a damaged one is refused before any work

    def halve(self, grid: list[ResolvedSampling], final: int) -> list[dict[str, Any]]:
        """Rounds of {num_samples, points}; every second setting goes on, the last two to `final` samples."""
        rounds = []
        for number in self.numbers(len(grid), final):
            points = [(self.score(candidate, number), candidate) for candidate in grid]
            points.sort(key=lambda pair: pair[0].order)
            rounds.append({"num_samples": number, "points": [point for point, _ in points]})
            grid = [candidate for _, candidate in points[: math.ceil(len(points) / 2)]]
        return rounds

    def numbers(self, candidates: int, final: int) -> list[int]:
        """Samples per round, growing by equal factors; whole chunks but for the last."""
        rounds = max(math.ceil(math.log2(candidates)), 1)
        if rounds == 1:
            return [final]
        growth = (final / self.size) ** (1 / (rounds - 1))
        between = [round(growth**i) * self.size for i in range(rounds - 1)]
        return [*(min(number, final) for number in between), final]

    def score(self, candidate: ResolvedSampling, number: int) -> Point:
        """The distance of one setting on the samples 0 .. number-1."""
        if os.path.lexists(self.record):
            raise _Finished
        key = hashlib.sha256(json.dumps(candidate.describe(), sort_keys=True).encode()).hexdigest()[:12]
        lease_s = self.real.config.evaluation.lease_s
        work = SharedWork(self.folder / key, {"batch_size": self.batch_size}, lease_s)
        chunks = {f"samples-{r.start:08d}-{r.stop:08d}": r for r in stretches(number, self.size)}
        sampler = Sampler(self.source.model, candidate)

        def chunk(name: str, path: Path) -> Chunk:
            return Chunk(path, {"chunk": name, "candidate": key, "batch_size": work.plan["batch_size"], **self.about})

        def compute(name: str, path: Path) -> None:
            part, watch = self._part(), Stopwatch()
            draw_chunk(part, sampler, self.real.features, chunks[name], int(work.plan["batch_size"]), watch)
            part.save(chunk(name, path), {"seconds": watch.seconds})

        def whole(path: Path) -> bool:
            return is_whole(chunk(path.name, path), SAMPLES)

        merged = self._part()
        figures = work.path(f"distance-{number:08d}.json")
        for name in [*work.give_back([figures.name], _is_whole), *work.give_back(list(chunks), whole)]:
            self.say(f"{work.path(name)} is damaged and computed again")
        if not figures.exists():
            work.work_through(list(chunks), compute, over=lambda: figures.exists() or self.record.exists())
        if self.record.exists():
            raise _Finished
        if not figures.exists():
            for name in chunks:
                merged.merge(chunk(name, work.path(name)))
            temporary = figures.with_name(f".{figures.name}.{unique_name()}")
            save_record(temporary, self._figures(merged, number))
            put_once(temporary, figures)
        settings, found = candidate.settings, load_record(figures, Figures)
        point = Point(settings.guidance, candidate.denoise_multiplier, settings.attn_temp, **found.model_dump())
        said = "too many samples lost" if point.distance is None else with_error(point.distance, point.stderr)
        self.say(f"{number} samples, {point}: {said}")
        return point

    def _figures(self, merged: SamplesPart, number: int) -> "Figures":
        """Distance of some samples, and what each of the first ones contributes to it."""
        reference, lost = self.real.reference.statistics, set(merged.count.nonfinite)
        if merged.count.nonfinite_share > self.real.settings.max_nonfinite_share:
            return Figures(distance=None, lost=len(lost))
        distance = frechet_distance(merged.statistics, reference).distance
        values = iter(FrechetInfluence(merged.statistics, reference).of_rows(merged.features).tolist())
        influence = [None if i in lost else next(values, None) for i in range(min(number, KEPT))]
        return Figures(distance=distance, lost=len(lost), influence=influence, count=merged.statistics.count)

    def _part(self) -> SamplesPart:
        return SamplesPart(self.real.features.dim, Keep(KEPT, 0, GridImages(0, 0, 0)))

    def remove(self) -> None:
        """Clear the chunks away."""
        SharedWork.clear(self.folder)


def _record(
    rounds: list[dict[str, Any]], best: Point, unclear: list[str], source: WeightsSource, real: RealImages, folder: Path
) -> dict[str, Any]:
    plain = [
        {
            "num_samples": r["num_samples"],
            "points": [
                p.settings | {"distance": p.distance, "distance_stderr": p.stderr, "lost": p.lost} for p in r["points"]
            ],
        }
        for r in rounds
    ]
    reference = real.reference
    return {
        "name": folder.name,
        **source.describe(),
        "metric": distance_key(real.features.name),
        "rounds": plain,
        "best": best.settings,
        "distance": best.distance,
        "distance_stderr": best.stderr,
        "unclear": unclear,  # why the sweep chose nothing by itself
        "chosen": None if unclear else best.settings,
        "features": {"name": real.features.name, "sha256": real.features.sha256},
        "reference": {"images_used": reference.statistics.count, **reference.describe()},
        "settings": real.settings.describe(),
    }
