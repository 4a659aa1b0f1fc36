"""Which sampler a request means; what it contradicts is an error before anything is drawn."""

import hashlib
from typing import Any

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.draw import Sampler, check_guidance
from tarflow.evaluation.samples.request import SampleRequest, batches_of
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.variations.best_of import MOST_CANDIDATES, choose_best_of
from tarflow.evaluation.samples.variations.path import (
    OF_IMAGES,
    End,
    PathSampler,
    is_seed,
    label_of_path,
    parse_end,
    path_between,
    settings_of_path,
)
from tarflow.evaluation.samples.variations.temperatures import TemperatureSampler
from tarflow.evaluation.samples.weights_source import WeightsSource


def check_variation(request: SampleRequest) -> None:
    """Raise EvaluationError, naming both sides, for ways of drawing that exclude each other.

    Between images the source's own guidance, denoising and temperature give way before they are held against its labels.
    """
    ways = {
        "--interpolate": request.interpolate is not None,
        "--temperature with several values": len(request.temperatures) > 1,
        "--best-of": request.best_of > 1,
    }
    if len(both := [name for name, asked in ways.items() if asked]) > 1:
        raise EvaluationError(
            f"{both[0]} and {both[1]} are two ways to choose the noise of a sample: give one of the two"
        )
    if request.interpolate is not None and not all(map(is_seed, request.interpolate)):
        request.settings = OF_IMAGES | request.settings
    if not 1 <= request.best_of <= MOST_CANDIDATES:
        raise EvaluationError(f"--best-of {request.best_of} is out of bounds: it may be 1 to {MOST_CANDIDATES:,}")


def choose_sampler(
    request: SampleRequest, source: WeightsSource, sampling: ResolvedSampling, log: Log
) -> tuple[Sampler, int, dict[str, Any]]:
    """(the sampler, how many images it draws, what its settings record beyond those of sampling)."""
    model, memory = source.model, batches_of(request, source, log)
    if request.interpolate is not None:
        ends = [parse_end(text, model.config) for text in request.interpolate]
        sampling = label_of_path(settings_of_path(sampling, ends, request.settings), model.config)
        check_guidance(sampling, model.config, source.provenance.label_dropout)
        path = path_between(model, ends, sampling, request.num)
        log(f"a spherical path of {request.num} images from {ends[0].name} to {ends[1].name}{_neutral(ends)}")
        about = {"path": "spherical", "from": _about(ends[0]), "to": _about(ends[1]), "images": request.num}
        return PathSampler(model, sampling, path, memory), request.num, {"interpolate": about}
    if len(request.temperatures) > 1:
        rows = TemperatureSampler(model, sampling, request.temperatures, request.num, memory)
        log(f"{request.num} samples at each of the temperatures {', '.join(f'{t:g}' for t in request.temperatures)}")
        about = {"temperatures": list(request.temperatures), "samples": request.num}
        return rows, request.num * len(request.temperatures), about
    if request.best_of > 1:
        best = choose_best_of(model, sampling, request.best_of, memory, "--best-of {}", "--temperature 0")
        log(f"of {request.best_of} candidates for each image the one of highest likelihood, before denoising")
        about = {"candidates": request.best_of, "by": "log p(x | label) of the sample before denoising, unguided"}
        return best, request.num, {"best_of": about}
    return Sampler(model, sampling, memory), request.num, {}


def _neutral(ends: list[End]) -> str:
    if all(end.image is None for end in ends):
        return ""
    settings = ", ".join(f"{key}={value:g}" for key, value in OF_IMAGES.items())
    return f"; with {settings}, so that it ends at the image"


def _about(end: End) -> dict[str, Any]:
    """What the path depends on: the seed, or the image at the model's size."""
    if end.image is None:
        return {"seed": end.seed}
    return {"image": end.name, "sha256": hashlib.sha256(end.image.contiguous().numpy().tobytes()).hexdigest()}
