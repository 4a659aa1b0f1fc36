"""Sampling settings of a weights file: those of its run, if it holds them; what is missing must be given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.draw import check_guidance, check_noise
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.image_size import shown
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.models.weights import WeightsFile
from tarflow.terminal import plain


def sampling_of_file(
    path: Path, file: WeightsFile, given: Mapping[str, Any], log: Log, measured: bool = False
) -> ResolvedSampling:
    """The file's sampling settings, overridden by those given. `measured`: nothing is drawn, so that no level is needed.

    Raises EvaluationError for a given setting that contradicts the file, and where the training noise is unknown but needed.
    """
    known = file.provenance
    told = file.config.noise_conditioning
    noise_std = 0.0 if told else _noise_std(path, known.noise_std, given)
    if given.get("denoise") and not noise_std and not told:
        raise EvaluationError(f"--denoise needs a model trained with gaussian noise; {path} was trained without")
    settings = stored_sampling(path, known.sampling)
    if told:
        level = given.get("noise_level", settings.noise_level)
        settings = settings.at_noise(known.noise_range or ((level, level) if level else None))
    # Label frequencies were those of the run's data, which a file does not carry.
    if settings.labels == "training":
        settings = settings.model_copy(update={"labels": "balanced"})
        if file.config.num_classes and "labels" not in given:
            log("balanced labels: the file does not hold the label frequencies of its training data")
    if settings.denoise is None:
        settings = settings.model_copy(update={"denoise": 1.0 if noise_std else 0.0})
    resolved = ResolvedSampling(settings).with_changes(**{**given, "noise_std": noise_std})
    if not measured:
        check_noise(resolved, file.config, known.noise_range)
    check_guidance(resolved, file.config, known.label_dropout)
    if resolved.settings.guidance and file.config.num_classes and known.label_dropout is None:
        log(
            f"note: {path} does not say whether it was trained with label dropout (train.label_dropout); if not, "
            "guidance is meaningless"
        )
    return resolved


def level_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Given settings, where a standard deviation of the noise means the level at which a model is sampled that is told it.

    Raises EvaluationError where both are given, and for a level that is none.
    """
    settings = dict(given)
    if "noise_std" not in settings:
        return settings
    level = settings.pop("noise_std")
    if settings.setdefault("noise_level", level) != level:
        raise EvaluationError(
            f"noise_std={level} and noise_level={settings['noise_level']} are two names of one level: give one of the two"
        )
    if level == 0:
        raise EvaluationError(
            "the noise level 0 (noise_std, --noise-std): the levels of a model that is told them are above 0"
        )
    return settings


def changed_sampling(sampling: ResolvedSampling, settings: Mapping[str, Any], told: bool) -> ResolvedSampling:
    """Sampling settings with changes, where `noise_std` is the level of a model that is told it.

    Raises EvaluationError for the noise of one that is not, which was decided when it was loaded.
    """
    if "noise_std" in settings and not told:
        raise EvaluationError(
            f"noise_std={settings['noise_std']} is the noise that these weights were trained on, which does not change; "
            "where they do not record it, give it to tarflow.load"
        )
    return sampling.with_changes(**level_of(settings))


def _noise_std(path: Path, known: float | None, given: Mapping[str, Any]) -> float:
    asked = given.get("noise_std")
    if known is None:
        if asked is not None:
            return float(asked)
        if given.get("denoise") == 0:
            return 0.0
        raise EvaluationError(
            f"{'--denoise' if given.get('denoise') else 'sampling'} needs --noise-std: {path} does not say its training noise, "
            "which denoising removes from samples. Give its standard deviation, or 0 for a model that needs no denoising"
        )
    if asked is not None and asked != known:
        raise EvaluationError(
            f"--noise-std {asked:g}, but {path} was trained with {known:g}: leave the option out (--denoise M removes more "
            "or less of it)"
        )
    return known


def stored_sampling(path: Path, stored: Mapping[str, Any] | None) -> SamplingSettings:
    """The sampling settings in a weights file, or the defaults if it holds none. `path` is for the message."""
    try:
        return SamplingSettings.model_validate(dict(stored or {}))
    except ValidationError as error:
        raise EvaluationError(f"{path} holds sampling settings that this version does not know: {error}") from None


def describe_file(path: Path, file: WeightsFile) -> str:
    """What a weights file holds, as a line for the terminal."""
    if not file.by_shapes:
        stored = stored_sampling(path, file.provenance.sampling).model_dump(exclude_defaults=True)
        sampling = f"; sampled with {', '.join(f'{key}={value}' for key, value in stored.items())}" if stored else ""
        return plain(f"{path}: {file.provenance}{sampling}", 5000) + file.caveat
    c = file.config
    layers = "-".join(map(str, c.layers)) if isinstance(c.layers_per_block, tuple) else c.layers_per_block
    words = {
        "head_channels": f"attention heads of {c.head_channels} channels",
        "soft_clip": "no soft clip",
        "scale": "scales by exp",
        "input_scale": "images not scaled",
    }
    assumed = ", ".join(words[key] for key in file.inferred["assumed"])
    stated = ", ".join(f"{key}={value}" for key, value in file.stated.items())
    return (
        f"{path}: published layout; from its shapes {shown(c.image_size)} pixels, patches of {c.patch_size}, "
        f"{c.channels} channels, {c.num_blocks} blocks of {layers} layers, {c.num_classes} classes"
        + (f"; assumed as published: {assumed}" if assumed else "")
        + (f"; as stated: {stated}" if stated else "")
        + file.caveat
    )
