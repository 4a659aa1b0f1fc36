"""Which device and which backend a configuration asks for."""

import torch

from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tarflow.trainer.batch import BatchPlan
from tarflow.trainer.config.schema import Config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel.backend import Backend
from tarflow.trainer.parallel.mesh import mesh_shape
from tarflow.trainer.parallel.torch_backend import ShardedBackend, SingleBackend
from tarflow.trainer.parallel.world import World


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `train.device` asks for; one that is not there is an error."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise TrainerError(f"train.device={name}: this machine has none; use auto or cpu")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise TrainerError(f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def make_backend(config: Config, device: torch.device, world: World, plan: BatchPlan) -> Backend:
    """The configured backend, with initial weights that depend on the seed alone."""
    mesh_shape(config.parallel, world.size)  # refuse a grid that does not fit, whatever the backend
    if config.parallel.backend == "deepspeed":
        from tarflow.trainer.parallel.zero import ZeroBackend

        return ZeroBackend(config, device, world, plan)
    if world.size > 1:
        return ShardedBackend(config, device, world)
    model = TarFlow(config.model)
    init_weights(model, config.train.seed)
    return SingleBackend(model, config, device)
