"""Evaluate one set of weights: chunks of samples and held-out images, shared among workers, then `result.json`.

Every figure comes from the chunks' files, merged in their order, also when one worker did them all: so the result is the
same to the last bit whoever did what. How long it took and who did it lies beside it, in `work.json`.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow.code_version import code_version
from tarflow.data_pipeline.images.identical import count_identical
from tarflow.evaluation import results
from tarflow.evaluation.image_set import ImageSet
from tarflow.evaluation.metrics.all_scores import feature_scores
from tarflow.evaluation.metrics.bits_per_dim import BitsPerDim
from tarflow.evaluation.metrics.names import distance_key
from tarflow.evaluation.metrics.nearest_neighbours import label_agreement, nearest_neighbours
from tarflow.evaluation.samples.draw import Sampler, check_guidance
from tarflow.evaluation.samples.store import SampleStore
from tarflow.evaluation.samples.weights_source import WeightsSource, from_checkpoint
from tarflow.evaluation.shared_work import SharedWork, stretches
from tarflow.evaluation.worker import pictures
from tarflow.evaluation.worker.chunk_file import LIKELIHOOD, SAMPLES, Chunk, is_whole
from tarflow.evaluation.worker.chunk_results import (
    Keep,
    MergedLikelihood,
    SamplesPart,
    chunk_statistics,
    save_likelihood,
)
from tarflow.evaluation.worker.class_maps import check_class_maps
from tarflow.evaluation.worker.real_images import RealImages
from tarflow.evaluation.worker.recipe import Recipe
from tarflow.evaluation.worker.reference import Reference
from tarflow.files import fill
from tarflow.records import write_object
from tarflow.terminal import plain
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.checkpoint.pins import pinned
from tarflow.trainer.run_dir import is_run, run_id

Say = Callable[[str], None]


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.add({name: time.monotonic() - start})

    def add(self, seconds: dict[str, float]) -> None:
        """Take in what another one measured."""
        for name, value in seconds.items():
            self.seconds[name] = round(self.seconds.get(name, 0.0) + value, 3)


@dataclass
class Evaluator:
    """A run, or a folder of results, under one recipe; what does not depend on the recipe lies in `real`."""

    root: Path  # run directory, or whatever holds evals/
    recipe: Recipe
    real: RealImages
    say: Say = print
    save: str = ""  # "shards" or "png": keep the samples too

    def __post_init__(self) -> None:
        self.config, self.settings = self.recipe.config, self.recipe.settings
        check_guidance(self.settings.sampling, self.config.model.num_classes, self.config.train.label_dropout)

    def evaluate(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """Evaluate a checkpoint, with whoever else is at it; None if another worker published the result.

        The checkpoint is pinned all the while. Raises for a set of weights that is not there or does not fit; a distance
        that cannot be had because samples are not finite is a result of status "failed".
        """
        with pinned(checkpoint, f"evaluate-{os.uname().nodename}-{os.getpid()}"):
            source = from_checkpoint(self.config, checkpoint, self.settings.weights, self.real.device)
            return Job(self, source).run()

    def name_of(self, source: WeightsSource) -> str:
        """Directory of the result of a checkpoint or a weights file."""
        if source.checkpoint is None:
            return f"weights-{source.sha256[:12]}-{self.settings.hash}"
        return results.result_name(self.root, source.checkpoint, self.settings.hash, self.recipe.own)


class Job:
    """One set of weights under one recipe."""

    def __init__(self, evaluator: Evaluator, source: WeightsSource) -> None:
        self.evaluator, self.source = evaluator, source
        self.config, self.settings, self.real = evaluator.config, evaluator.settings, evaluator.real
        self.name = evaluator.name_of(source)
        self.sampler = Sampler(source.model, self.settings.sampling)
        self.watch = Stopwatch()
        self.published: dict[str, Any] | None = None

    def run(self) -> dict[str, Any] | None:
        """Help until the result is there; the result if it was this worker that published it."""
        check_class_maps(self.config, self.source.provenance.classes)
        _ = self.real.reference  # first: what is missing or does not match must not cost a night of sampling
        self.open()
        if self.compute_chunks():
            self.work.work_through(["published"], self._finish, self._is_published)
        if self.saver:
            size = int(self.work.plan["chunk_samples"])
            self.saver.complete(self.sampler, self.batch_size, size, self.work.lease_s)
        if self._is_published():
            self.work.remove()
        return self.published

    def open(self) -> None:
        """Join the work on this result, or begin it: what the first worker's plan says holds for all."""
        root, evaluation, num = self.evaluator.root, self.config.evaluation, self.settings.num_samples
        self.saver = SampleStore.of(self.evaluator.save, root, self.source, self.sampler, num, self.evaluator.say)
        if aside := results.set_damaged_aside(root, self.name):
            kept, problem = aside
            self.evaluator.say(f"{self.name}: {plain(problem, 1000)}: set aside as {kept.name}, evaluated again")
        plan = {"batch_size": self.config.sampling.batch_size, "chunk_samples": evaluation.chunk_samples}
        folder = results.work_dir(root, f"{self.name}-{self.settings.hash}-{self.source.sha256[:12]}")
        self.work = SharedWork(folder, plan, evaluation.lease_s)
        self.batch_size, size = int(self.work.plan["batch_size"]), int(self.work.plan["chunk_samples"])
        self.sample_chunks = {f"samples-{k:05d}": r for k, r in enumerate(stretches(num, size))}
        held_out = self.held_out.num_images if self.held_out else 0
        self.likelihood_chunks = {f"likelihood-{k:05d}": k for k in range(len(stretches(held_out, size)))}

    def compute_chunks(self) -> bool:
        """Help until every chunk is there; False if the result is already."""
        chunks = [*self.sample_chunks, *self.likelihood_chunks]
        for name in self.work.give_back(chunks, self._is_whole):
            self.evaluator.say(f"  {self.work.path(name)} is damaged and computed again")
        return self.work.work_through(chunks, self._compute, self._is_published)

    def _chunk(self, name: str, path: Path | None = None) -> Chunk:
        """A chunk's file, or the one at `path` that will be it, with all that decides what is in it."""
        root, source = self.evaluator.root, self.source
        of = {
            "chunk": name,
            "run": run_id(root) if is_run(root) else None,
            "checkpoint": source.checkpoint,
            "weights": source.sha256,
            "settings": self.settings.hash,
            "features": self.real.features.sha256,
            "plan": [self.batch_size, self.work.plan["chunk_samples"]],
        }
        return Chunk(path or self.work.path(name), of)

    def _is_whole(self, path: Path) -> bool:
        return is_whole(self._chunk(path.name), SAMPLES if path.name in self.sample_chunks else LIKELIHOOD)

    def _is_published(self) -> bool:
        there = results.usable_result(results.evals_dir(self.evaluator.root) / self.name)
        return there is not None and self._same(there)

    def _same(self, result: dict[str, Any]) -> bool:
        ours = (self.settings.hash, self.source.sha256)
        return (result["settings_hash"], result["weights_sha256"]) == ours

    @property
    def held_out(self) -> ImageSet | None:
        """Images for bits per dimension."""
        data = self.config.data.held_out
        return None if data is None else ImageSet(data, self.config.model, self.settings.validation_images)

    # --- chunks ----------------------------------------------------------------------------------------------------

    def _compute(self, name: str, path: Path) -> None:
        watch = Stopwatch()
        begun = time.monotonic()
        if name in self.sample_chunks:
            part, indices = SamplesPart(self.real.features.dim, self._keep()), self.sample_chunks[name]
            draw_chunk(part, self.sampler, self.real.features, indices, self.batch_size, watch, self.saver)
            part.save(self._chunk(name, path), self._about(watch))
            done = f"samples {indices.start}..{indices.stop - 1} of {self.settings.num_samples}"
        else:
            with watch.phase("likelihood"):
                bits = self._likelihood(self.likelihood_chunks[name])
            save_likelihood(self._chunk(name, path), bits, self._about(watch))
            done = f"{len(bits.values)} held-out images"
        if time.monotonic() - begun > 10:
            self.evaluator.say(f"  {done}: {time.monotonic() - begun:.0f} s")

    def _keep(self) -> Keep:
        grid = self._grid() if self.settings.sampling == self.settings.sampling.balanced else self._grid(0, 0)
        return Keep(self.settings.keep_features, self.settings.neighbour_samples, grid)

    def _grid(self, *size: int) -> pictures.GridImages:
        rows, columns = size or self.settings.grid
        return pictures.GridImages(rows, columns, self.config.model.num_classes)

    def _likelihood(self, chunk: int) -> BitsPerDim:
        bits = BitsPerDim(self.settings.likelihood)
        held_out = self.held_out
        assert held_out is not None
        for batch in held_out.batches(True, self.batch_size, chunk, len(self.likelihood_chunks)):
            bits.add(self.source.model, *batch)
        return bits

    def _about(self, watch: Stopwatch) -> dict[str, Any]:
        return {"by": f"{platform.node()}:{os.getpid()}", "seconds": watch.seconds, "code": code_version()}

    # --- the result ------------------------------------------------------------------------------------------------

    def _finish(self, name: str, path: Path) -> None:
        """Merge and publish; whoever claims this unit does it for all."""
        root = self.evaluator.root
        samples = SamplesPart(self.real.features.dim, self._keep())
        likelihood = MergedLikelihood(self.settings.likelihood)
        done_by: dict[str, list[str]] = {}
        codes: list[dict[str, Any]] = [code_version()]
        for chunks, merged in ((self.sample_chunks, samples), (self.likelihood_chunks, likelihood)):
            for chunk in chunks:
                about = merged.merge(self._chunk(chunk))
                self.watch.add(about.seconds)
                done_by.setdefault(about.by, []).append(chunk)
                codes += [about.code] if about.code and about.code not in codes else []
        with results.building(root, self.name) as folder:
            measured = self._measure(samples, likelihood, folder)
            result = self._result(measured)
            write_object(folder / results.RESULT, result)
            write_object(folder / results.WORK, self._work_done(done_by) | {"code": codes})
            if results.publish(root, folder, self.name, self.config.log.tensorboard):
                self.published = results.read_result(results.evals_dir(root) / self.name)
        fill(path, self.name)

    def _measure(self, samples: SamplesPart, likelihood: MergedLikelihood, folder: Path) -> dict[str, Any]:
        problem = samples.count.problem(self.settings.max_nonfinite_share)
        out: dict[str, Any] = {
            "status": "failed" if problem else "ok",
            "problem": problem,
            "samples": samples.count.describe(),
        }
        with self.watch.phase("distance"):
            out |= self._distance(samples, self.real.reference, problem)
        out |= self._bits_per_dim(likelihood)
        with self.watch.phase("neighbours"):
            out |= self._neighbours(samples.pixels, samples.labels, folder)
        with self.watch.phase("pictures"):
            self._pictures(samples.keep.grid, folder)
        return out

    def _pictures(self, grid: pictures.GridImages, folder: Path) -> None:
        balanced = Sampler(self.source.model, self.settings.sampling.balanced)
        if self.settings.sampling != self.settings.sampling.balanced:
            grid = self._grid()
        pictures.save_grids(folder, grid, balanced, self.settings.grid[0], self.batch_size)
        pictures.save_trajectory(folder / "trajectory.png", self.sampler, range(pictures.TRAJECTORY_ROWS))

    def _distance(self, samples: SamplesPart, reference: Reference, problem: str | None) -> dict[str, Any]:
        about = {
            "reference": {
                "file": reference.path.name,
                "images_used": reference.statistics.count,
                **reference.describe(),
            }
        }
        network = self.real.features
        if problem or samples.statistics.count < 2:
            return {distance_key(network.name): None, "warnings": [problem] if problem else [], **about}
        chunks = chunk_statistics(self._chunk(chunk) for chunk in self.sample_chunks)
        found = feature_scores(
            network, samples.statistics, samples.features, reference.statistics, reference.rows, parts=chunks
        )
        identical = None
        if samples.hashes is not None and reference.hashes is not None:
            identical = count_identical(samples.hashes, reference.hashes)
        if identical:
            found["warnings"].append(
                f"{identical} of {samples.statistics.count} samples are, pixel for pixel, images of the reference"
            )
        return found | {"identical_images": identical} | about

    def _bits_per_dim(self, likelihood: MergedLikelihood) -> dict[str, Any]:
        held_out = self.held_out
        if held_out is None:
            note = "not measured: data.validation is not set, and training images would flatter"
            return {"bits_per_dim": None, "bits_per_dim_stderr": None, "likelihood": {"note": note}}
        found = likelihood.bits.result()
        about = held_out.provenance() | {key: found[key] for key in ("images", "nonfinite", "noise", "draws")}
        about["importance_weighted_bits_per_dim"] = found["importance_weighted"]
        return {"bits_per_dim": found["bits_per_dim"], "bits_per_dim_stderr": found["stderr"], "likelihood": about}

    def _neighbours(self, samples: Tensor, labels: Tensor, folder: Path) -> dict[str, Any]:
        if not len(samples):
            return {"label_agreement": None}
        training = self.real.images(self.settings.neighbour_images)
        found = nearest_neighbours(samples, training.batches(labelled=self.config.model.num_classes > 0))
        pictures.save_neighbours(folder / "neighbours.png", samples, found)
        nearest = found.distances[:, 0]
        about = {
            "samples": len(samples),
            "training_images": found.searched,
            "k": found.labels.shape[1],
            "nearest_rms_median": float(nearest.median()),  # grey levels
            "nearest_rms_min": float(nearest.min()),
        }
        return {"label_agreement": label_agreement(labels, found), "neighbours": about}

    def _row_names(self) -> list[str] | None:
        """The class in each row of the grid, by name where the data have names."""
        number = self.config.model.num_classes
        if not number:
            return None
        names = self.source.provenance.classes or self.real.images(0).index.classes or []
        classes = [row % number for row in range(self.settings.grid[0])]
        return [names[c] if c < len(names) else str(c) for c in classes]

    def _result(self, measured: dict[str, Any]) -> dict[str, Any]:
        features, root = self.real.features, self.evaluator.root
        return {
            "format": results.FORMAT,
            "name": self.name,
            "run": run_id(root) if is_run(root) else None,
            **self.source.describe(),
            "provenance": self.source.describe_provenance(),
            **measured,
            "grid_rows": self._row_names(),
            "num_samples": measured["samples"]["used"],
            "nonfinite": measured["samples"]["nonfinite"],
            "features": {
                "name": features.name,
                "sha256": features.sha256,
                "preprocessing": features.preprocessing,
            },
            "settings": self.settings.describe(),
            "settings_hash": self.settings.hash,
        }

    def _work_done(self, done_by: dict[str, list[str]]) -> dict[str, Any]:
        """Who did what and how long it took, all workers together; nothing in it decides a figure."""
        total = round(sum(self.watch.seconds.values()), 3)
        return {
            "seconds": self.watch.seconds | {"total": total},
            "workers": done_by,
            "machine": machine(self.real.device) | {"sampling_batch_size": self.batch_size},
            "time": time.time(),
        }


def draw_chunk(
    part: SamplesPart,
    sampler: Sampler,
    features: Callable[[Tensor], Tensor],
    indices: range,
    batch_size: int,
    watch: Stopwatch,
    saver: SampleStore | None = None,
) -> None:
    """Draw the samples of a chunk batch by batch, and take them in."""
    batches = sampler.draw_all(indices, batch_size)
    while True:
        with watch.phase("sampling"):
            drawn = next(batches, None)
        if drawn is None:
            break
        pixels = drawn.pixels()
        with watch.phase("features"):
            rows = features(pixels)
        with watch.phase("statistics"):
            part.add(drawn, pixels, rows)
        if saver:
            with watch.phase("saving"):
                saver.add(drawn)
    if saver:
        saver.flush(indices)


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was computed."""
    import torchvision

    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
