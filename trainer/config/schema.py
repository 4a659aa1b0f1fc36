"""The whole configuration of a run, typed: every field has a type, a bound and an effect.

A run is configured by one YAML file and `section.key=value` overrides. Scalars are read as text and converted by the
field's type, so `1e-4` is a number, `010` is ten and `on` is true wherever it stands.

Each section stands with the code that reads it: here are those of the trainer.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.models.config import MOST_LAYERS, TarFlowConfig
from tarflow.models.presets import preset
from tarflow.models.sampling.settings import SamplingSettings
from tarflow.settings import MOST_IMAGES, MOST_SECONDS, MOST_SEED, Count, Section
from tarflow.trainer.config.ema import EMAConfig
from tarflow.trainer.config.evaluation import EvaluationConfig
from tarflow.trainer.config.products import oversized

MOST_BATCH, MOST_RANKS = 1 << 24, 1 << 20
Image = Annotated[Count, Field(ge=0, le=MOST_IMAGES)]  # by its place in the run


class TrainConfig(Section):
    """What is trained, on how many images."""

    seed: Count = Field(0, ge=0, le=MOST_SEED, description="key of all randomness")
    global_batch_size: Count = Field(gt=0, le=MOST_BATCH, description="images per step, over all ranks")
    micro_batch_size: Count = Field(
        0, ge=0, le=MOST_BATCH, description="images per forward pass and rank; 0 = the rank's whole share"
    )
    max_images: Count = Field(gt=0, le=MOST_IMAGES, description="images seen at which the run ends")
    noise: Literal["gaussian", "uniform"] = Field(
        "gaussian", description="noise on the images: for samples, or for the likelihood"
    )
    noise_std: float = Field(
        0.05, ge=0, le=100, description="standard deviation of gaussian noise, in model range (grey levels span 2)"
    )
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels replaced by `no label`, for guidance")
    skip_spikes: bool = Field(False, description="pass over steps whose gradient norm is a 6-sigma outlier")
    max_skipped_in_a_row: Count = Field(20, gt=0, le=10**6, description="bad steps in a row at which the run stops")
    skip_images: tuple[tuple[Image, Image], ...] = Field(
        (),
        max_length=1000,
        description="ranges [first, end) of images_seen that are passed over without training, e.g. [[1000, 2000]]",
    )
    max_restarts_without_progress: Count = Field(
        5,
        ge=0,
        le=10**6,
        description="restarts that commit no new checkpoint after which the run refuses to start; 0 = no limit",
    )
    grad_clip: float = Field(0.0, ge=0, le=1e9, description="largest global norm of the gradient; 0 = no clipping")
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of the network's products; masters are float32"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, else mps, else cpu")
    deterministic: bool = Field(
        False, description="on GPUs: only kernels that repeat to the last bit, as those of the CPU do"
    )

    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="float32 matrix products on GPUs: highest computes in float32, high in TF32, medium in bfloat16; "
        "changes the last digits of a run",
    )
    gc_every_steps: Count = Field(
        0,
        ge=0,
        le=10**6,
        description="steps between garbage collections, on all ranks at the same step; 0 leaves them to Python. Set it to "
        "1000 or so when single ranks stall",
    )

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
    """AdamW and its schedule: linear warm-up, then a cosine down to final_lr at train.max_images."""

    lr: float = Field(1e-4, gt=0, le=1e9, description="highest learning rate")
    final_lr: float = Field(1e-6, ge=0, le=1e9, description="learning rate at the end of the cosine")
    warmup_images: Count = Field(0, ge=0, le=MOST_IMAGES, description="images of the linear warm-up; 0 = one epoch")
    weight_decay: float = Field(1e-4, ge=0, le=1e6, description="AdamW's decoupled decay")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's moment decays")


class ParallelConfig(Section):
    """How a step is spread over processes. None of it changes the result."""

    backend: Literal["ddp", "fsdp2", "deepspeed"] = Field(
        "ddp", description="ddp: whole copies; fsdp2, deepspeed: sharded"
    )
    world_size: Count = Field(
        0, ge=0, le=MOST_RANKS, description="processes that this configuration is made for; 0 = any number"
    )
    dp_replicate: Count = Field(0, ge=0, le=MOST_RANKS, description="copies of the model; 0 = what is left")
    dp_shard: Count = Field(0, ge=0, le=MOST_RANKS, description="pieces that fsdp2 cuts a copy into; 0 = what is left")
    zero_stage: Count = Field(
        3, ge=1, le=3, description="deepspeed: 1 shards moments, 2 also gradients, 3 also weights"
    )
    layers_per_unit: Count = Field(
        0,
        ge=0,
        le=MOST_LAYERS,
        description="fsdp2: transformer layers that are gathered and summed at a time; 0 = a whole block's",
    )
    offload_optimizer: bool = Field(False, description="deepspeed: keep the optimizer's state in host memory")
    reduce_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of gradients as they are summed")
    start_timeout_s: float = Field(1800, gt=0, le=MOST_SECONDS, description="longest start, save or end")
    step_timeout_s: float = Field(600, gt=0, le=MOST_SECONDS, description="longest step, the first one apart")


class ActivationCheckpointConfig(Section):
    """What the forward pass keeps for the backward pass. None of it changes the gradients."""

    mode: Literal["none", "selective", "full"] = Field("none", description="none: all; full: each layer's input alone")
    every_nth_layer: Count = Field(
        0, ge=0, le=MOST_LAYERS, description="selective: checkpoint each n-th layer; 0 = keep products by policy"
    )
    offload: bool = Field(False, description="full: keep the inputs in host memory")

    @model_validator(mode="after")
    def _fits(self) -> "ActivationCheckpointConfig":
        if self.offload and self.mode != "full":
            raise ValueError(f"activation_checkpoint.offload needs mode=full, got mode={self.mode}")
        if self.every_nth_layer and self.mode != "selective":
            raise ValueError(f"activation_checkpoint.every_nth_layer needs mode=selective, got mode={self.mode}")
        return self


class CompileConfig(Section):
    """torch.compile of the transformer layers."""

    enable: bool = Field(False, description="compile each layer; one graph serves all")


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_images: Count = Field(0, ge=0, le=MOST_IMAGES, description="images between checkpoints; 0 = only at the end")
    every_minutes: float = Field(
        0, ge=0, le=MOST_SECONDS / 60, description="save also when this much time has passed; 0 = off"
    )
    asynchronous: bool = Field(
        True, description="write beside the training, which waits only for a copy in host memory"
    )
    max_failures: Count = Field(3, gt=0, le=10**6, description="saves that fail in a row at which the run stops")
    keep_latest: Count = Field(2, ge=-1, le=10**6, description="newest checkpoints to keep (2 at least; -1 = all)")
    keep_every_images: Count = Field(
        0, ge=0, le=MOST_IMAGES, description="keep for ever the first at or after each multiple of this; 0 = none"
    )

    @model_validator(mode="after")
    def _safe(self) -> "CheckpointConfig":
        if self.keep_latest in (0, 1):
            raise ValueError(
                f"checkpoint.keep_latest={self.keep_latest}: 2 at least (the last one may be in the making), or -1 for all"
            )
        return self


class LogConfig(Section):
    """What is written while the run goes on."""

    every_steps: Count = Field(50, gt=0, le=10**9, description="steps between lines of metrics")
    tensorboard: bool = Field(True, description="write tensorboard/ beside metrics.jsonl")


class ProfileConfig(Section):
    """A torch.profiler trace of a few steps, written to RUN/traces/ by every rank. Changes no result."""

    start_step: Count = Field(10, gt=0, le=10**12, description="first step of the trace")
    end_step: Count = Field(
        0, ge=0, le=10**12, description="last step of the trace, at most 100 steps in all; 0 = no trace"
    )

    @model_validator(mode="after")
    def _few(self) -> "ProfileConfig":
        if self.end_step and not self.start_step <= self.end_step < self.start_step + 100:
            raise ValueError(
                f"profile.end_step={self.end_step}: from profile.start_step={self.start_step} to 99 steps later, or 0 for no "
                "trace"
            )
        return self


def _expand_preset(value: Any) -> Any:
    """`model: {preset: NAME, num_classes: 3}` is the preset with these settings replaced."""
    if isinstance(value, dict) and "preset" in value:
        return preset(value["preset"]).model_dump() | {k: v for k, v in value.items() if k != "preset"}
    return value


class Config(Section):
    """Everything about a run."""

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
                "sampling.denoise needs train.noise=gaussian: without its noise there is nothing to take out"
            )
        if problems := list(oversized(self)):
            raise ValueError("; ".join(problems))
        for variant in self.evaluation.variants:
            try:
                self.with_variant(variant)
            except ValidationError as error:
                known = "weights, " + ", ".join(SamplingSettings.model_fields)
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise ValueError(
                    f"evaluation.variants: {variant}: {where} {first['msg']}; a variant takes {known}"
                ) from None
        return self

    def with_variant(self, variant: dict[str, Any]) -> "Config":
        """The configuration with one entry of `evaluation.variants` in place of the run's own settings."""
        tree = self.model_dump()
        tree["sampling"] |= {key: value for key, value in variant.items() if key != "weights"}
        tree["evaluation"] |= {"variants": (), "weights": variant.get("weights", self.evaluation.weights)}
        return Config.model_validate(tree)

    @property
    def evaluated_weights(self) -> str:
        """The set of weights that evaluation uses: never a silent fallback."""
        if self.evaluation.weights != "auto":
            return self.evaluation.weights
        return self.ema.preferred

    @property
    def denoise_multiplier(self) -> float:
        """Denoising step of samples; a flow trained on uniform dequantisation noise has none."""
        default = 1.0 if self.train.noise == "gaussian" else 0.0
        return default if self.sampling.denoise is None else self.sampling.denoise
