"""What a configuration amounts to, without allocating it: sizes, batch arithmetic, memory per rank, arithmetic per image."""

from dataclasses import dataclass

from tarflow.models.cost import activation_bytes, flops_per_image, largest_piece, parameters, parameters_per_layer
from tarflow.trainer.batch import counted, plan_batch
from tarflow.trainer.config.schema import Config
from tarflow.trainer.parallel.mesh import mesh_shape

_BINARY = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_DECIMAL = {"Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_PARAMETERS = {"B": 1e9, "M": 1e6, "k": 1e3}


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank holds through the run, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    averages: float
    gathered: float  # the weights of a unit, whole, while it computes
    activations: float

    @property
    def state(self) -> float:
        """Weights, gradients and optimizer: what sharding divides."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return self.state + self.averages + self.gathered + self.activations


def rank_memory(config: Config, world_size: int) -> RankMemory:
    """Estimate for one of `world_size` ranks.

    Masters and moments are float32. A single process keeps a bfloat16 copy of all weights, a sharded one only of the
    layer at work. ZeRO cuts moments from stage 1, gradients from 2, weights from 3; average pieces always. It cuts
    evenly; fully_shard cuts rows, so that many ranks hold more than an even share (`largest_piece`).
    """
    n, element = parameters(config.model), 2 if config.train.param_dtype == "bfloat16" else 4
    zero = config.parallel.zero_stage if config.parallel.backend == "deepspeed" else None
    shard = world_size if zero else mesh_shape(config.parallel, world_size)[1]
    plan = plan_batch(config.train.global_batch_size, world_size, config.train.micro_batch_size)
    checkpointing = config.activation_checkpoint
    activations = activation_bytes(
        config.model, checkpointing.mode, element, checkpointing.every_nth_layer, checkpointing.offload
    )
    sharded = world_size > 1 or zero is not None
    piece = n / shard if zero else largest_piece(config.model, shard)
    # ZeRO-1 and 2: whole weights, and a piece of float32 masters.
    weights = 4 * piece + (4 * n if zero in (1, 2) else 0) + (0 if sharded or element == 4 else element * n)
    return RankMemory(
        weights=weights,
        gradients=4 * (n if zero == 1 else piece),
        optimizer=0.0 if config.parallel.offload_optimizer else 8 * piece,
        averages=4 * piece * len(config.ema.names),
        gathered=element * _parameters_per_unit(config) if sharded else 0.0,
        activations=plan.micro_batch_size * activations,
    )


def _parameters_per_unit(config: Config) -> int:
    """What fully_shard gathers at a time; ZeRO-3 goes by the layer."""
    model, size = config.model, config.parallel.layers_per_unit
    if config.parallel.backend == "deepspeed" or 0 < size < model.layers_per_block:
        return max(size, 1) * parameters_per_layer(model)
    return parameters(model) // model.num_blocks


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
    parts = ", ".join(f"{name} {value / _BINARY[unit]:.2f}" for name, value in vars(memory).items())
    flops = flops_per_image(model)
    each, whole = (" ".join(_short(number, _DECIMAL)) for number in (flops, flops * train.max_images))
    steps = -(-train.max_images // train.global_batch_size)
    return (
        f"model       {''.join(_short(parameters(model), _PARAMETERS))} parameters, {counted(model.num_tokens, 'token')} of "
        f"{counted(model.token_dim, 'number')}\n"
        f"parallel    {counted(ranks, 'rank')}, {engine}, {grid}; activation checkpointing {checkpointing.mode}; "
        f"compile {'on' if config.compile.enable else 'off'}\n"
        f"batch       {plan}\n"
        f"length      {counted(train.max_images, 'image')} = {counted(steps, 'step')}\n"
        f"memory      {memory.total / _BINARY[unit]:.2f} {unit} per rank: {parts}\n"
        f"arithmetic  {each}FLOP per image (forward and backward); {whole}FLOP in all; "
        f"1 PFLOP/s does {1e15 / flops:,.0f} images/s"
    )


def _short(number: float, prefixes: dict[str, float]) -> tuple[str, str]:
    """(`2.85`, `G`): with the prefix that leaves digits before the point."""
    prefix, size = next(((p, s) for p, s in prefixes.items() if number >= s), ("", 1.0))
    return f"{number / size:.2f}" if prefix else f"{number:.0f}", prefix
