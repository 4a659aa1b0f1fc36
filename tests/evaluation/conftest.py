"""Tiny models and data for the tests of the evaluation room."""

import pytest
import torch

from models.config import TarFlowConfig
from models.flow import TarFlow
from models.init import init_weights


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(**changes):
    base = {
        "image_size": 8, "patch_size": 4, "in_channels": 1, "channels": 16, "num_blocks": 2, "layers_per_block": 1,
        "head_channels": 8, "num_classes": 3,
    }  # fmt: skip
    return TarFlowConfig(**(base | changes))


def tiny_model(seed=0, scale=0.1, **changes):
    """A model away from the identity: every parameter is moved by normal noise."""
    model = TarFlow(tiny_config(**changes))
    init_weights(model, seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=rng)
    return model.eval()


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture
def model():
    return tiny_model()
