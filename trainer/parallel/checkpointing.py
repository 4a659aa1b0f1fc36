"""Activation checkpointing: keep less in the forward pass, compute it again in the backward pass. The same gradients.

    none        keep everything
    selective   keep the outputs of matrix products and attention, or (every_nth_layer = n) checkpoint each n-th layer
    full        keep only each layer's input; offload = true keeps it in host memory

Layers are changed in place and keep their names: a run's checkpoints do not depend on the mode.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tarflow.trainer.config.schema import ActivationCheckpointConfig

Forward = Callable[..., Any]  # (x), or (x, table of rotary positions)

_aten = torch.ops.aten
KEPT = {
    getattr(_aten, name).default
    for name in (
        "mm", "addmm", "bmm", "baddbmm",  # the last two: attention written out, in bfloat16 on the CPU
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(_aten, name)
}  # fmt: skip


def checkpoint_layer(layer: nn.Module, number: int, config: ActivationCheckpointConfig) -> None:
    """Apply the configured mode to layer `number` (0, 1, ... through the whole flow)."""
    if config.mode == "none" or (config.mode == "selective" and number % max(config.every_nth_layer, 1)):
        return
    if config.mode == "selective" and not config.every_nth_layer:
        layer.forward = _selective(layer.forward)
    elif config.offload:
        layer.forward = _offloaded(layer.forward)
    else:
        layer.forward = _full(layer.forward)


# Kept outputs then go through saved-tensor hooks like all others, so that they can be counted and moved. Older torch has
# no such argument, and its hooks do not see kept outputs; gradients and memory are the same.
_HOOKS: dict[str, Any] = (
    {"respect_saved_tensors_hooks": True}
    if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
    else {}
)


# Functions of this file, not partial(checkpoint, ...): torch.compile skips frames of torch's own code, so as the outermost
# frame `checkpoint` would make it compile nothing at all, silently.


def _full(forward: Forward) -> Forward:
    def checkpointed(*inputs: Tensor) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return checkpointed


def _selective(forward: Forward) -> Forward:
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)

    def checkpointed(*inputs: Tensor) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **_HOOKS)

    return checkpointed


def _offloaded(forward: Forward) -> Forward:
    def checkpointed(*inputs: Tensor) -> Any:
        # Only the reentrant form saves its input where saved-tensor hooks can move it.
        with save_on_cpu(pin_memory=inputs[0].device.type == "cuda"):
            return checkpoint(forward, *inputs, use_reentrant=True)

    return checkpointed


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
