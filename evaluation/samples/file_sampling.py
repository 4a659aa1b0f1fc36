"""How a weights file is sampled: as its run was, where it says so; what it does not say is asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import check_guidance
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.models.weights import WeightsFile
from tarflow.terminal import plain


def sampling_of_file(
    path: Path, file: WeightsFile, given: Mapping[str, Any], say: Callable[[str], None]
) -> ResolvedSampling:
    """The file's sampling settings with those given in their place.

    Raises EvaluationError for what the file contradicts, and where the noise that the denoising step takes out is not known.
    """
    known = file.provenance
    noise_std = _noise_std(path, known.noise_std, given)
    if given.get("denoise") and not noise_std:
        raise EvaluationError(f"--denoise needs a model trained with gaussian noise; {path} was trained without")
    settings = stored_sampling(path, known.sampling)
    if settings.labels == "training":
        settings = settings.model_copy(update={"labels": "balanced"})
        if file.config.num_classes and "labels" not in given:
            say("every class as often: the file does not hold how often each was in the training data")
    if settings.denoise is None:
        settings = settings.model_copy(update={"denoise": 1.0 if noise_std else 0.0})
    resolved = ResolvedSampling(settings).with_changes(**{**given, "noise_std": noise_std})
    check_guidance(resolved, file.config.num_classes, known.label_dropout)
    if resolved.settings.guidance and file.config.num_classes and known.label_dropout is None:
        say(
            f"note: {path} does not say whether it was trained without labels now and then (train.label_dropout); if not, "
            "guidance means nothing"
        )
    return resolved


def _noise_std(path: Path, known: float | None, given: Mapping[str, Any]) -> float:
    asked = given.get("noise_std")
    if known is None:
        if asked is not None:
            return float(asked)
        if given.get("denoise") == 0:
            return 0.0
        raise EvaluationError(
            f"{'--denoise' if given.get('denoise') else 'sampling'} needs --noise-std: {path} does not say the noise it was "
            "trained with, which samples must be freed of. Give its standard deviation, or 0 for a model that needs no "
            "denoising"
        )
    if asked is not None and asked != known:
        raise EvaluationError(
            f"--noise-std {asked:g}, but {path} was trained with {known:g}: leave the option out (--denoise M takes out more "
            "or less of it)"
        )
    return known


def stored_sampling(path: Path, stored: Mapping[str, Any] | None) -> SamplingSettings:
    """The sampling settings in a weights file, or the defaults where it holds none."""
    try:
        return SamplingSettings.model_validate(dict(stored or {}))
    except ValidationError as error:
        raise EvaluationError(f"{path} holds sampling settings that this version does not know: {error}") from None


def describe_file(path: Path, file: WeightsFile) -> str:
    """What a weights file says of itself, in a line for the terminal."""
    if not file.by_shapes:
        stored = stored_sampling(path, file.provenance.sampling).model_dump(exclude_defaults=True)
        sampling = f"; sampled with {', '.join(f'{key}={value}' for key, value in stored.items())}" if stored else ""
        return plain(f"{path}: {file.provenance}{sampling}", 5000) + file.caveat
    c = file.config
    return (
        f"{path}: the published layout; by its shapes {c.image_size} x {c.image_size} pixels, patches of {c.patch_size}, "
        f"{c.channels} channels, {c.num_blocks} blocks of {c.layers_per_block} layers, {c.num_classes} classes; taken as "
        f"published: attention heads of {c.head_channels} channels, no soft clip{file.caveat}"
    )
