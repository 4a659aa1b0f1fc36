"""A path between two images, or between the samples of two seeds.

It runs through the latents, in units in which the prior is standard normal. Those of high dimension lie near a sphere, and so
does the path: its directions turn at a constant rate in the plane of both (arXiv 1609.04468, section 2.1), and its length
changes in proportion,

    z(s) = |z|(s) [sin((1 - s) w) u_A + sin(s w) u_B] / sin w,   |z|(s) = (1 - s) |z_A| + s |z_B|,   0 <= s <= 1

with u the latents over their lengths and w the angle between them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.decode import decode
from tarflow.data_pipeline.images.opening import read_image
from tarflow.data_pipeline.images.transform import fit
from tarflow.evaluation.batches import Batches
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import STREAM, Sampler
from tarflow.evaluation.samples.file_sampling import level_of
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.models.config import TarFlowConfig
from tarflow.models.float32 import TRUE_FLOAT32, products
from tarflow.models.flow import TarFlow
from tarflow.models.noise import to_model_range
from tarflow.models.randomness import keyed_normal
from tarflow.models.sampling.settings import ITERATIVE
from tarflow.settings import MOST_SEED

MOST_STEPS = 10_000
_SEED = re.compile(r"-?\d{1,19}")
# What holds between images: a flow's inverse knows no guidance, images no training noise, and nothing is drawn.
OF_IMAGES: dict[str, Any] = {"guidance": 0.0, "denoise": 0.0, "temperature": 1.0}
# What only changes guidance and denoising, which such a path does not have.
WITHOUT_EFFECT = (
    "attn_temp", "annealed", "guide", "guidance_form", "guide_blocks", *(name for name in ITERATIVE if name != "noise_level"),
)  # fmt: skip


@dataclass(frozen=True)
class End:
    """One end of a path: sample 0 of a seed, or an image, float32 [C, H, W] in model range. `name`: for messages."""

    name: str
    seed: int | None = None
    image: Tensor | None = None


def is_seed(text: str) -> bool:
    """Whether an end as typed is a seed; otherwise it is a picture."""
    return _SEED.fullmatch(text) is not None


def parse_end(text: str, model: TarFlowConfig) -> End:
    """A whole number is a seed, anything else a picture, converted as training data is. Raises EvaluationError."""
    if is_seed(text):
        if abs(int(text)) > MOST_SEED:
            raise EvaluationError(f"--interpolate {text}: a seed is at most {MOST_SEED}")
        return End(f"seed {int(text)}", seed=int(text))
    if not Path(text).is_file():
        raise EvaluationError(f"--interpolate {text}: there is no such picture, and a seed is a whole number")
    try:
        pixels = fit(decode(read_image(Path(text)), model.in_channels, None), model.image_size)
    except (BadSampleError, OSError) as error:
        raise EvaluationError(f"--interpolate {text}: {error}") from None
    return End(text, image=to_model_range(torch.from_numpy(pixels.copy()).permute(2, 0, 1)))


def settings_of_path(sampling: ResolvedSampling, ends: Sequence[End], given: dict[str, Any]) -> ResolvedSampling:
    """The settings of images on a path. `given`: those that were asked for, and are not merely the source's defaults.

    Raises EvaluationError for settings that mean nothing on this path.
    """
    if "seed" in given:
        raise EvaluationError(
            f"the seed {given['seed']} (--seed) keys the noise of samples, and a path has its ends from {ends[0].name} to "
            f"{ends[1].name} (--interpolate): give one of the two"
        )
    images = [end.name for end in ends if end.image is not None]
    if not images:
        return sampling
    for key in [*OF_IMAGES, *WITHOUT_EFFECT]:
        value, neutral = given.get(key), OF_IMAGES.get(key)
        if value is not None and value != neutral:
            option, given_value = f"--{key.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else value
            raise EvaluationError(
                f"{key}={given_value} ({option}) changes samples, and a path from or to the image {images[0]} (--interpolate) "
                f"has to end there: leave {option} out"
            )
    changes = dict(OF_IMAGES)
    # Images have next to no noise: a flow that is told the level is told its lowest one, unless another was asked for.
    if sampling.settings.noise_level is not None and level_of(given).get("noise_level") is None:
        changes["noise_level"] = sampling.settings.denoise_to
    return sampling.with_changes(**changes)


def label_of_path(sampling: ResolvedSampling, model: TarFlowConfig) -> ResolvedSampling:
    """The settings with the one label of the path; EvaluationError without or with several."""
    if not model.num_classes:
        return sampling
    if len(sampling.labels) != 1:
        given = ("none is", "one is", "several are")[min(len(sampling.labels), 2)]
        raise EvaluationError(
            f"a path (--interpolate) has one label, and {given} given: --labels NAME, or --labels none for no label (the model "
            f"has {model.num_classes} classes)"
        )
    return sampling


def path_between(model: TarFlow, ends: Sequence[End], sampling: ResolvedSampling, steps: int) -> Tensor:
    """Noise [steps, T, D], standard normal under the prior, from one end to the other, on the CPU.

    Raises EvaluationError for fewer than two steps, and for an image whose latent is not finite.
    """
    if not 2 <= steps <= MOST_STEPS:
        raise EvaluationError(
            f"a path (--interpolate) has 2 to {MOST_STEPS:,} images, its ends included, and {steps} was asked for (--num)"
        )
    first, last = (_noise(model, end, sampling) for end in ends)
    return spherical(first, last, steps)


def spherical(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Points [steps, ...] from a to b, see above; float32. Straight where the ends point the same or the opposite way."""
    first, last = a.double().flatten(), b.double().flatten()
    s = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    lengths = first.norm(), last.norm()
    u, v = (x / max(float(length), 1e-300) for x, length in zip((first, last), lengths))
    angle = math.atan2(float((u - v).norm()), float((u + v).norm())) * 2  # exact for nearly equal directions, too
    if min(math.sin(angle), *map(float, lengths)) < 1e-9:
        points = (1 - s) * first + s * last
    else:
        turned = (torch.sin((1 - s) * angle) * u + torch.sin(s * angle) * v) / math.sin(angle)
        points = ((1 - s) * lengths[0] + s * lengths[1]) * turned
    points[0], points[-1] = first, last
    return points.float().view(steps, *a.shape)


@torch.inference_mode()
def _noise(model: TarFlow, end: End, sampling: ResolvedSampling) -> Tensor:
    """[T, D] in units of the prior."""
    config, device = model.config, model.var.device
    if end.image is None:
        assert end.seed is not None
        drawn = keyed_normal(end.seed, STREAM, 0, [0], (config.num_tokens, config.token_dim))[0]
        return drawn * sampling.settings.temperature
    y = torch.tensor(sampling.labels, device=device) if config.num_classes else None
    with products(TRUE_FLOAT32):
        t = sampling.settings.noise_level
        z = model(end.image[None].to(device), y, noise=None if t is None else torch.tensor([t], device=device))[0][0]
    z = (z / model.var.float().sqrt()).cpu()
    if not torch.isfinite(z).all():
        raise EvaluationError(f"the latent of {end.name} is not finite: it is no end of a path (--interpolate)")
    return z


class PathSampler(Sampler):
    """Sample i is step i of a path."""

    def __init__(
        self, model: TarFlow, sampling: ResolvedSampling, path: Tensor, batches: Batches | None = None
    ) -> None:
        super().__init__(model, sampling, batches)
        self.path = path

    def noise(self, indices: Sequence[int]) -> Tensor:
        """[n, T, D]."""
        return self.path[list(indices)]
