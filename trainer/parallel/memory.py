"""Bytes that one rank holds at the moment of its step when it holds most, by what they are for.

Formulas, not measurements. `benchmarks/fake_ranks.py` compares them with the storages of a rank of 1,024 that takes a step,
`benchmarks/gpu` with the peak that the allocator of a GPU saw.
"""

from dataclasses import dataclass

from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import (
    activation_bytes,
    largest_piece,
    largest_unit_piece,
    layer_at_work_bytes,
    noise_embedding_bytes,
    parameters,
    parameters_per_layer,
)
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.config.schema import Config
from tarflow.trainer.parallel.mesh import mesh_shape

GB = 1e9
HEADROOM = 0.9  # of a device's memory may be planned: the allocator's blocks do not fit without gaps
# What no tensor shows. The CUDA context with the kernels of torch, cuBLAS and cuDNN (order of size, from `nvidia-smi` beside
# an idle process that has computed once), and a cuBLAS workspace (32 MiB on Hopper, in torch's CUDA notes) of each stream.
CUDA_CONTEXT = 0.6 * GB
CUBLAS_WORKSPACES = 2 * 32 * 2**20
# A communicator of NCCL: 32 channels in a node of H100, with buffers of 4 MiB (NCCL_BUFFSIZE) and 4.7 MiB (the protocol
# LL128) for each of two neighbours. It depends on channels and algorithms, not on the number of nodes beyond two
# (github.com/NVIDIA/nccl, issues 864 and 986).
NCCL_COMMUNICATOR = 32 * 2 * 8.7 * 2**20


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank holds at most, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    averages: float
    gathered: float  # weights in the dtype that computes, whole: of the units at work, or of all
    reducing: float  # a unit's gradients on the way from whole to sharded
    activations: float  # kept for the backward pass
    at_work: float  # of the layer that computes
    buckets: float  # of gradients to reduce, which ZeRO-3 makes once and keeps
    runtime: float  # outside of torch's allocator
    overlap: float = 0  # of gradients and activations: these come as those go

    @property
    def state(self) -> float:
        """Weights, gradients and optimizer: what sharding divides."""
        return self.weights + self.gradients + self.optimizer

    @property
    def held(self) -> float:
        """What is there after a backward pass, averages apart: the state, and buffers that are made once.

        ZeRO-3 holds all of it between the steps as well, since its gradients have a buffer.
        """
        return self.state + self.buckets

    @property
    def total(self) -> float:
        """Bytes at the highest moment."""
        parts = dict(vars(self))
        return -float(parts.pop("overlap")) + sum(parts.values())

    @property
    def allocated(self) -> float:
        """The total as far as torch allocates it."""
        return self.total - self.runtime


@dataclass(frozen=True)
class _Engine:
    """What the parts depend on, for one of `ranks`."""

    config: Config
    ranks: int

    @property
    def zero(self) -> int:
        """The stage of ZeRO, 0 for torch's own engines."""
        return self.config.parallel.zero_stage if self.config.parallel.backend == "deepspeed" else 0

    @property
    def single(self) -> bool:
        return self.ranks == 1 and not self.zero

    @property
    def shard(self) -> int:
        return self.ranks if self.zero else mesh_shape(self.config.parallel, self.ranks)[1]

    @property
    def element(self) -> int:
        return _size(self.config.train.param_dtype)

    @property
    def autocast(self) -> dict[str, int]:
        """Bytes per number that ZeRO's autocast leaves in float32: the residual stream, and in stage 3 the norms' outputs."""
        if not self.zero or self.element == 4:
            return {}
        return {"stream": 4, "normed": 4 if self.zero == 3 else 2}

    @property
    def reduce_element(self) -> int:
        return _size(self.config.parallel.reduce_dtype)

    @property
    def units(self) -> list[tuple[int, bool]]:
        """What is gathered and reduced at a time, in order: layers, and whether the block's ends come with them.

        A block of no more layers than a unit has is one unit with everything in it. ZeRO-3 goes by the layer.
        """
        size, found = 1 if self.zero else self.config.parallel.layers_per_unit, list[tuple[int, bool]]()
        for deep in self.config.model.layers:
            if not self.zero and (not size or size >= deep):
                found.append((deep, True))
            else:
                found += [(min(size, deep - first), False) for first in range(0, deep, size)]
        return found

    @property
    def layers(self) -> int:
        """Layers of the deepest unit."""
        return max(layers for layers, _ in self.units)

    @property
    def unit(self) -> int:
        """Parameters of the largest unit that is gathered and reduced at a time."""
        return max(self.pieces(1))

    @property
    def padded_unit(self) -> int:
        """The same with the rows that pad each tensor to equal pieces: what goes over the wire."""
        return self.unit if self.zero else self.shard * max(self.pieces(self.shard))

    @property
    def padded_units_ahead(self) -> int:
        """The same of the unit at work and those gathered before their turn, where these are most."""
        pieces, together = self.pieces(self.shard), 1 + self.ahead
        return self.shard * max(sum(pieces[i : i + together]) for i in range(max(1, len(pieces) - self.ahead)))

    def pieces(self, ranks: int) -> list[int]:
        """Parameters of every unit on the fullest of so many ranks."""
        size = {unit: largest_unit_piece(self.config.model, ranks, *unit) for unit in set(self.units)}
        return [size[unit] for unit in self.units]

    @property
    def ahead(self) -> int:
        """Units that are gathered before their turn."""
        return self.config.parallel.prefetch_units or 1


def rank_memory(config: Config, world_size: int) -> RankMemory:
    """Estimate for one of `world_size` ranks, at the highest moment of a step.

    Masters and moments are float32. ZeRO cuts moments from stage 1, gradients from 2, weights from 3; average pieces
    always. It cuts evenly; fully_shard cuts rows, so that many ranks hold more than an even share (`largest_piece`).
    """
    return _rank_memory(config, world_size, reshards(config, world_size))


def reshards(config: Config, world_size: int) -> bool:
    """Whether a unit's gathered weights are freed after its forward pass and gathered again for the backward pass.

    By the configuration alone, so that all ranks decide alike.
    """
    choice = config.parallel.reshard_after_forward
    if choice != "auto":
        return choice == "always"
    if not config.parallel.device_memory_gb:
        return True
    return not fits(config, _rank_memory(config, world_size, reshard=False))


def fits(config: Config, memory: RankMemory) -> bool:
    """Whether a plan fits the stated device with room to spare; a device that is not stated holds anything."""
    stated = config.parallel.device_memory_gb * GB
    return not stated or memory.total <= HEADROOM * stated


def _rank_memory(config: Config, ranks: int, reshard: bool) -> RankMemory:
    engine = _Engine(config, ranks)
    model, checkpointing = config.model, config.activation_checkpoint
    plan = plan_batch(config.train.global_batch_size, ranks, config.train.micro_batch_size)
    piece = parameters(model) / engine.shard if engine.zero else largest_piece(model, engine.shard)
    # Whole weights: ZeRO-1 and 2 compute with float32 ones, beside a piece of masters.
    weights = 4 * piece + (4 * parameters(model) if engine.zero in (1, 2) else 0)
    gradients, grow = _gradients(engine, piece, plan.accumulation_steps)
    images = plan.micro_batch_size
    activations = images * activation_bytes(
        model,
        checkpointing.mode,
        engine.element,
        checkpointing.every_nth_layer,
        checkpointing.offload,
        **engine.autocast,
    )
    activations += noise_embedding_bytes(model, copied=not engine.zero and engine.element < 4)
    recomputed = "full" if checkpointing.every_nth_layer else checkpointing.mode
    gathered, kept = _gathered(engine, reshard)
    # Gradients that are not there when the backward pass begins grow unit by unit, while what was kept for it goes.
    left = 1 - engine.layers / sum(model.layers)
    going = activations + (gathered if kept else 0)
    at_work = images * layer_at_work_bytes(model, recomputed, engine.element, **engine.autocast)
    reducing = _reducing(engine, plan.accumulation_steps)
    overlap = left * min(gradients, going) if grow else 0.0
    if not engine.zero and len(set(model.layers)) > 1:
        growing, freed = gradients if grow else 0.0, 0.0 if kept else gathered
        together = _most_together(engine, activations, growing, freed, reducing)
        overlap = activations + growing + freed + reducing - together
    if engine.zero in (1, 2) and checkpointing.mode == "full":  # autocast's copies end with the forward pass
        overlap += min(gathered, reducing + at_work + (gradients if grow else 0))
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=0.0 if config.parallel.offload_optimizer else 8 * piece,
        averages=4 * (largest_piece(model, engine.shard) if engine.zero in (1, 2) else piece) * len(config.ema.names),
        gathered=gathered,
        reducing=reducing,
        activations=activations,
        at_work=at_work,
        buckets=float(bucket_size(model) * engine.reduce_element) if engine.zero == 3 else 0.0,
        runtime=_runtime(engine),
        overlap=overlap,
    )


def _gradients(engine: _Engine, piece: float, micro_batches: int) -> tuple[float, bool]:
    """Bytes of gradients at most, and whether they are there only after the last micro-batch's backward pass."""
    n = parameters(engine.config.model)
    if engine.zero:
        return 4 * (n if engine.zero == 1 else piece), engine.zero == 1 and micro_batches == 1
    if micro_batches == 1:
        return 4 * piece, True
    # fully_shard reduces after the last micro-batch alone. Until then it adds up whole gradients, in the dtype of reduction.
    return (4 * n if engine.single else max(engine.reduce_element * n, 4 * piece)), False


def _gathered(engine: _Engine, reshard: bool) -> tuple[float, bool]:
    """Bytes of weights in the dtype that computes, and whether all are kept until the backward pass is done with them."""
    n, element = parameters(engine.config.model), engine.element
    if engine.single or engine.zero in (1, 2):
        return (element * n if element < 4 else 0.0), False  # a copy in bfloat16
    if engine.zero:  # weights in float32; in the backward pass, the last ones ahead are gone when gradients are most
        return 4.0 * (engine.unit * engine.ahead if reshard else n), not reshard
    if reshard and engine.shard > 1:
        return float(element * engine.padded_units_ahead), False
    return element * n, True


def _most_together(engine: _Engine, activations: float, gradients: float, gathered: float, reducing: float) -> float:
    """Most bytes at once of what comes and goes in a backward pass, where blocks differ in depth.

    While a unit is at work, the gradients of the one after it are being reduced, those after that have theirs, and the
    activations of all of these are gone: beside the deepest unit's gradients are only those of what comes before it.
    """
    layers, pieces = [n for n, _ in engine.units], engine.pieces(engine.shard)
    windows = [sum(pieces[max(0, unit - engine.ahead) : unit + 1]) for unit in range(len(pieces))]
    return max(
        activations * sum(layers[: unit + 1]) / sum(layers)
        + gradients * sum(layers[unit + 2 :]) / sum(layers)
        + (gathered * windows[unit] / max(windows) if unit >= 0 else 0)
        + (reducing * pieces[unit + 1] / max(pieces) if unit + 1 < len(pieces) else 0)
        for unit in range(-1, len(pieces))
    )


def _reducing(engine: _Engine, micro_batches: int) -> float:
    """Bytes of a unit's gradients in the dtype that computes, and as the collective takes them."""
    if engine.single:
        return 0.0
    if engine.zero:  # a layer's, a bucket of them (stage 3 keeps its own), and its copy that is sent
        return engine.unit * (4 + engine.reduce_element * (1 if engine.zero == 3 else 2))
    if engine.shard == 1:
        return engine.unit * engine.element
    if micro_batches > 1:  # the sum of gradients itself makes room
        return max(engine.unit * engine.element, engine.padded_unit * engine.reduce_element)
    return engine.unit * engine.element + engine.padded_unit * engine.reduce_element


def bucket_size(model: TarFlowConfig) -> int:
    """Numbers in ZeRO's bucket of gradients: a layer's, or the position embedding's if it has more."""
    return max(parameters_per_layer(model), model.num_tokens * model.channels)


def _runtime(engine: _Engine) -> float:
    if engine.config.train.device != "cuda" and not engine.config.parallel.device_memory_gb:
        return 0.0
    sizes = {engine.ranks, engine.shard, engine.ranks // engine.shard} - {1}
    return CUDA_CONTEXT + CUBLAS_WORKSPACES + NCCL_COMMUNICATOR * len(sizes)


def _size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4
