"""Weight initialization, one keyed draw per parameter.

A parameter's values depend on (seed, its name, its shape) alone: not on the order of construction, the device, the world
size or the parallel backend. So a model built on the meta device can be filled shard by shard, and every parallel setup
starts from the same weights.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tarflow.models.flow import TarFlow
from tarflow.models.randomness import keyed_normal, keyed_uniform

EMBED_STD = 1e-2


def initial_value(name: str, shape: tuple[int, ...], fan_in: int, seed: int) -> Tensor:
    """Float32 values of the parameter `name`: torch's defaults with `proj_out.weight` zero, as published."""
    stream = f"init/{name}"
    if name.endswith(("pos_embed", "class_embed")):
        return EMBED_STD * keyed_normal(seed, stream, 0, [0], shape)[0]
    if name.endswith("proj_out.weight"):
        return torch.zeros(shape)  # every block starts as a constant shift, close to the identity
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("norm.bias"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(fan_in)
    return (2 * keyed_uniform(seed, stream, 0, [0], shape)[0] - 1) * bound


def initial_values(model: TarFlow, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, float32 values) of every parameter, unsharded; of `model` only names and shapes are used."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, shape in shapes.items():
        weight = shapes.get(name.removesuffix("bias") + "weight", shape)  # a bias takes the fan-in of its weight
        yield name, initial_value(name, shape, weight[-1], seed)


@torch.no_grad()
def init_weights(model: TarFlow, seed: int) -> None:
    """Initialize a model that is not sharded: every parameter, and the prior variance (to one)."""
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed):
        parameters[name].copy_(value)
    model.var.fill_(1)
