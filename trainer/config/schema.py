"""The whole configuration of a run, typed: every field has a type, a bound and an effect (contract 10).

A run is configured by one YAML file and `section.key=value` overrides. Scalars are read as text and converted by the
field's type, so `1e-4` is a number, `010` is ten and `on` is true wherever it stands (case K01).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tarflow.data_pipeline.storage.remote import Access, address
from tarflow.models.config import TarFlowConfig
from tarflow.models.presets import preset


def _whole_number(value: Any) -> Any:
    """Let a count be written as 270000, 270_000, 27e4 or 256Ki: whatever it is, it must be whole."""
    if not isinstance(value, str):
        return value
    text = value.strip().replace("_", "")
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30)):
        if text.endswith(suffix):
            return int(text.removesuffix(suffix)) * factor
    number = float(text)
    return int(text) if text.lstrip("+-").isdigit() else (int(number) if number == int(number) else value)


Count = Annotated[int, BeforeValidator(_whole_number)]


def _place(value: Any) -> Any:
    """A path in its plain form; addresses and pipes as they are."""
    text = str(value) if isinstance(value, Path) else value
    if not isinstance(text, str) or text.startswith("pipe:"):
        return text
    return address(text) or str(Path(text))


Place = Annotated[str, BeforeValidator(_place)]


class Section(BaseModel):
    """A group of settings: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Where the images are and how they are read."""

    train: Place = Field(
        description="indexed shards to train on (made by `tarflow data prepare`): a folder or an address; "
        "or `pipe:` and addresses of tars without an index, as streams"
    )
    validation: Place | None = Field(None, description="indexed shards of held-out images, for bits per dimension")
    reader: Literal["auto", "indexed", "mds", "stream"] = Field(
        "auto",
        description="how data.train is read: auto goes by what lies there; stream needs no index, and promises less",
    )
    cache_dir: str | None = Field(
        None, description="folder of a node's cache of remote shards; null = in the system's temporary folder"
    )
    cache_bytes: Count = Field(
        32 << 30, ge=0, description="bound of that cache; 0 = none, every sample is a request for its range"
    )
    timeout_s: float = Field(30.0, gt=0, description="seconds without a byte after which a remote request is given up")
    retries: Count = Field(5, ge=0, description="attempts after the first at a remote request")
    flip: bool = Field(False, description="mirror images left to right at random")
    num_workers: Count = Field(0, ge=0, description="decoding processes per rank; 0 = a thread of the training process")
    prefetch_batches: Count = Field(4, gt=0, description="batches that wait ready")
    num_canonical_nodes: Count = Field(1, gt=0, description="parts of the data set that are read apart from each other")
    shuffle_block: Count = Field(65536, gt=0, description="samples that are shuffled among each other")
    on_error: Literal["strict", "skip"] = Field(
        "strict", description="strict: a damaged image stops the run; skip: count and replace it"
    )
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="share of damaged images at which a run with on_error=skip stops"
    )

    @property
    def access(self) -> Access:
        """How remote data are reached."""
        return Access(self.cache_dir, self.cache_bytes, self.timeout_s, self.retries)


class TrainConfig(Section):
    """What is trained, on how many images."""

    seed: Count = Field(0, ge=0, description="key of all randomness")
    global_batch_size: Count = Field(gt=0, description="images per step, over all ranks")
    micro_batch_size: Count = Field(0, ge=0, description="images per forward pass and rank; 0 = the rank's whole share")
    max_images: Count = Field(gt=0, description="images seen at which the run ends")
    noise: Literal["gaussian", "uniform"] = Field(
        "gaussian", description="noise on the images: for samples, or for the likelihood"
    )
    noise_std: float = Field(
        0.05, ge=0, description="standard deviation of gaussian noise, in model range (grey levels span 2)"
    )
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels replaced by `no label`, for guidance")
    skip_spikes: bool = Field(False, description="pass over steps whose gradient norm is a 6-sigma outlier")
    max_skipped_in_a_row: Count = Field(20, gt=0, description="bad steps in a row at which the run stops")
    skip_images: tuple[tuple[Count, Count], ...] = Field(
        (), description="ranges [first, end) of images_seen that are passed over without training, e.g. [[1000, 2000]]"
    )
    max_restarts_without_progress: Count = Field(
        5, ge=0, description="restarts that commit no new checkpoint after which the run refuses to start; 0 = no limit"
    )
    grad_clip: float = Field(0.0, ge=0, description="largest global norm of the gradient; 0 = no clipping")
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of the network's products; masters are float32"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, else mps, else cpu")

    @model_validator(mode="after")
    def _ranges(self) -> "TrainConfig":
        for first, end in self.skip_images:
            if not 0 <= first < end:
                raise ValueError(
                    f"train.skip_images: a range is [first, end) with 0 <= first < end, got [{first}, {end}]"
                )
        return self


class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up, then a cosine down to final_lr at train.max_images."""

    lr: float = Field(1e-4, gt=0, description="highest learning rate")
    final_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine")
    warmup_images: Count = Field(0, ge=0, description="images of the linear warm-up; 0 = one epoch")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's decoupled decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moment decays")


class ParallelConfig(Section):
    """How a step is spread over processes. None of it changes the result."""

    backend: Literal["ddp", "fsdp2", "deepspeed"] = Field(
        "ddp", description="ddp: whole copies; fsdp2, deepspeed: sharded"
    )
    world_size: Count = Field(0, ge=0, description="processes that this configuration is made for; 0 = any number")
    dp_replicate: Count = Field(0, ge=0, description="copies of the model; 0 = what is left")
    dp_shard: Count = Field(0, ge=0, description="pieces that fsdp2 cuts a copy into; 0 = what is left")
    zero_stage: Count = Field(
        3, ge=1, le=3, description="deepspeed: 1 shards moments, 2 also gradients, 3 also weights"
    )
    offload_optimizer: bool = Field(False, description="deepspeed: keep the optimizer's state in host memory")
    reduce_dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of gradients as they are summed")
    start_timeout_s: float = Field(1800, gt=0, description="longest start, save or end")
    step_timeout_s: float = Field(600, gt=0, description="longest step, the first one apart")


class ActivationCheckpointConfig(Section):
    """What the forward pass keeps for the backward pass. None of it changes the gradients."""

    mode: Literal["none", "selective", "full"] = Field("none", description="none: all; full: each layer's input alone")
    every_nth_layer: Count = Field(
        0, ge=0, description="selective: checkpoint each n-th layer; 0 = keep products by policy"
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


def power_name(relative_std: float) -> str:
    """Name of a power-function average: its set of weights in checkpoints, settings and commands."""
    return f"ema-{relative_std:.3f}"


def decay_name(decay: float) -> str:
    """Name of an average of constant decay."""
    return f"ema-decay-{decay:g}"


class EMAConfig(Section):
    """Averages of the weights: power-function profiles (arXiv 2312.02696), constant decays. Sharded as the weights are."""

    relative_stds: tuple[float, ...] = Field(
        (0.05, 0.1), description="width of each power-function average, as a share of the run so far"
    )
    decays: tuple[float, ...] = Field((), description="decay per step of ordinary averages besides, e.g. [0.9999]")
    snapshot_every_images: Count = Field(
        0,
        ge=0,
        description="images between snapshots of the averages, kept for ever, from which `tarflow ema` makes any width; "
        "each comes with a checkpoint; 0 = none",
    )

    @model_validator(mode="after")
    def _distinct(self) -> "EMAConfig":
        for std in self.relative_stds:
            if not 0 < std < 0.28:
                raise ValueError(f"ema.relative_stds: a width lies between 0 and 0.28, got {std}")
        if len(set(map(power_name, self.relative_stds))) < len(self.relative_stds):
            raise ValueError(
                f"ema.relative_stds: widths must differ in the first three decimals, got {self.relative_stds}"
            )
        for decay in self.decays:
            if not 0 < decay < 1:
                raise ValueError(f"ema.decays: a decay lies between 0 and 1, got {decay}")
        if len(set(map(decay_name, self.decays))) < len(self.decays):
            raise ValueError(f"ema.decays: decays must differ in the first six digits, got {self.decays}")
        if self.snapshot_every_images and not self.relative_stds:
            raise ValueError("ema.snapshot_every_images needs ema.relative_stds: only power averages can be refitted")
        return self

    @property
    def names(self) -> list[str]:
        """Names of all averages, the widest as listed last."""
        return [*map(decay_name, self.decays), *map(power_name, self.relative_stds)]

    @property
    def preferred(self) -> str:
        """What `auto` stands for: the last of the averages, or the raw weights where none is kept."""
        return self.names[-1] if self.names else "raw"


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every_images: Count = Field(0, ge=0, description="images between checkpoints; 0 = only at the end")
    every_minutes: float = Field(0, ge=0, description="save also when this much time has passed; 0 = off")
    asynchronous: bool = Field(
        True, description="write beside the training, which waits only for a copy in host memory"
    )
    max_failures: Count = Field(3, gt=0, description="saves that fail in a row at which the run stops")
    keep_latest: Count = Field(2, ge=-1, description="newest checkpoints to keep (2 at least; -1 = all)")
    keep_every_images: Count = Field(
        0, ge=0, description="keep for ever the checkpoints at multiples of this; 0 = none"
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

    every_steps: Count = Field(50, gt=0, description="steps between lines of metrics")
    tensorboard: bool = Field(True, description="write tensorboard/ beside metrics.jsonl")


class SamplingConfig(Section):
    """How images are drawn from the model: all of it goes into every result (contract 9)."""

    guidance: float = Field(0.0, ge=0, description="weight w of a = a_c + w (a_c - a_u); 0 = none")
    guide: Literal["a", "b", "ab"] = Field("ab", description="what is guided: log-scale a, shift b")
    attn_temp: float = Field(1.0, gt=0, description="attention temperature of the unguided half")
    annealed: bool = Field(True, description="let the weight grow over the tokens")
    denoise: float | None = Field(
        None, ge=0, description="multiplier of the score-based denoising step; 0 = none, null = 1 after gaussian noise"
    )
    batch_size: Count = Field(64, gt=0, description="images drawn at once; does not change them")
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the network's products while sampling"
    )
    seed: Count = Field(0, ge=0, description="key of the noise: image i depends on (seed, i) alone")
    labels: Literal["balanced", "training"] = Field(
        "balanced", description="classes of the samples: each as often, or as often as in data.train"
    )


class EvaluationConfig(Section):
    """What the evaluation worker measures at each checkpoint."""

    num_samples: Count = Field(50_000, gt=1, description="images drawn for the Frechet distance")
    weights: str = Field(
        "auto", description="raw, one of the averages (ema-0.050), or auto: the widest average, raw without any"
    )
    variants: tuple[dict[str, Any], ...] = Field(
        (),
        description="what is evaluated besides: each entry replaces weights or settings of the section sampling, e.g. "
        "[{weights: raw}, {guidance: 2.0, denoise: 0}]",
    )
    order: Literal["in_order", "newest_first"] = Field(
        "in_order", description="which checkpoint comes first of several that wait"
    )
    chunk_samples: Count = Field(
        1000,
        gt=0,
        description="samples or held-out images that a worker takes at a time; a killed worker loses as many",
    )
    lease_s: float = Field(120.0, gt=0, description="seconds without a sign of life after which a chunk is taken over")
    features: Literal["efficientnet_lite0", "mobilenet_v2", "fid_inception", "torchvision_inception", "dinov2"] = Field(
        "efficientnet_lite0", description="feature network; the last three need evaluation.features_file"
    )
    features_file: Path | None = Field(
        None, description="weights of a feature network that no package brings; scores of unknown weights say so"
    )
    keep_features: Count = Field(
        10_000,
        ge=0,
        description="samples whose features are kept, for measures that need more than mean and covariance",
    )
    reference: Path | None = Field(
        None, description="stored reference statistics (.npz), checked; null = made once from data.train"
    )
    reference_images: Count = Field(0, ge=0, description="training images behind the reference statistics; 0 = all")
    validation_images: Count = Field(0, ge=0, description="held-out images for bits per dimension; 0 = all")
    likelihood_draws: Count = Field(4, gt=0, description="draws of the noise per held-out image")
    max_nonfinite_share: float = Field(
        0.05, ge=0, le=1, description="share of samples that may be lost as not finite; beyond it there is no distance"
    )
    neighbour_samples: Count = Field(1000, ge=0, description="samples that are compared with training images; 0 = none")
    neighbour_images: Count = Field(10_000, ge=0, description="training images that they are compared with; 0 = all")
    grid: tuple[int, int] = Field(
        (10, 8), description="rows (classes, if there are any) and columns of the sample grid"
    )


def _expand_preset(value: Any) -> Any:
    """`model: {preset: NAME, num_classes: 3}` is the preset with these settings replaced."""
    if isinstance(value, dict) and "preset" in value:
        return preset(value["preset"]).model_dump() | {k: v for k, v in value.items() if k != "preset"}
    return value


class Config(Section):
    """Everything about a run."""

    data: DataConfig
    model: Annotated[TarFlowConfig, BeforeValidator(_expand_preset)]
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    activation_checkpoint: ActivationCheckpointConfig = ActivationCheckpointConfig()
    compile: CompileConfig = CompileConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sampling: SamplingConfig = SamplingConfig()
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
        for variant in self.evaluation.variants:
            try:
                self.with_variant(variant)
            except ValidationError as error:
                known = "weights, " + ", ".join(SamplingConfig.model_fields)
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
        """The set of weights that evaluation uses: never a silent fallback (case T06)."""
        if self.evaluation.weights != "auto":
            return self.evaluation.weights
        return self.ema.preferred

    @property
    def denoise_multiplier(self) -> float:
        """Denoising step of samples; a flow trained on uniform dequantisation noise has none."""
        default = 1.0 if self.train.noise == "gaussian" else 0.0
        return default if self.sampling.denoise is None else self.sampling.denoise
