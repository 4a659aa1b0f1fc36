"""From a plain model to one that trains as configured, in this order: activation checkpointing, compile, shard."""

import os
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tarflow.files import private_folder
from tarflow.models.flow import FlowBlock, TarFlow
from tarflow.trainer.config.schema import Config


def apply_parallelism(model: TarFlow, config: Config, mesh: DeviceMesh | None) -> None:
    """Change a model in place. `mesh` is (dp_replicate, dp_shard), None for a single process.

    Layers are compiled one by one: they share their code, so one graph serves them all. Sharding by units of
    `parallel.layers_per_unit` layers bounds what is whole at any time to a unit, and each unit costs the host time: a
    step of 64 layers went from 349 to 262 ms on one H200 when blocks of 8 became the units. Replicas (dp_shard = 1) go
    the same way: the mathematics is one.
    """
    if config.compile.enable:
        own_compiler_cache()
    number = 0
    for block in model.blocks:
        assert isinstance(block, FlowBlock)
        for layer in block.attn_blocks:
            # Moving tensors to the host and back cannot be traced: the graph is inside that.
            offload = config.activation_checkpoint.offload
            if config.compile.enable and offload:
                layer.forward = torch.compile(layer.forward)
            if config.activation_checkpoint.mode != "none":
                from tarflow.trainer.parallel.checkpointing import checkpoint_layer

                checkpoint_layer(layer, number, config.activation_checkpoint)
            if config.compile.enable and not offload:
                layer.compile()
            number += 1
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.train.param_dtype),
        reduce_dtype=getattr(torch, config.parallel.reduce_dtype),
        cast_forward_inputs=False,  # data stay float32, the model casts where it computes
    )
    sharded = mesh.size(1) > 1
    for block in model.blocks:
        assert isinstance(block, FlowBlock)
        for unit in units(list(block.attn_blocks), config.parallel.layers_per_unit):
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=sharded)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=sharded)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=sharded)


def units(layers: list[nn.Module], size: int) -> list[list[nn.Module]]:
    """A block's layers in units of `size`; none where the block is one unit with all that it holds."""
    if not size or size >= len(layers):
        return []
    return [layers[first : first + size] for first in range(0, len(layers), size)]


def own_compiler_cache() -> None:
    """Torch runs what lies in its cache of compiled code, which it keeps in the system's temporary folder, under a name
    that whoever comes first can take.
    """
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        folder = Path(tempfile.gettempdir(), f"tarflow-compiled-{os.geteuid()}")
        way_out = "set TORCHINDUCTOR_CACHE_DIR to a folder of your own"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder(folder, way_out))
