"""From a plain model to one that trains as configured: activation checkpointing, compile, shard."""

import os
import tempfile
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tarflow.file_systems import private_folder
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.trainer.config.schema import ActivationCheckpointConfig, Config
from tarflow.trainer.parallel.checkpointing import checkpoint_layer
from tarflow.trainer.parallel.memory import reshards


def apply_parallelism(model: TarFlow, config: Config, mesh: DeviceMesh | None) -> None:
    """Change a model in place. `mesh` has dp_shard, with replicas dp_replicate before it; None for a single process."""
    if config.activation_checkpoint.offload:
        # Moving tensors to the host and back cannot be traced: the graph has to be inside that.
        if config.compile.enable:
            apply_compile(model, forward_only=True)
        apply_activation_checkpointing(model, config.activation_checkpoint)
    else:
        apply_activation_checkpointing(model, config.activation_checkpoint)
        if config.compile.enable:
            apply_compile(model)
    if mesh is not None:
        apply_fsdp(model, config, mesh)


def apply_activation_checkpointing(model: TarFlow, config: ActivationCheckpointConfig) -> None:
    """Wrap the layers that the mode names; a mode of none changes nothing."""
    for number, layer in enumerate(_layers(model)):
        checkpoint_layer(layer, number, config)


def apply_compile(model: TarFlow, *, forward_only: bool = False) -> None:
    """Compile layer by layer: layers share their code, so one graph serves them all.

    `forward_only`: what is wrapped around a layer's forward later stays outside of its graph.
    """
    use_private_compiler_cache()
    for layer in _layers(model):
        if forward_only:
            layer.forward = torch.compile(layer.forward)
        else:
            layer.compile()


def apply_fsdp(model: TarFlow, config: Config, mesh: DeviceMesh) -> None:
    """Shard by units of `parallel.layers_per_unit` layers: at most one unit is unsharded at a time.

    Each unit costs the host time: with blocks of 8 layers instead of single layers as units, a step of 64 layers went from
    349 to 262 ms on one H200. Mere replicas (dp_shard = 1) take the same path: the mathematics is one.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.train.param_dtype),
        reduce_dtype=getattr(torch, config.parallel.reduce_dtype),
        cast_forward_inputs=False,  # data stay float32, the model casts where it computes
    )
    # Nothing is freed where no other rank has it: mere replicas would only copy it again.
    reshard = mesh["dp_shard"].size() > 1 and reshards(config, mesh.size())
    order: list[FSDPModule] = []
    for block in _blocks(model):
        parts = units(list(block.attn_blocks), config.parallel.layers_per_unit)
        for unit in parts:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        order += cast("list[FSDPModule]", [block, *(unit[0] for unit in parts)])
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    prefetch(order, config.parallel.prefetch_units)


def prefetch(order: list[FSDPModule], ahead: int) -> None:
    """Have each unit gather the next `ahead` ones, in the order of computation; 0 leaves it to torch."""
    if not ahead:
        return
    for place, unit in enumerate(order):
        unit.set_modules_to_forward_prefetch(order[place + 1 : place + 1 + ahead])
        unit.set_modules_to_backward_prefetch(order[max(0, place - ahead) : place][::-1])


def units(layers: list[nn.Module], size: int) -> list[list[nn.Module]]:
    """A block's layers in units of `size`; none where the block is one unit with everything in it."""
    if not size or size >= len(layers):
        return []
    return [layers[first : first + size] for first in range(0, len(layers), size)]


def use_private_compiler_cache() -> None:
    """Keep the cache of compiled code in a folder that belongs to this user alone.

    Torch runs what it finds there, and by default looks in the system's temporary folder, under a name that anybody can take
    first.
    """
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        folder = Path(tempfile.gettempdir(), f"tarflow-compiled-{os.geteuid()}")
        way_out = "set TORCHINDUCTOR_CACHE_DIR to a folder of your own"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder(folder, way_out))


def _blocks(model: TarFlow) -> list[FlowBlock]:
    return cast("list[FlowBlock]", list(model.blocks))


def _layers(model: TarFlow) -> list[nn.Module]:
    return [layer for block in _blocks(model) for layer in block.attn_blocks]
