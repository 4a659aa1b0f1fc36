"""A request for samples of a run or a weights file, and its weights, settings and labels, checked against each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from tarflow.evaluation.batches import NOTE, Batches
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.run_config import as_trained, run_config
from tarflow.evaluation.samples.draw import check_guidance, check_noise
from tarflow.evaluation.samples.file_sampling import describe_file, level_of, sampling_of_file
from tarflow.evaluation.samples.labels import given_names, parse_labels
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.weights_source import WeightsSource, from_checkpoint, from_file, resolve_device
from tarflow.models.weights import is_weights_file, read_weights
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.pins import pinned
from tarflow.trainer.checkpoint.provenance import names_of_checkpoint
from tarflow.trainer.run_dir import load_run_config


@dataclass(kw_only=True)
class SourceRequest:
    """Which weights to use, and how to sample from them. `settings` overrides the source's own sampling settings."""

    source: Path
    step: int | None = None
    images: int | None = None  # seen by the checkpoint to use
    weights: str | None = None
    batch_size: int | None = None
    device: str = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    labels: str | None = None  # as typed on the command line
    model: str | None = None  # architecture of a weights file that does not hold it: a preset, or key=value,...
    classes: Path | None = None  # file of class names, if neither run nor weights file holds them
    # Whether images are measured and none drawn: then the settings of sampling need not go together.
    measures: ClassVar[bool] = False

    def given(self, told: bool) -> dict[str, Any]:
        """`settings` as sampling settings of a model that is told the noise level, or is not."""
        return level_of(self.settings) if told else self.settings


@dataclass(kw_only=True)
class SampleRequest(SourceRequest):
    """What to draw, and where to."""

    out: Path
    num: int = 64
    form: str = "png"  # or npz: also OUT/samples.npz, all images in one array
    columns: int | None = None
    interpolate: tuple[str, str] | None = None  # seeds or pictures: `num` images on the path between them
    temperatures: tuple[float, ...] = ()  # more than one: `num` samples at each
    best_of: int = 1  # candidates for each sample


def open_request(request: SourceRequest, log: Log) -> tuple[WeightsSource, ResolvedSampling, int]:
    """(weights, sampling settings, batch size) of a request. `log` receives what was inferred, line by line."""
    device = resolve_device(request.device)
    if is_weights_file(request.source):
        return _open_file(request, device, log)
    if request.model is not None:
        raise EvaluationError(
            f"--model {request.model} is for weights files that do not hold their configuration; {request.source} is a run, "
            "whose config.yaml says it"
        )
    given = request.given(load_run_config(request.source).model.noise_conditioning)
    checkpoint = find(request.source, request.step, request.images)
    config = as_trained(run_config(request.source, log=log, given=given), checkpoint, log)
    # A run knows its noise; given another one, denoising would take out what is not there.
    if "noise_std" in given:
        raise EvaluationError(
            f"--noise-std is for weights files, and for models with noise_conditioning; {request.source} was trained with "
            f"{config.train.noise_std}"
        )
    if request.labels is not None or request.classes is not None:
        given = given | _labels(request, names_of_checkpoint(checkpoint, config), config.model.num_classes)
    sampling = ResolvedSampling.of_run(config).with_changes(**given)
    if sampling.denoise_multiplier and config.train.noise == "uniform":
        raise EvaluationError("--denoise needs a model trained with gaussian noise; this run has train.noise=uniform")
    check_guidance(sampling, config.model, config.train.label_dropout)
    if not request.measures:
        check_noise(sampling, config.model, config.train.noise_range)
    with pinned(checkpoint, f"sample-{id(request)}"):
        source = from_checkpoint(config, checkpoint, request.weights or config.evaluated_weights, device)
    return source, sampling, request.batch_size or config.sampling.batch_size


def batches_of(request: SourceRequest, source: WeightsSource, log: Log = print, keep: bool = True) -> Batches:
    """How many images a command takes at a time: of a run, by the note of halves that its evaluations go by and add to.

    `keep`: whether this process adds to it. A weights file has no such note.
    """
    note = None if is_weights_file(request.source) else request.source / NOTE
    return Batches(source.model.var.device, log, note=note, keep=keep)


def _open_file(request: SourceRequest, device: torch.device, log: Log) -> tuple[WeightsSource, ResolvedSampling, int]:
    chosen = (("--step", request.step), ("--images", request.images), ("--weights", request.weights))
    for option, value in chosen:
        if value is not None:
            raise EvaluationError(f"{option} selects among a run's checkpoints; {request.source} is a weights file")
    file = read_weights(request.source, model=request.model)
    log(describe_file(request.source, file))
    given = request.given(file.config.noise_conditioning)
    if request.labels is not None or request.classes is not None:
        given = given | _labels(request, file.provenance.classes, file.config.num_classes)
    sampling = sampling_of_file(request.source, file, given, log, measured=request.measures)
    source = from_file(request.source, file, device)
    return source, sampling, request.batch_size or sampling.settings.batch_size


def _labels(request: SourceRequest, known: Sequence[str] | None, num_classes: int) -> dict[str, Any]:
    """The setting `labels`, if it was given."""
    classes = given_names(request.classes, known, num_classes, str(request.source))
    return {} if request.labels is None else {"labels": parse_labels(request.labels, num_classes, classes)}
