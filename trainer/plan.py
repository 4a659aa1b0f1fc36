"""What a configuration amounts to, without allocating it: sizes, batch arithmetic, memory for the training state."""

import torch

from models.flow import TarFlow
from trainer.batch import plan_batch
from trainer.config import Config


def describe(config: Config, world_size: int = 1) -> str:
    """The dry run's text."""
    plan = plan_batch(config.train.global_batch_size, world_size, config.train.micro_batch_size)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in TarFlow(config.model).parameters())
    computing = 2 if config.train.param_dtype == "bfloat16" else 0  # a copy beside the float32 masters
    per_parameter = {
        "weights": 4 + computing, "gradients": 4, "optimizer": 8, "averages": 4 * len(config.ema.relative_stds),
    }  # fmt: skip
    state = ", ".join(f"{name} {parameters * size / 2**30:.2f}" for name, size in per_parameter.items())
    model, train = config.model, config.train
    return (
        f"model       {parameters / 1e6:.1f}M parameters, {model.num_tokens} tokens of {model.token_dim} numbers\n"
        f"batch       {plan}\n"
        f"length      {train.max_images:,} images = {train.max_images // train.global_batch_size:,} steps\n"
        f"state, GiB  {state}; {parameters * sum(per_parameter.values()) / 2**30:.2f} in all, activations apart"
    )
