"""The configuration of a run as typed sections: every field has a type, bounds and an effect.

A run is configured by one YAML file and `section.key=value` overrides. Scalars are read as text and converted by the
field's type, so `1e-4` is a number, `010` is ten and `on` is true wherever it stands.

The sections of the trainer are here, the others beside the code that reads them.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.models.config import TarFlowConfig
from tarflow.models.float32 import Precision
from tarflow.models.presets import preset
from tarflow.models.provenance import NoiseDistribution, Weighting
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.settings import MOST_IMAGES, MOST_SECONDS, MOST_SEED, Count, Section, first_reason
from tarflow.trainer.config.ema import EMAConfig
from tarflow.trainer.config.evaluation import EvaluationConfig
from tarflow.trainer.config.parallel import ActivationCheckpointConfig, CompileConfig, ParallelConfig
from tarflow.trainer.config.products import log_normal_problem, oversized

MOST_BATCH = 1 << 24
MOST_TRACED = 100  # steps: a trace holds every operation, about a megabyte for each step
Level = Annotated[float, Field(ge=1e-4, le=100)]  # of noise: a standard deviation in model range
Image = Annotated[Count, Field(ge=0, le=MOST_IMAGES)]  # by its position in the run


class TrainConfig(Section):
    """What to train on: batches, noise, length of the run, and when to give up."""

    seed: Count = Field(
        0,
        ge=0,
        le=MOST_SEED,
        description="seed of all randomness: initialization, data order, noise, label dropout. Runs with the "
        "same seed and data see the same batches on any number of ranks",
    )
    global_batch_size: Count = Field(
        gt=0, le=MOST_BATCH, description="images per optimizer step, over all ranks; must be divisible by their number"
    )
    micro_batch_size: Count = Field(
        0,
        ge=0,
        le=MOST_BATCH,
        description="images per forward and backward pass on each rank; lower it when activations do not fit "
        "in memory. 0 = the rank's whole share, without gradient accumulation",
    )
    max_images: Count = Field(
        gt=0,
        le=MOST_IMAGES,
        description="length of the run in training images; the run ends with the step that reaches it",
    )
    noise: Literal["gaussian", "uniform"] = Field(
        "gaussian",
        description="noise added to the images: gaussian for sample quality, uniform (dequantization) for "
        "likelihoods in bits per dimension",
    )
    noise_std: float = Field(
        0.05,
        ge=0,
        le=100,
        description="standard deviation of the gaussian noise, where pixel values span [-1, 1]. The paper "
        "uses 0.05 at 64 px, 0.15 at 128 and 256",
    )
    noise_range: tuple[Level, Level] | None = Field(
        None,
        description="[t0, t1], for a model with noise_conditioning: each image gets gaussian noise of its own standard "
        "deviation between the two. Takes the place of noise_std; null = the same noise for all images",
    )
    noise_distribution: NoiseDistribution = Field(
        "uniform",
        description="distribution of noise levels t over noise_range: uniform; squared_uniform = t^2 is uniform; log_normal = "
        "log t is normal (noise_log_normal), cut off at the ends",
    )
    noise_log_normal: tuple[Annotated[float, Field(ge=-20, le=20)], Annotated[float, Field(ge=0.01, le=20)]] = Field(
        (-1.2, 1.0), description="mean and standard deviation of log t with noise_distribution=log_normal"
    )
    loss_weight: Weighting = Field(
        "level",
        description="weight of an image's loss at noise level t, with noise_range: level = t, as published; level_squared = "
        "t^2; none = 1",
    )
    label_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="fraction of labels replaced by `no label`, so that the model can be sampled with "
        "classifier-free guidance; set it to 0 for unconditional models",
    )
    skip_spikes: bool = Field(
        False,
        description="skip optimizer steps whose gradient norm is more than six standard deviations above the "
        "mean of the last 128; worth having in long runs",
    )
    max_skipped_in_a_row: Count = Field(
        20,
        gt=0,
        le=10**6,
        description="consecutive skipped steps (not finite, or spikes) after which the run stops as diverged",
    )
    skip_images: tuple[tuple[Image, Image], ...] = Field(
        (),
        max_length=1000,
        description="ranges [first, end) of images_seen to skip without training, e.g. [[1000, 2000]], to get "
        "past data that makes a run diverge",
    )
    max_restarts_without_progress: Count = Field(
        5,
        ge=0,
        le=10**6,
        description="consecutive restarts without a new checkpoint after which the run refuses to start; 0 = no limit",
    )
    grad_clip: float = Field(
        0.0, ge=0, le=1e9, description="maximum global gradient norm; 0 = no clipping. The presets use 1.0"
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="compute dtype of the forward and backward pass; master weights and optimizer state are "
        "always float32",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto",
        description="device to train on; auto takes cuda if available, otherwise mps, otherwise cpu, but not the cpu where a "
        "job, Slurm or CUDA_VISIBLE_DEVICES asks for a GPU",
    )
    deterministic: bool = Field(
        False,
        description="use only deterministic GPU kernels, so that a run repeats bit for bit (CPU runs always "
        "do); slower",
    )
    matmul_precision: Precision = Field(
        "highest",
        description="internal precision of float32 matrix products (torch.set_float32_matmul_precision): highest is "
        "float32; high and medium are faster on GPUs (TensorFloat32) and change the results slightly",
    )
    gc_every_steps: Count = Field(
        0,
        ge=0,
        le=10**6,
        description="collect Python garbage every N steps, on all ranks at the same step; try 50 to 1000 if single ranks "
        "stall now and then. 0 = whenever Python decides",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_noise(cls, value: Any) -> Any:
        """With a range of levels there is no one level, unless somebody sets it: then `_noise_fits` refuses."""
        if isinstance(value, dict) and value.get("noise_range") is not None and "noise_std" not in value:
            return value | {"noise_std": 0.0}
        return value

    @model_validator(mode="after")
    def _noise_fits(self) -> "TrainConfig":
        if self.noise_range is None:
            for name in ("noise_distribution", "noise_log_normal", "loss_weight"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"train.{name} needs train.noise_range=[t0, t1]: without it, all images have the noise of "
                        "train.noise_std"
                    )
            return self
        low, high = self.noise_range
        shown = f"train.noise_range=[{low:g}, {high:g}]"
        if low >= high:
            raise ValueError(f"{shown} must be [t0, t1] with t0 below t1")
        if self.noise == "uniform":
            raise ValueError(f"{shown} needs train.noise=gaussian, got train.noise=uniform, which has no levels")
        if self.noise_distribution == "log_normal":
            if problem := log_normal_problem(self.noise_range, self.noise_log_normal):
                raise ValueError(problem)
        elif self.noise_log_normal != type(self).model_fields["noise_log_normal"].default:
            raise ValueError(
                f"train.noise_log_normal={list(self.noise_log_normal)} needs train.noise_distribution=log_normal, got "
                f"train.noise_distribution={self.noise_distribution}"
            )
        if self.noise_std:
            raise ValueError(
                f"{shown} and train.noise_std={self.noise_std:g} are two settings of the same noise: leave one of them out "
                "(train.noise_std=0, or train.noise_range=null)"
            )
        return self

    @model_validator(mode="after")
    def _ranges(self) -> "TrainConfig":
        for first, end in self.skip_images:
            if not 0 <= first < end:
                raise ValueError(
                    f"train.skip_images: a range is [first, end) with 0 <= first < end, got [{first}, {end}]"
                )
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW and its schedule: linear warmup to lr, then a cosine to final_lr at train.max_images."""

    lr: float = Field(1e-4, gt=0, le=1e9, description="peak learning rate, reached at the end of the warmup")
    final_lr: float = Field(
        1e-6, ge=0, le=1e9, description="learning rate at the end of the cosine, at train.max_images"
    )
    warmup_images: Count = Field(
        0, ge=0, le=MOST_IMAGES, description="length of the linear warmup in images; 0 = one epoch"
    )
    weight_decay: float = Field(1e-4, ge=0, le=1e6, description="decoupled weight decay of AdamW")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's decay rates of the first and second moments")


class CheckpointConfig(Section):
    """When to save checkpoints and which to keep."""

    every_images: Count = Field(
        0, ge=0, le=MOST_IMAGES, description="images between checkpoints; 0 = only one at the end"
    )
    every_minutes: float = Field(
        0,
        ge=0,
        le=MOST_SECONDS / 60,
        description="also save when this many minutes have passed since the last checkpoint; 0 = off",
    )
    asynchronous: bool = Field(
        True,
        description="write checkpoints in the background: training blocks only while the state is copied to "
        "host memory",
    )
    max_failures: Count = Field(3, gt=0, le=10**6, description="consecutive failed saves after which the run stops")
    keep_latest: Count = Field(
        2, ge=-1, le=10**6, description="number of newest checkpoints to keep: at least 2, or -1 for all"
    )
    keep_every_images: Count = Field(
        0,
        ge=0,
        le=MOST_IMAGES,
        description="also keep, forever, the first checkpoint at or after each multiple of this many images; 0 = none",
    )

    @model_validator(mode="after")
    def _safe(self) -> "CheckpointConfig":
        if self.keep_latest in (0, 1):
            raise ValueError(
                f"checkpoint.keep_latest={self.keep_latest}: 2 at least (the last one may be in the making), or -1 for all"
            )
        return self


class LogConfig(Section):
    """How often metrics are logged, and where."""

    every_steps: Count = Field(
        50, gt=0, le=10**9, description="steps between log lines of metrics; metrics are averages over these steps"
    )
    tensorboard: bool = Field(True, description="also write metrics to tensorboard/ in the run directory")
    wandb: Literal["disabled", "offline", "online"] = Field(
        "disabled",
        description="Weights & Biases: disabled; offline = files in wandb/ in the run directory, which `wandb sync` sends; "
        "online = sent while training (settings, metrics, sample grids). Needs `pip install 'tarflow[wandb]'`",
    )
    wandb_project: str = Field(
        "tarflow", min_length=1, max_length=128, pattern=r"^[^/\\#?%:\x00-\x1f]*$",
        description="W&B project that the run is logged to",
    )  # fmt: skip
    wandb_entity: str | None = Field(
        None, min_length=1, max_length=128, pattern=r"^[^/\\#?%:\x00-\x1f]*$",
        description="W&B user or team that owns the project; null = the default of the account",
    )  # fmt: skip


class ProfileConfig(Section):
    """A torch.profiler trace of a few steps: every rank writes one to RUN/traces/. It slows these steps only."""

    start_step: Count = Field(
        10, gt=0, le=10**12, description="first step to trace; step 1 includes compilation and warmup"
    )
    end_step: Count = Field(0, ge=0, le=10**12, description="last step to trace, at most 100 in all; 0 = no trace")

    @model_validator(mode="after")
    def _few(self) -> "ProfileConfig":
        last = self.start_step + MOST_TRACED - 1
        if self.end_step and not self.start_step <= self.end_step <= last:
            raise ValueError(
                f"profile.end_step={self.end_step} must be between profile.start_step={self.start_step} and {last} (a trace "
                f"takes {MOST_TRACED} steps at most), or 0 for no trace"
            )
        return self


def _expand_preset(value: Any) -> Any:
    """`model: {preset: NAME, num_classes: 3}` is the preset with some settings replaced."""
    if isinstance(value, dict) and "preset" in value:
        return preset(value["preset"]).model_dump() | {k: v for k, v in value.items() if k != "preset"}
    return value


class Config(Section):
    """The configuration of a run: one section for each concern."""

    data: DataSettings
    model: Annotated[TarFlowConfig, BeforeValidator(_expand_preset)]
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    activation_checkpoint: ActivationCheckpointConfig = ActivationCheckpointConfig()
    compile: CompileConfig = CompileConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    sampling: SamplingSettings = SamplingSettings()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        weights = self.evaluation.weights
        if weights not in ("auto", "raw", *self.ema.names):
            raise ValueError(
                f"evaluation.weights={weights!r}: choose auto, raw or one of {', '.join(self.ema.names) or '(none is kept)'}"
            )
        if self.train.noise == "uniform" and self.sampling.denoise:
            raise ValueError(
                "sampling.denoise needs train.noise=gaussian: without gaussian noise there is nothing to remove"
            )
        if problem := self._noise_problem() or self.sampling.blocks_problem(self.model.num_blocks):
            raise ValueError(problem)
        if problems := list(oversized(self)):
            raise ValueError("; ".join(problems))
        for variant in self.evaluation.variants:
            try:
                self.with_variant(variant)
            except ValidationError as error:
                known = "weights, " + ", ".join(SamplingSettings.model_fields)
                where = ".".join(map(str, error.errors()[0]["loc"]))
                reason = f"{where} {first_reason(error)}".lstrip()
                raise ValueError(f"evaluation.variants: {variant}: {reason}; a variant takes {known}") from None
        return self

    def _noise_problem(self) -> str | None:
        """Where the noise of training, the model that is told it or not, and the sampling contradict each other, or None."""
        conditioned, bounds, measured = (
            self.model.noise_conditioning, self.train.noise_range, self.evaluation.likelihood_noise,
        )  # fmt: skip
        if conditioned and bounds is None:
            return (
                "model.noise_conditioning=true needs train.noise_range=[t0, t1], such as [0.01, 0.3]: at a single noise level "
                "(train.noise_std) there is nothing to tell the model"
            )
        if bounds is not None and not conditioned:
            return (
                f"train.noise_range=[{bounds[0]:g}, {bounds[1]:g}] needs model.noise_conditioning=true: a model that is not "
                "told the noise level of an image would learn the mixture of all levels"
            )
        if measured is not None and (bounds is None or not bounds[0] <= measured <= bounds[1]):
            why = (
                "model.noise_conditioning=true"
                if bounds is None
                else f"a level in train.noise_range=[{bounds[0]:g}, {bounds[1]:g}]"
            )
            return f"evaluation.likelihood_noise={measured:g} needs {why}"
        return self.sampling.noise_problem(conditioned, bounds)

    @property
    def resolved_sampling(self) -> SamplingSettings:
        """The section `sampling` with what it leaves to the training noise: levels, and whether there is denoising."""
        found = self.sampling.at_noise(self.train.noise_range)
        return found.model_copy(update={"denoise": self.denoise_multiplier})

    @property
    def likelihood_noise(self) -> float:
        """Standard deviation of the gaussian noise under which held-out images are measured."""
        if self.train.noise_range is None:
            return self.train.noise_std
        return self.evaluation.likelihood_noise or self.train.noise_range[0]

    def with_variant(self, variant: dict[str, Any]) -> "Config":
        """The configuration with one entry of `evaluation.variants` replacing the run's own settings."""
        return self.changed(
            sampling={key: value for key, value in variant.items() if key != "weights"},
            evaluation={"variants": (), "weights": variant.get("weights", self.evaluation.weights)},
        )

    def changed(self, **sections: dict[str, Any]) -> "Config":
        """A copy with other values of settings, by section; raises pydantic's ValidationError where they do not go together."""
        tree = self.model_dump() | {"data": self.data}  # itself: it knows whose code may be imported
        return Config.model_validate(tree | {name: tree[name] | values for name, values in sections.items()})

    @property
    def evaluated_weights(self) -> str:
        """The weights to evaluate, with `auto` resolved; a name that the run does not keep was refused before."""
        if self.evaluation.weights != "auto":
            return self.evaluation.weights
        return self.ema.preferred

    @property
    def denoise_multiplier(self) -> float:
        """Multiplier of the denoising step, with null resolved; a flow trained on uniform noise has no such step."""
        default = 1.0 if self.train.noise == "gaussian" else 0.0
        return default if self.sampling.denoise is None else self.sampling.denoise
