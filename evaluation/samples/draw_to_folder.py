"""Samples of a run or a weights file, as PNGs with a grid and the settings that made them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tarflow.code_version import code_version
from tarflow.evaluation.batches import Batches
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.run_config import run_config
from tarflow.evaluation.samples.draw import NO_LABEL, SampleCount, Sampler, check_guidance
from tarflow.evaluation.samples.file_sampling import describe_file, sampling_of_file
from tarflow.evaluation.samples.grid import make_grid
from tarflow.evaluation.samples.labels import given_names, parse_labels
from tarflow.evaluation.samples.png_folder import SampleFolder, load_png, save_png
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.weights_source import WeightsSource, from_checkpoint, from_file, resolve_device
from tarflow.models.weights import is_weights_file, read_weights
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.pins import pinned
from tarflow.trainer.checkpoint.provenance import names_of_checkpoint

GRID_IMAGES = 100


@dataclass
class SampleRequest:
    """What to draw. `settings` overrides the run's sampling settings."""

    source: Path
    out: Path
    num: int = 64
    step: int | None = None
    images: int | None = None  # seen by the checkpoint to use
    weights: str | None = None
    batch_size: int | None = None
    columns: int | None = None
    device: str = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    labels: str | None = None  # as typed on the command line
    classes: Path | None = None  # file of class names, if neither run nor weights file holds them


def sample_images(request: SampleRequest, log: Log = print) -> bool:
    """Draw what is missing in `request.out`; returns whether every requested sample is there.

    Raises EvaluationError for meaningless settings, and for a directory that holds anything else.
    """
    source, sampling, batch_size = _open(request, log)
    model = source.model.config
    sampler = Sampler(source.model, sampling, Batches(source.model.var.device, log))
    about = source.describe() | {"source": source.origin, "sampling": sampling.describe()}
    about |= {"provenance": source.describe_provenance(), "code": code_version()}
    folder = SampleFolder(request.out, about, request.num, model.image_shape)
    missing, damaged = folder.missing(), folder.damaged

    # Any number of calls fill one folder: each draws only what is missing or damaged.
    log(f"{request.num} images of {model.image_size} pixels from {source.origin}, weights {source.weights}")
    if len(missing) < request.num:
        log(f"{request.num - len(missing)} are there already")
    if damaged:
        first = next(iter(damaged))
        log(f"{len(damaged)} damaged images are drawn again: {folder.path(first).name} is {damaged[first]}"
            + (f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""))  # fmt: skip
    count = SampleCount()
    for drawn in sampler.draw_all(missing, batch_size):
        for index, pixels in zip(drawn.finite_indices(), drawn.pixels()):
            folder.save(index, pixels)
        count.add(drawn)
    folder.finish(count.nonfinite)

    # The grid is made from the files, since samples of earlier calls belong in it too.
    shown = _grid_order(sampler, min(request.num, GRID_IMAGES))
    images = [load_png(folder.path(i)) if folder.path(i).exists() else None for i in shown]
    if any(image is not None for image in images):
        save_png(request.out / "grid.png", make_grid(images, request.columns or _columns(sampler, len(images))))
        log(f"images: {folder.images}\ngrid: {request.out / 'grid.png'}")
    if count.nonfinite:
        log(count.problem(0.0) or "")
    return not count.nonfinite


def _grid_order(sampler: Sampler, num: int) -> list[int]:
    """Indices sorted by class, so that samples of a class are next to each other."""
    return sorted(range(num), key=lambda i: (sampler.label_of(i), i))


def _columns(sampler: Sampler, num: int) -> int:
    """One row per class if that fills all rows, otherwise about square."""
    classes = len({sampler.label_of(i) for i in range(num)} - {NO_LABEL})
    if classes > 1 and num % classes == 0 and num // classes >= 4:
        return num // classes
    return math.ceil(math.sqrt(num))


def _open(request: SampleRequest, log: Log) -> tuple[WeightsSource, ResolvedSampling, int]:
    """(weights, sampling settings, batch size) of a request."""
    device = resolve_device(request.device)
    if is_weights_file(request.source):
        return _open_file(request, device, log)
    config = run_config(request.source, log=log, given=request.settings)
    # A run knows its noise; given another one, denoising would take out what is not there.
    if "noise_std" in request.settings:
        raise EvaluationError(
            f"--noise-std is for weights files; {request.source} was trained with {config.train.noise_std}"
        )
    checkpoint = find(request.source, request.step, request.images)
    given = request.settings
    if request.labels is not None or request.classes is not None:
        given = given | _labels(request, names_of_checkpoint(checkpoint, config), config.model.num_classes)
    sampling = ResolvedSampling.of_run(config).with_changes(**given)
    if sampling.denoise_multiplier and config.train.noise == "uniform":
        raise EvaluationError("--denoise needs a model trained with gaussian noise; this run has train.noise=uniform")
    check_guidance(sampling, config.model.num_classes, config.train.label_dropout)
    with pinned(checkpoint, f"sample-{id(request)}"):
        source = from_checkpoint(config, checkpoint, request.weights or config.evaluated_weights, device)
    return source, sampling, request.batch_size or config.sampling.batch_size


def _open_file(request: SampleRequest, device: torch.device, log: Log) -> tuple[WeightsSource, ResolvedSampling, int]:
    chosen = (("--step", request.step), ("--images", request.images), ("--weights", request.weights))
    for option, value in chosen:
        if value is not None:
            raise EvaluationError(f"{option} selects among a run's checkpoints; {request.source} is a weights file")
    file = read_weights(request.source)
    log(describe_file(request.source, file))
    given = request.settings
    if request.labels is not None or request.classes is not None:
        given = given | _labels(request, file.provenance.classes, file.config.num_classes)
    sampling = sampling_of_file(request.source, file, given, log)
    source = from_file(request.source, file, device)
    return source, sampling, request.batch_size or sampling.settings.batch_size


def _labels(request: SampleRequest, known: Sequence[str] | None, num_classes: int) -> dict[str, Any]:
    """The setting `labels`, if it was given."""
    classes = given_names(request.classes, known, num_classes, str(request.source))
    return {} if request.labels is None else {"labels": parse_labels(request.labels, num_classes, classes)}
