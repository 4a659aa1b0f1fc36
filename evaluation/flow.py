"""Trained weights for use from Python: samples, exact likelihoods, latents."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow.evaluation.batches import DENOISING, LIKELIHOOD, SAMPLING, Batches
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.given import Images, Labels, checked_images, images_in_model_range, label_numbers, labels_of
from tarflow.evaluation.likelihood.images import open_images
from tarflow.evaluation.likelihood.per_image import ImageLikelihoods, likelihoods
from tarflow.evaluation.log import Log, no_log
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings
from tarflow.evaluation.samples.draw import NO_LABEL, SampleCount, Sampler, check_guidance, check_noise, levels_of
from tarflow.evaluation.samples.file_sampling import changed_sampling
from tarflow.evaluation.samples.labels import given_names
from tarflow.evaluation.samples.request import SourceRequest, batches_of, open_request
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.variations.best_of import choose_best_of
from tarflow.evaluation.samples.variations.path import End, PathSampler, path_between, settings_of_path
from tarflow.evaluation.samples.weights_source import WeightsSource, levels_for
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import denoising_bytes, likelihood_bytes
from tarflow.models.denoise import denoise, denoise_in_steps, flow_score
from tarflow.models.float32 import TRUE_FLOAT32, products
from tarflow.models.flow import TarFlow
from tarflow.models.formats.card import card_text
from tarflow.models.likelihood import bits_per_dim, log_likelihood
from tarflow.models.provenance import Provenance
from tarflow.models.sampling.sequential import UNGUIDED, sample
from tarflow.terminal import plain


def load(
    source: str | Path,
    weights: str | None = None,
    *,
    images: int | None = None,
    step: int | None = None,
    device: str = "auto",
    model: str | None = None,
    classes: Sequence[str] | str | Path | None = None,
    batch_size: int | None = None,
    log: Log = no_log,
    **settings: Any,
) -> "Flow":
    """Load the flow of a run directory, of a weights file (.safetensors, .pth), or of a folder with model.safetensors.

    Args:
        source: a run directory, a weights file, or a folder that holds one.
        weights: for a run, "raw" or an average such as "ema-0.100"; None: the one that its evaluations use.
        images: for a run, the checkpoint at that number of images; None: the newest.
        step: the same by optimizer steps.
        device: "auto", "cpu", "cuda" or "mps".
        model: for a weights file that does not hold its architecture: a preset, or "key=value,...".
        classes: names of the classes by label, or a JSON file of them, where neither run nor file holds them.
        batch_size: images at a time; None: `sampling.batch_size`. No result depends on it, but for rounding.
        log: receives a line for each thing that was inferred; `print` shows them.
        settings: override the sampling settings (`guidance`, `attn_temp`, `denoise`, `seed`, `param_dtype`, ...; all are in
            the section `sampling` of a configuration). `noise_std` is needed for a file that does not record it; of a model
            that is told the noise level, it is the level at which it is sampled and measured.

    Raises:
        TrainerError: there is no such run or checkpoint, or it is damaged.
        ModelError: there is no such weights file, or it is damaged or not of this architecture.
        EvaluationError: a setting has no meaning for these weights.

    """
    request = SourceRequest(
        source=Path(source), step=step, images=images, weights=weights, device=device, model=model, settings=settings,
        batch_size=batch_size,
    )  # fmt: skip
    if batch_size is not None and batch_size < 1:
        raise EvaluationError(f"batch_size={batch_size}: at least one image has to be taken at a time")
    found, sampling, size = open_request(request, log)
    if found.told and "noise_std" in settings:
        found.likelihood_noise = found.level(settings["noise_std"])
    if classes is not None:
        known = found.provenance.classes
        given = Path(classes) if isinstance(classes, str) else classes
        names = given_names(given, known, found.model.config.num_classes, str(source), "classes")
        found.provenance = found.provenance.model_copy(update={"classes": names and tuple(names)})
    if found.checkpoint:
        log(plain(f"{found.origin}: {found.provenance}", 5000))
    # What evaluations of the run found out is used; what happens beside other work in this program is not noted there.
    return Flow(found, sampling, size, batches_of(request, found, keep=False))


class Flow:
    """A trained flow. Its network runs in float32 on `device`; results come back on the CPU.

    Images go in as uint8 [N, C, H, W] (0..255) or as floats [N, C, H, W] in model range [-1, 1]. Labels are class numbers,
    class names, or None (no label): one for all images, or one for each.
    """

    def __init__(
        self, source: WeightsSource, sampling: ResolvedSampling, batch_size: int, memory: Batches | None = None
    ) -> None:
        self.source, self.sampling, self.batch_size = source, sampling, batch_size
        self._memory = memory or Batches(source.model.var.device)

    @property
    def model(self) -> TarFlow:
        """The network, a torch module: images [N, C, H, W] -> (z [N, T, D], log-determinant per dimension [N])."""
        return self.source.model

    @property
    def config(self) -> TarFlowConfig:
        """The architecture."""
        return self.model.config

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes by label; None where they are not known or there are none."""
        return self.source.provenance.classes

    @property
    def provenance(self) -> Provenance:
        """How the weights were trained, as far as known."""
        return self.source.provenance

    @property
    def card(self) -> str:
        """The model card, in Markdown: architecture, training, sampling defaults and classes, as far as recorded."""
        return card_text(self.config, self.provenance)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.var.device

    def sample(self, num: int, labels: Labels = (), *, first: int = 0, best_of: int = 1, **settings: Any) -> Tensor:
        """Draw `num` images, uint8 [num, C, H, W], guided and denoised by `sampling`, which `settings` override.

        `labels`: image i gets labels[i % len(labels)]; without any, classes take turns. `first`: the number of the first
        image; image i depends on its number and the seed alone, so that `sample(2)` and `sample(1, first=1)` agree.
        `best_of`: of so many candidates for each image the one of highest log p(x | label), before denoising, unguided.

        Raises:
            EvaluationError: settings or labels without meaning for this model, or an image that is not finite.

        """
        if num < 0:
            raise EvaluationError(f"sample({num}): the number of images cannot be below 0")
        changed = changed_sampling(self.sampling, settings, self.source.told)
        if given := self._labels(labels):
            changed = changed.with_changes(labels=given)
        check_guidance(changed, self.config, self.provenance.label_dropout)
        check_noise(changed, self.config, self.provenance.noise_range)
        sampler = choose_best_of(self.model, changed, best_of, self._memory, "best_of={}", "temperature=0")
        return self._drawn(sampler, range(first, first + num))

    def _drawn(self, sampler: Sampler, indices: range) -> Tensor:
        count, pixels = SampleCount(), [torch.empty(0, *self.config.image_shape, dtype=torch.uint8)]
        given, usual = sampler.sampling.settings.batch_size, self.sampling.settings.batch_size
        for drawn in sampler.draw_all(indices, self.batch_size if given == usual else given):
            count.add(drawn)
            pixels.append(drawn.pixels())
        if problem := count.problem(0.0):
            raise EvaluationError(problem)
        return torch.cat(pixels)

    def interpolate(
        self, a: int | Images, b: int | Images, steps: int = 8, label: str | int | None = None, **settings: Any
    ) -> Tensor:
        """Images uint8 [steps, C, H, W] on the spherical path in z from a to b, both included, under one label.

        An end is an image, uint8 [C, H, W] or floats in [-1, 1], or a seed, whose `sample(1, label, seed=...)` it is. A path
        from or to an image is neither guided nor denoised, and ends at that image. `settings` override `sampling`.

        Raises:
            EvaluationError: settings without meaning on this path, or an image of it that is not finite.

        """
        ends = [self._end(end, name) for end, name in ((a, "a"), (b, "b"))]
        changed = settings_of_path(changed_sampling(self.sampling, settings, self.source.told), ends, settings)
        changed = changed.with_changes(labels=self._labels(label) if self.config.num_classes else ())
        check_guidance(changed, self.config, self.provenance.label_dropout)
        sampler = PathSampler(self.model, changed, path_between(self.model, ends, changed, steps), self._memory)
        return self._drawn(sampler, range(steps))

    def _end(self, end: int | Images, name: str) -> End:
        if isinstance(end, int):
            return End(f"seed {end}", seed=end)
        return End(name, image=images_in_model_range(torch.as_tensor(end)[None], self.config.image_shape)[0])

    def log_prob(
        self,
        images: Images,
        labels: Labels = None,
        *,
        draws: int = 1,
        seed: int | None = None,
        first: int = 0,
        noise_level: float | None = None,
    ) -> Tensor:
        """Exact log p(x | label) of each image in nats, float64 [N]: the density in model range.

        uint8 images get the noise that the flow was trained on, keyed by (seed, draw, number of the image, counted from
        `first`), and the mean over `draws` of it is returned. Floats are taken as they are: they already contain theirs.
        `noise_level`: of a flow that is told it, the level of that noise; None: that of `load`, or else the one at which its
        evaluations measure.
        """
        return self._mean_over_draws(log_likelihood, images, labels, draws, seed, first, noise_level)

    def bits_per_dim(
        self,
        images: Images,
        labels: Labels = None,
        *,
        draws: int = 1,
        seed: int | None = None,
        first: int = 0,
        noise_level: float | None = None,
    ) -> Tensor:
        """Bits per dimension of each image as 8-bit data, float64 [N]; noise as in `log_prob`.

        The mean over the images of a data set, numbered as in its index, is the figure that `tarflow evaluate` reports.
        """
        return self._mean_over_draws(bits_per_dim, images, labels, draws, seed, first, noise_level)

    def likelihoods(
        self,
        images: Images,
        labels: Labels = None,
        *,
        draws: int = 1,
        seed: int | None = None,
        first: int = 0,
        noise_level: float | None = None,
    ) -> ImageLikelihoods:
        """What `tarflow likelihood` measures of uint8 images, in bits per dimension, noise and its level as in `log_prob`.

        Its `mean` [N] is `bits_per_dim`; `bits` [N, draws] each draw's, `stderr` [N] over them; `parts` [N, 1 + blocks] what
        the prior and each block contribute; `importance_weighted(dims)` the bound over the draws.
        """
        pixels, y = checked_images(images, self.config.image_shape), self._labels_of(labels, len(images))
        noise = self._noise(draws, seed, noise_level)
        if pixels.dtype != torch.uint8:
            raise EvaluationError(
                f"likelihoods takes uint8 images, not {pixels.dtype}: log_prob takes floats as they are"
            )
        y = torch.full((len(pixels),), NO_LABEL) if y is None else y
        every = (pixels, y, torch.arange(first, first + len(pixels)))
        parts = (slice(at, at + self.batch_size) for at in range(0, len(pixels), self.batch_size))
        return likelihoods(self.model, ((every[0][i], every[1][i], every[2][i]) for i in parts), noise, self._memory)

    def images(self, data: str | Path, num: int = 0, labels: str | int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Real images at this flow's size: pixels uint8 [N, C, H, W], labels int64 [N] (-1: none), numbers int64 [N].

        Args:
            data: a data set with an index, or a folder of images.
            num: so many, spread evenly; 0: all. They are held in memory.
            labels: None or "data": those of the data set; or one class for all, by name or number; "none": no label.

        """
        label = None if labels is None else str(labels)
        found = open_images(Path(data), self.source, num, label, no_log).batches(self.batch_size, 0, 1)
        nothing = torch.empty(0, dtype=torch.int64)
        none = (torch.empty(0, *self.config.image_shape, dtype=torch.uint8), nothing, nothing)
        pixels, classes, numbers = (torch.cat(parts) for parts in zip(none, *found))
        return pixels, classes, numbers

    @torch.inference_mode()
    def encode(
        self,
        images: Images,
        labels: Labels = None,
        *,
        noisy: bool = False,
        seed: int | None = None,
        first: int = 0,
        noise_level: float | None = None,
    ) -> Tensor:
        """Images -> latents z, float32 [N, T, D], which under the model are standard normal.

        `noisy`: uint8 images get the noise of training first, keyed as in `log_prob`, without which they are not of the
        distribution that the flow was trained on. `decode` then gives the noisy images back. `noise_level`: what a flow is
        told that is told it; None: the level at which its evaluations measure.
        """
        x, y = images_in_model_range(images, self.config.image_shape), self._labels_of(labels, len(images))
        if noisy:
            pixels = checked_images(images, self.config.image_shape)
            if pixels.dtype != torch.uint8:
                raise EvaluationError(f"noisy=True is for uint8 images; {pixels.dtype} ones are taken as they are")
            x = self._noise(1, seed, noise_level).apply(pixels, list(range(first, first + len(pixels))))
        latents = [torch.empty(0, self.config.num_tokens, self.config.token_dim)]
        size, level = likelihood_bytes(self.config), self.source.level(noise_level)

        def compute(part: Tensor, label: Tensor | None) -> Tensor:
            return self.model(part, label, noise=levels_for(level, part))[0].cpu()

        return torch.cat([*latents, *self._computed(LIKELIHOOD, compute, x, y, size)])

    def decode(self, z: Tensor, labels: Labels = None, *, noise_level: float | None = None) -> Tensor:
        """Latents [N, T, D] -> images, float32 [N, C, H, W] in model range, not clipped: the inverse of `encode`, unguided."""
        shape = (self.config.num_tokens, self.config.token_dim)
        if z.ndim != 3 or tuple(z.shape[1:]) != shape:
            raise EvaluationError(f"latents must have the shape [N, {shape[0]}, {shape[1]}], not {list(z.shape)}")
        scale = self.model.var.float().sqrt()  # `sample` takes standard normal numbers
        y = self._labels_of(labels, len(z))
        images = [torch.empty(0, *self.config.image_shape)]
        settings = UNGUIDED.model_copy(update={"noise_level": self.source.level(noise_level)})

        def compute(part: Tensor, label: Tensor | None) -> Tensor:
            return sample(self.model, part.float() / scale, label, settings).cpu()

        return torch.cat([*images, *self._computed(SAMPLING, compute, z, y)])

    def denoise(self, images: Images, labels: Labels = None, *, multiplier: float = 1.0) -> Tensor:
        """One step along the score, which takes out the training noise (section 2.5 of the paper): float32 in model range.

        A flow that is told the noise level takes its samples' noise (`sampling.noise_level`) out in many steps, by the ODE.
        """
        if self.config.noise_conditioning:
            changed = self.sampling.with_changes(denoise=multiplier, denoise_stochastic=False)
            check_noise(changed, self.config, self.provenance.noise_range)
            levels = levels_of(changed.settings)

            def compute(part: Tensor, label: Tensor | None) -> Tensor:
                return denoise_in_steps(part, levels, flow_score(self.model, label)).cpu()

        else:
            std = self.provenance.noise_std or self.sampling.noise_std
            if not std:
                raise EvaluationError(
                    "denoising needs a flow trained with gaussian noise; this one's is "
                    f"{self.provenance.noise or 'not known: tarflow.load(..., noise_std=...)'}"
                )

            def compute(part: Tensor, label: Tensor | None) -> Tensor:
                return denoise(self.model, part, label, std, multiplier).detach().cpu()

        x, y = images_in_model_range(images, self.config.image_shape), self._labels_of(labels, len(images))
        clean = [torch.empty(0, *self.config.image_shape)]
        return torch.cat([*clean, *self._computed(DENOISING, compute, x, y, denoising_bytes(self.config))])

    def _labels(self, labels: Labels) -> tuple[int, ...]:
        return label_numbers(labels, self.config.num_classes, self.classes)

    def _labels_of(self, labels: Labels, num: int) -> Tensor | None:
        return labels_of(labels, num, self.config.num_classes, self.classes)

    def _mean_over_draws(
        self,
        of: Any,
        images: Images,
        labels: Labels,
        draws: int,
        seed: int | None,
        first: int,
        noise_level: float | None,
    ) -> Tensor:
        pixels, y = checked_images(images, self.config.image_shape), self._labels_of(labels, len(images))
        noise = self._noise(draws, seed, noise_level) if pixels.dtype == torch.uint8 else None
        level = self.source.level(noise_level)
        total = torch.zeros(len(pixels), dtype=torch.float64)
        for draw in range(draws if noise else 1):
            for begin in range(0, len(pixels), self.batch_size):
                part = slice(begin, begin + self.batch_size)
                ids = list(range(first, first + len(pixels)))[part]
                x = noise.apply(pixels[part], ids, draw) if noise else pixels[part].float()

                @torch.inference_mode()
                def compute(images: Tensor, label: Tensor | None) -> Tensor:
                    return of(self.model, images, label, noise=levels_for(level, images)).double().cpu()

                labelled, size = None if y is None else y[part], likelihood_bytes(self.config)
                total[part] += torch.cat(self._computed(LIKELIHOOD, compute, x, labelled, size))
        return total / (draws if noise else 1)

    def _noise(self, draws: int, seed: int | None, level: float | None) -> NoiseSettings:
        """The noise that uint8 images get. Raises EvaluationError where that of training is not known."""
        if draws < 1:
            raise EvaluationError(f"draws={draws}: at least one is needed")
        seed = self.sampling.settings.seed if seed is None else seed
        return self.source.training_noise(self.sampling.noise_std, seed, draws, level)

    def _computed(
        self,
        stage: str,
        compute: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        y: Tensor | None,
        bytes_per_image: float = 0.0,
    ) -> list[Tensor]:
        """`compute` of batches of x and labels on the device, in true float32, and in parts where memory asks for it."""
        found: list[Tensor] = []
        for start in range(0, len(x), self.batch_size):

            def one(rows: slice, start: int = start) -> Tensor:
                part = slice(start + rows.start, start + rows.stop)
                return compute(x[part].to(self.device), None if y is None else y[part].to(self.device))

            with products(TRUE_FLOAT32):
                found += self._memory.run(stage, min(self.batch_size, len(x) - start), one, bytes_per_image)
        return found
