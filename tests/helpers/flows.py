"""Tiny flows away from the identity, for the tests of sampling."""

import torch

from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights


def config(**changes: object) -> TarFlowConfig:
    """3 blocks of 2 layers, 16 tokens of 12 numbers, 4 classes."""
    settings: dict = {
        "image_size": 8, "patch_size": 2, "in_channels": 3, "channels": 64, "num_blocks": 3, "layers_per_block": 2,
        "num_classes": 4, "head_channels": 32,
    }  # fmt: skip
    return TarFlowConfig(**(settings | changes))


def perturbed(model_config: TarFlowConfig, size: float = 0.04, outputs: float = 0.01) -> TarFlow:
    """A model whose weights are moved by normal noise; the last projections by less, as scales are exponentials."""
    model = TarFlow(model_config)
    init_weights(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((outputs if "proj_out" in name else size) * torch.randn(p.shape, generator=generator))
    return model.eval().requires_grad_(False)


def noise(n: int, model_config: TarFlowConfig | None = None, seed: int = 0) -> torch.Tensor:
    """Standard normal [n, T, D]."""
    c = model_config or config()
    return torch.randn(n, c.num_tokens, c.token_dim, generator=torch.Generator().manual_seed(seed))
