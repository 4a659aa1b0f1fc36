"""The score of one candidate of a sweep, computed together with any other processes.

RUN/sweeps/NAME.work/CANDIDATE/samples-*         chunks, each as large as the first round
RUN/sweeps/NAME.work/CANDIDATE/distance-*.json   the score on the first N samples
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tarflow.evaluation.log import Log
from tarflow.evaluation.metrics.frechet_distance import FrechetInfluence, frechet_distance
from tarflow.evaluation.result_file import Count, Number
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.weights_source import WeightsSource
from tarflow.evaluation.shared_sampling import share_sampling_plan
from tarflow.evaluation.shared_work import SharedWork, index_ranges
from tarflow.evaluation.stopwatch import Stopwatch
from tarflow.evaluation.sweep.candidates import SweepRequest
from tarflow.evaluation.sweep.choice import Point, with_error
from tarflow.evaluation.sweep_file import RECORD, load_sweep
from tarflow.evaluation.worker.chunk_file import SAMPLES, Chunk, is_valid
from tarflow.evaluation.worker.chunk_results import Keep, SamplesPart
from tarflow.evaluation.worker.compute_chunk import draw_chunk
from tarflow.evaluation.worker.pictures import GridImages
from tarflow.evaluation.worker.real_images import RealImages
from tarflow.files import put_once
from tarflow.leases import unique_name
from tarflow.records import DamagedFileError, Record, load_record, save_record

KEPT = 2000  # samples whose influence on the distance is kept, for standard errors


class AlreadyRecorded(Exception):  # noqa: N818  (not an error: the work is done)
    """Another process, or an earlier call, has written the sweep's record."""


class Score(Record):
    """The distance of a candidate on some samples: kept beside the chunks until the sweep is done."""

    what: ClassVar[str] = "the score of a sweep's candidate"
    way_out: ClassVar[str] = "remove it, and the sweep computes it again"

    distance: Number | None
    lost: Count = 0
    influence: list[Number | None] = Field(default_factory=list, max_length=KEPT)
    count: Count = 0


VARIED = ("guidance_form", "guide_blocks", "noise_level", "denoise_steps")  # what a record holds only where it varies


class CandidateScores:
    """Scores candidates on growing numbers of samples; a folder of shared work for each candidate."""

    def __init__(
        self, request: SweepRequest, source: WeightsSource, real: RealImages, batch_size: int, log: Log
    ) -> None:
        self.source, self.real, self.log = source, real, log
        self.chunk_samples, self.batch_size = request.start, batch_size
        identity = [source.sha256, real.features.sha256, real.settings.hash, request.start, list(request.guidance)]
        identity += [list(request.denoise), list(request.attn_temp), request.final]
        if request.guidance_form or request.guide_blocks:  # else it has the name that earlier versions gave it
            identity += [list(request.guidance_form), [list(blocks) for blocks in request.guide_blocks]]
        if request.noise_level or request.denoise_steps:
            identity += ["iterative", list(request.noise_level), list(request.denoise_steps)]
        self.varied = {name: bool(getattr(request, name)) for name in VARIED}
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        self.identity = {"sweep": digest, "checkpoint": source.checkpoint, "weights": source.sha256}
        self.folder = request.run / "sweeps" / f"{source.checkpoint}-{digest}.work"
        self.record = self.folder.with_suffix("") / RECORD
        if os.path.lexists(self.record):
            load_sweep(self.record)  # a damaged one is refused before any work

    def score(self, candidate: ResolvedSampling, number: int) -> Point:
        """The distance of one candidate on the samples 0 .. number-1. Raises AlreadyRecorded."""
        if os.path.lexists(self.record):
            raise AlreadyRecorded
        samples = _CandidateSamples(self, candidate, number)
        stored = samples.work.path(f"distance-{number:08d}.json")
        damaged = [*samples.work.give_back([stored.name], _is_score), *samples.give_back_damaged()]
        for name in damaged:
            self.log(f"{samples.work.path(name)} is damaged and computed again")
        # Another process may store the score, and clear its chunks away, before this one has merged them.
        if not stored.exists():
            samples.compute(over=lambda: stored.exists() or self.record.exists())
        if self.record.exists():
            raise AlreadyRecorded
        if not stored.exists():
            temporary = stored.with_name(f".{stored.name}.{unique_name()}")
            save_record(temporary, self._score(samples.merge(), number))
            put_once(temporary, stored)
        settings, found = candidate.settings, load_record(stored, Score)
        varied = {name: getattr(settings, name) for name, is_varied in self.varied.items() if is_varied}
        point = Point(
            settings.guidance, candidate.denoise_multiplier, settings.attn_temp, **found.model_dump(), **varied
        )
        shown = "too many samples lost" if point.distance is None else with_error(point.distance, point.stderr)
        self.log(f"{number} samples, {point}: {shown}")
        return point

    def _score(self, merged: SamplesPart, number: int) -> Score:
        """Distance of some samples, and what each of the first ones contributes to it."""
        reference, lost = self.real.reference.statistics, set(merged.count.nonfinite)
        if merged.count.nonfinite_share > self.real.settings.max_nonfinite_share:
            return Score(distance=None, lost=len(lost))
        distance = frechet_distance(merged.statistics, reference).distance
        values = iter(FrechetInfluence(merged.statistics, reference).of_rows(merged.features).tolist())
        influence = [None if i in lost else next(values, None) for i in range(min(number, KEPT))]
        return Score(distance=distance, lost=len(lost), influence=influence, count=merged.statistics.count)

    def remove(self) -> None:
        """Remove the chunks."""
        SharedWork.clear(self.folder)


class _CandidateSamples:
    """The first `number` samples of one candidate as chunks; a later round adds to those of the one before."""

    def __init__(self, scores: CandidateScores, candidate: ResolvedSampling, number: int) -> None:
        self.scores = scores
        self.key = hashlib.sha256(json.dumps(candidate.describe(), sort_keys=True).encode()).hexdigest()[:12]
        lease_s = scores.real.config.evaluation.lease_s
        self.work = SharedWork(scores.folder / self.key, {"batch_size": scores.batch_size}, lease_s)
        ranges = index_ranges(number, scores.chunk_samples)
        self.chunks = {f"samples-{r.start:08d}-{r.stop:08d}": r for r in ranges}
        self.sampler = Sampler(scores.source.model, candidate, scores.real.batches)

    def give_back_damaged(self) -> list[str]:
        """Free the chunks whose files cannot be merged; their names."""
        return self.work.give_back(list(self.chunks), lambda path: is_valid(self._chunk(path.name, path), SAMPLES))

    def compute(self, over: Callable[[], bool]) -> None:
        """Help until all chunks are there or the work is `over`."""
        first, scores = min(int(self.work.plan["batch_size"]), max(r.stop for r in self.chunks.values())), self.scores
        if not share_sampling_plan(self.work, self.sampler, scores.source.sha256, first, scores.log, over):
            return
        self.work.work_through(list(self.chunks), self._compute_chunk, over)

    def _compute_chunk(self, name: str, path: Path) -> None:
        part, watch = self._empty(), Stopwatch()
        batch_size = int(self.work.plan["batch_size"])
        draw_chunk(part, self.sampler, self.scores.real.features, self.chunks[name], batch_size, watch)
        part.save(self._chunk(name, path), {"seconds": watch.seconds})

    def merge(self) -> SamplesPart:
        """All chunks, in order."""
        merged = self._empty()
        for name in self.chunks:
            merged.merge(self._chunk(name, self.work.path(name)))
        return merged

    def _chunk(self, name: str, path: Path) -> Chunk:
        batch_size = self.work.plan["batch_size"]
        return Chunk(path, {"chunk": name, "candidate": self.key, "batch_size": batch_size, **self.scores.identity})

    def _empty(self) -> SamplesPart:
        return SamplesPart(self.scores.real.features.dim, Keep(KEPT, 0, GridImages(0, 0, 0)))


def _is_score(path: Path) -> bool:
    try:
        load_record(path, Score)
    except DamagedFileError:
        return False
    return True
