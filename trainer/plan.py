"""What a configuration amounts to, without allocating it: sizes, batch arithmetic, memory per rank, arithmetic per image."""

from tarflow.models.cost import (
    batch_that_fits,
    denoising_bytes,
    flops_per_image,
    likelihood_bytes,
    parameters,
    sampling_bytes,
)
from tarflow.trainer.batch import counted, plan_batch
from tarflow.trainer.config.schema import Config
from tarflow.trainer.parallel.memory import GB, HEADROOM, RankMemory, fits, rank_memory, reshards
from tarflow.trainer.parallel.mesh import mesh_shape

_BINARY = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_DECIMAL = {"Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_PARAMETERS = {"B": 1e9, "M": 1e6, "k": 1e3}


def describe(config: Config, world_size: int | None = None) -> str:
    """The dry run's text, for the stated number of ranks or `parallel.world_size`."""
    ranks = world_size or config.parallel.world_size or 1
    plan = plan_batch(config.train.global_batch_size, ranks, config.train.micro_batch_size)
    replicate, shard = mesh_shape(config.parallel, ranks)
    memory = rank_memory(config, ranks)
    model, train, checkpointing = config.model, config.train, config.activation_checkpoint
    engine = config.parallel.backend if ranks > 1 or config.parallel.backend == "deepspeed" else "one process"
    grid = (
        f"ZeRO-{config.parallel.zero_stage}"
        if engine == "deepspeed"
        else f"dp_replicate {replicate} x dp_shard {shard}"
    )
    unit = next((name for name, size in _BINARY.items() if memory.total >= size), "KiB")
    uses = {name.replace("_", " "): value for name, value in vars(memory).items() if name != "overlap"}
    parts = ", ".join(f"{name} {value / _BINARY[unit]:.2f}" for name, value in uses.items())
    if memory.overlap:
        parts += f"; of these {memory.overlap / _BINARY[unit]:.2f} not at once"
    flops = flops_per_image(model)
    each, whole = (" ".join(_short(number, _DECIMAL)) for number in (flops, flops * train.max_images))
    steps = -(-train.max_images // train.global_batch_size)
    return (
        f"model       {''.join(_short(parameters(model), _PARAMETERS))} parameters, {counted(model.num_tokens, 'token')} of "
        f"{counted(model.token_dim, 'number')}\n"
        f"parallel    {counted(ranks, 'rank')}, {engine}, {grid}; activation checkpointing {checkpointing.mode}; "
        f"compile {'on' if config.compile.enable else 'off'}{_resharding(config, ranks)}\n"
        f"batch       {plan}\n"
        f"length      {counted(train.max_images, 'image')} = {counted(steps, 'step')}\n"
        f"memory      {memory.total / _BINARY[unit]:.2f} {unit} per rank: {parts}\n"
        f"{_verdict(config, memory)}"
        f"{_evaluation(config)}\n"
        f"arithmetic  {each}FLOP per image (forward and backward); {whole}FLOP in all; "
        f"1 PFLOP/s does {1e15 / flops:,.0f} images/s"
    )


def _resharding(config: Config, ranks: int) -> str:
    """What becomes of gathered weights between the passes, where the engine gathers any."""
    parallel = config.parallel
    sharded = mesh_shape(parallel, ranks)[1] > 1 and (parallel.backend == "fsdp2" or parallel.zero_stage == 3)
    if parallel.backend == "ddp" or not sharded:
        return ""
    chosen = " (auto)" * (parallel.reshard_after_forward == "auto")
    return f"; weights {'freed after' if reshards(config, ranks) else 'kept from'} the forward pass{chosen}"


def _verdict(config: Config, memory: RankMemory) -> str:
    """Whether the stated device holds the plan; nothing where none is stated."""
    stated = config.parallel.device_memory_gb
    if not stated:
        return ""
    if fits(config, memory):
        return f"device      {stated:g} GB: fits, {memory.total / 1e9 / stated:.0%} of it\n"
    return (
        f"device      {stated:g} GB: DOES NOT FIT with a tenth to spare: {memory.total / 1e9:.1f} of "
        f"{HEADROOM * stated:.1f} GB; "
        "lower train.micro_batch_size, raise parallel.dp_shard or take activation_checkpoint.mode=full\n"
    )


def evaluation_weights(config: Config) -> float:
    """Bytes of the weights that an evaluation worker holds: float32, and a copy in the dtype that samples."""
    return parameters(config.model) * (4.0 + 2 * (config.sampling.param_dtype == "bfloat16"))


def evaluation_stages(config: Config) -> dict[str, float]:
    """Peak bytes per image of what an evaluation worker does in turn, weights and the feature network apart."""
    stages = {"sampling": sampling_bytes(config.model, **config.sampling.memory)}
    if config.denoise_multiplier:
        stages["denoising"] = denoising_bytes(config.model)
    return stages | {"likelihood": likelihood_bytes(config.model)}


def _evaluation(config: Config) -> str:
    """What an evaluation worker holds at a time.

    Denoising and likelihood split the sampling batch by the memory that is free. Sampling does not: a batch of another size
    may round differently, and the workers of a result share one.
    """
    weights, batch, stated = evaluation_weights(config), config.sampling.batch_size, config.parallel.device_memory_gb
    said = []
    for name, each in evaluation_stages(config).items():
        fits = min(batch, batch_that_fits(stated * GB - weights, each)) if stated else batch
        images = batch if name == "sampling" else fits
        text = f"{name} {images}{f' of {batch}' * (images < batch)} images {_size(images * each)}"
        said.append(text + f" (DOES NOT FIT: set sampling.batch_size={fits})" * (fits < images))
    return f"evaluation  per worker, in turn: {', '.join(said)}; beside {_size(weights)} of weights and the feature network"


def _size(count: float) -> str:
    """`1.50 GiB`."""
    unit = next((name for name, size in _BINARY.items() if count >= size), "KiB")
    return f"{count / _BINARY[unit]:.2f} {unit}"


def _short(number: float, prefixes: dict[str, float]) -> tuple[str, str]:
    """(`2.85`, `G`): with the prefix that leaves digits before the point."""
    prefix, size = next(((p, s) for p, s in prefixes.items() if number >= s), ("", 1.0))
    return f"{number / size:.2f}" if prefix else f"{number:.0f}", prefix
