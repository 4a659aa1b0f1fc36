"""Evaluate one committed checkpoint: sample, score, likelihood, neighbours, pictures, `result.json`."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation import pictures, results
from evaluation.data import ImageSet
from evaluation.features import Features
from evaluation.files import write_json
from evaluation.frechet import FeatureStatistics, frechet_distance
from evaluation.label_agreement import label_agreement, nearest_neighbours
from evaluation.likelihood import measure_bits_per_dim
from evaluation.reference import Reference, cache_path, full_provenance, reference_statistics
from evaluation.sampling import SampleCount, Sampler, check_guidance
from evaluation.settings import EvaluationSettings
from evaluation.source import Source, from_checkpoint
from trainer.checkpoint import Checkpoint, pinned
from trainer.config import Config
from trainer.run_dir import run_id

FORMAT = 1
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
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 3)


@dataclass
class Evaluator:
    """One run under one group of settings; holds what all its checkpoints share (features, reference statistics)."""

    run_dir: Path
    config: Config
    settings: EvaluationSettings
    own_settings: bool  # the run's own, not overridden
    device: torch.device
    reference_path: Path | None = None  # stored statistics to use; None = computed once from data.train
    say: Say = print
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        check_guidance(self.settings.sampling, self.config.model.num_classes, self.config.train.label_dropout)

    @cached_property
    def features(self) -> Features:
        return Features(self.settings.features, self.device)

    @cached_property
    def training_images(self) -> ImageSet:
        """What the reference is made of."""
        data = self.config.data
        return ImageSet(data.train, self.config.model, data.on_error, self.settings.reference_images, data.access)

    @cached_property
    def reference(self) -> Reference:
        """Reference statistics, from the file if there is one."""
        provenance = full_provenance(self.training_images.provenance(), self.features)
        path = self.reference_path or cache_path(results.evals_dir(self.run_dir), provenance)
        if not path.is_file():
            self.say(
                f"reference statistics of {self.training_images.num_images} images with {self.features.name}, once"
            )
        return reference_statistics(
            path, provenance, self.features, lambda: (pixels for pixels, _, _ in self.training_images.batches(False))
        )

    def evaluate(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """Evaluate a checkpoint and publish the result; None if another worker published it first.

        The checkpoint is pinned while it is read. Raises for a set of weights that is not there or does not fit; a
        distance that cannot be had because samples are not finite is a result of status "failed".
        """
        self.watch = Stopwatch()
        start = time.monotonic()
        with self.watch.phase("load"), pinned(checkpoint, f"evaluate-{os.uname().nodename}-{os.getpid()}"):
            source = from_checkpoint(self.config, checkpoint, self.settings.weights, self.device)
        name = results.result_name(self.run_dir, checkpoint.step, self.settings.hash, self.own_settings)
        with results.building(self.run_dir, name) as folder:
            measured = self._measure(source, folder)
            self.watch.seconds["total"] = round(time.monotonic() - start, 3)
            result = self._result(name, source, measured)
            write_json(folder / results.RESULT, result)
            if not results.publish(self.run_dir, folder, name, self.config.log.tensorboard):
                return None
        return result

    def _measure(self, source: Source, folder: Path) -> dict[str, Any]:
        settings, model_config = self.settings, self.config.model
        with self.watch.phase("reference"):  # first: a mismatch must not cost a night of sampling
            reference = self.reference
        sampler = Sampler(source.model, settings.sampling)
        grid = pictures.GridImages(*settings.grid, model_config.num_classes)
        count, statistics, kept, kept_labels = self._sample(sampler, grid)
        problem = count.problem(settings.max_nonfinite_share)
        out: dict[str, Any] = {"status": "failed" if problem else "ok", "problem": problem, "samples": count.describe()}
        with self.watch.phase("distance"):
            out |= self._distance(statistics, reference, problem)
        with self.watch.phase("likelihood"):
            out |= self._likelihood(source)
        with self.watch.phase("neighbours"):
            out |= self._neighbours(kept, kept_labels, folder)
        with self.watch.phase("pictures"):
            batch_size = self.config.sampling.batch_size
            pictures.save_grids(folder, grid, sampler, settings.grid[0], batch_size)
            pictures.save_trajectory(folder / "trajectory.png", sampler, range(pictures.TRAJECTORY_ROWS))
        return out

    def _sample(
        self, sampler: Sampler, grid: pictures.GridImages
    ) -> tuple[SampleCount, FeatureStatistics, Tensor, Tensor]:
        """Draw and score all samples; keeps the first ones for the comparison with training images."""
        count, statistics = SampleCount(), FeatureStatistics(self.features.dim)
        kept: list[Tensor] = []
        kept_labels: list[Tensor] = []
        batches = sampler.draw_all(range(self.settings.num_samples), self.config.sampling.batch_size)
        said = time.monotonic()
        while True:
            with self.watch.phase("sampling"):
                drawn = next(batches, None)
            if drawn is None:
                break
            count.add(drawn)
            grid.add(drawn)
            pixels = drawn.pixels()
            with self.watch.phase("features"):
                statistics.add(self.features(pixels))
            room = self.settings.neighbour_samples - sum(map(len, kept))
            if room > 0:
                kept.append(pixels[:room])
                kept_labels.append(drawn.labels[drawn.finite][:room])
            if time.monotonic() - said > 30:
                said = time.monotonic()
                self.say(f"  {count.asked}/{self.settings.num_samples} samples")
        return count, statistics, torch.cat(kept), torch.cat(kept_labels)

    def _distance(self, statistics: FeatureStatistics, reference: Reference, problem: str | None) -> dict[str, Any]:
        key = f"fd_{self.features.name}"
        about = {
            "reference": {
                "file": reference.path.name,
                "images_used": reference.statistics.count,
                **reference.provenance,
            }
        }
        if problem or statistics.count < 2:
            return {key: None, "warnings": [problem] if problem else [], **about}
        found = frechet_distance(statistics, reference.statistics, names=("sampled", "reference"))
        terms = {"mean_term": found.mean_term, "covariance_term": found.covariance_term}
        return {key: found.distance, "distance_terms": terms, "warnings": found.warnings, **about}

    def _likelihood(self, source: Source) -> dict[str, Any]:
        data = self.config.data
        if data.validation is None:
            note = "not measured: data.validation is not set, and training images would flatter"
            return {"bits_per_dim": None, "bits_per_dim_stderr": None, "likelihood": {"note": note}}
        held_out = ImageSet(data.validation, self.config.model, data.on_error, self.settings.validation_images, data.access)
        found = measure_bits_per_dim(source.model, held_out.batches(labelled=True), self.settings.likelihood)
        about = held_out.provenance() | {key: found[key] for key in ("images", "nonfinite", "noise")}
        return {"bits_per_dim": found["bits_per_dim"], "bits_per_dim_stderr": found["stderr"], "likelihood": about}

    def _neighbours(self, samples: Tensor, labels: Tensor, folder: Path) -> dict[str, Any]:
        if not len(samples):
            return {"label_agreement": None}
        data = self.config.data
        training = ImageSet(data.train, self.config.model, data.on_error, self.settings.neighbour_images, data.access)
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
        names = self.training_images.index.classes or []
        classes = [row % number for row in range(self.settings.grid[0])]
        return [names[c] if c < len(names) else str(c) for c in classes]

    def _result(self, name: str, source: Source, measured: dict[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": name,
            "run": run_id(self.run_dir),
            **source.describe(),
            **measured,
            "grid_rows": self._row_names(),
            "num_samples": measured["samples"]["used"],
            "nonfinite": measured["samples"]["nonfinite"],
            "features": {
                "name": self.features.name,
                "sha256": self.features.sha256,
                "preprocessing": self.features.preprocessing,
            },
            "settings": self.settings.describe(),
            "settings_hash": self.settings.hash,
            "seconds": self.watch.seconds,
            "machine": machine(self.device) | {"sampling_batch_size": self.config.sampling.batch_size},
            "time": time.time(),
        }


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


def headline(result: dict[str, Any]) -> str:
    """A result in one line."""
    parts = [
        f"{key} {value:.2f}"
        for key, value in results.metrics(result).items()
        if key.startswith("fd_") and value is not None
    ]
    if result.get("bits_per_dim") is not None:
        stderr = result.get("bits_per_dim_stderr")
        parts.append(f"{result['bits_per_dim']:.4f}{f' +- {stderr:.4f}' if stderr else ''} bits/dim")
    if result.get("label_agreement") is not None:
        parts.append(f"label agreement {result['label_agreement']:.1%}")
    parts.append(f"{result['num_samples']} samples of {result['weights']}, {result['seconds']['total']:.0f} s")
    lost = f" | {result['problem']}" if result["problem"] else ""
    return f"step {result['step']} ({result['images_seen']:,} images): {' | '.join(parts)}{lost}"
