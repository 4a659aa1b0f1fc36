"""Loads the weights to evaluate: one named set of a committed checkpoint, or a weights file.

Every result records which set it was and the hash of its tensors. A missing set is an error: to fall back on another one
would report metrics of other weights.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow.devices import asked_for_gpus, why_no_gpu
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings
from tarflow.models.flow import TarFlow
from tarflow.models.provenance import Provenance
from tarflow.models.weights import WeightsFile, check_weights, load_model
from tarflow.trainer.checkpoint.marker import Checkpoint
from tarflow.trainer.checkpoint.provenance import provenance_of
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.schema import Config


@dataclass
class WeightsSource:
    """A model ready to evaluate (float32, evaluation mode, parameters without gradients) and its origin."""

    model: TarFlow
    weights: str  # "raw", "ema-0.100", ... or "file"
    sha256: str  # of names, shapes and values
    origin: str
    step: int | None = None
    images_seen: int | None = None
    checkpoint: str | None = None  # name of the checkpoint, if it is one
    provenance: Provenance = field(default_factory=Provenance)
    likelihood_noise: float | None = (
        None  # given when it was opened: the level of its likelihoods; None: as its run has it
    )
    checked: bool = True  # False: a file without a checksum
    inferred: dict[str, Any] = field(
        default_factory=dict
    )  # what the file does not hold of its model, see `WeightsHeader`

    def describe(self) -> dict[str, Any]:
        """What a result records of its weights."""
        return {
            "weights": self.weights,
            "weights_sha256": self.sha256,
            "step": self.step,
            "images_seen": self.images_seen,
        }

    def describe_provenance(self) -> dict[str, Any]:
        """How the weights were trained, as far as known; `checked` is false if their file carries no checksum.

        `model`, `assumed` and `stated`: where the architecture came from, if the file does not hold it.
        """
        return self.provenance.describe() | ({} if self.checked else {"checked": False}) | self.inferred

    @property
    def told(self) -> bool:
        """Whether the model is told the noise level of its images."""
        return self.model.config.noise_conditioning

    def level(self, asked: float | None = None) -> float | None:
        """The noise level of images that the model is told, if it is told one: as asked for, or the one of its likelihoods.

        Raises EvaluationError for a level that the model was not trained at, for one that nobody knows, and for one that is
        asked for of a model that is told none.
        """
        if not self.told:
            if asked is not None:
                raise EvaluationError(
                    f"the noise level {asked:g} (noise_level) is for models with noise_conditioning, which are told it; "
                    f"{self.origin} was trained on one noise"
                )
            return None
        bounds = self.provenance.noise_range
        known = (asked, self.likelihood_noise, self.provenance.likelihood_noise, *(bounds or ()))
        level = next((t for t in known if t is not None), None)
        if level is None:
            raise EvaluationError(
                f"{self.origin} does not record the noise levels it was trained on, one of which its model has to be told: "
                "give it (noise_std, --noise-std)"
            )
        low, high = bounds or (0.0, math.inf)
        if not (low <= level <= high and level > 0):
            raise EvaluationError(
                f"the noise level {level:g} (noise_level, --noise-std) lies outside of those that {self.origin} was trained on"
                + (f", {low:g} to {high:g}" if bounds else ": all are above 0")
            )
        return level

    def training_noise(
        self, noise_std: float, seed: int = 0, draws: int = 1, level: float | None = None
    ) -> NoiseSettings:
        """The noise that 8-bit images get before their likelihood is taken.

        `noise_std` serves a file that does not record its noise; EvaluationError where that is unknown, too (0). `level`: at
        which noise level, of a model that is told it; see `level`.
        """
        told = self.level(level)
        if told is not None:
            return NoiseSettings("gaussian", told, seed, draws, told=True)
        if self.provenance.noise is not None:
            return NoiseSettings(self.provenance.noise, self.provenance.noise_std or 0.0, seed, draws)
        if noise_std:
            return NoiseSettings("gaussian", noise_std, seed, draws)
        raise EvaluationError(
            f"{self.origin} does not record its training noise, without which 8-bit images have no density: give its "
            "standard deviation (noise_std, --noise-std)"
        )


def levels_for(level: float | None, images: Tensor) -> Tensor | None:
    """What a model is told of the noise in each of these images [N, ...]: levels [N], or nothing."""
    return None if level is None else torch.full((len(images),), level, device=images.device)


def from_checkpoint(config: Config, checkpoint: Checkpoint, which: str, device: torch.device) -> WeightsSource:
    """One set of weights of a checkpoint ("raw", "ema-0.050", ...), for the model of the run's configuration.

    A missing set or tensors of another shape raise an error that names them.
    """
    tensors = load_weights(checkpoint, which)
    check_weights(config.model, tensors, f"checkpoint {checkpoint.path}, weights {which}")
    model = load_model(config.model, tensors).requires_grad_(False).to(device)
    known = provenance_of(checkpoint, config, which)
    place, step, images_seen = str(checkpoint.path), checkpoint.step, checkpoint.images_seen
    return WeightsSource(model, which, _digest(tensors), place, step, images_seen, checkpoint.name, known)


def from_file(path: Path, file: WeightsFile, device: torch.device) -> WeightsSource:
    """The weights of a file that was read from `path`, which is recorded as the origin."""
    model = load_model(file.config, file.tensors).requires_grad_(False).to(device)
    digest = _digest(file.tensors)
    return WeightsSource(
        model, "file", digest, str(path), provenance=file.provenance, checked=file.checked, inferred=file.inferred
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().contiguous()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def resolve_device(name: str) -> torch.device:
    """Resolve "auto", "cpu", "cuda" or "mps" on this machine. Raises EvaluationError if the device is not available.

    "auto" takes the CPU only where nothing (a job, CUDA_VISIBLE_DEVICES) asks for a GPU.
    """
    mps = torch.backends.mps.is_available()
    asked = asked_for_gpus() or ("--device cuda" if name == "cuda" else "")
    if asked and name in ("auto", "cuda") and not torch.cuda.is_available():
        raise EvaluationError(
            f"{asked}, but on node {os.uname().nodename} {why_no_gpu()}; to work on the CPU all the same, use --device cpu "
            "(a job goes by train.device of its run)"
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if name == "mps" and not mps:
        raise EvaluationError(f"device {name!r} is not available on this machine; use --device cpu or --device auto")
    return torch.device(name)
