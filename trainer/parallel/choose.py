"""The backend that a configuration asks for, and deterministic kernels."""

import os

import torch

from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tarflow.trainer.batch import BatchPlan
from tarflow.trainer.config.schema import Config
from tarflow.trainer.parallel.backend import Backend
from tarflow.trainer.parallel.mesh import mesh_shape
from tarflow.trainer.parallel.torch_backend import ShardedBackend, SingleBackend
from tarflow.trainer.parallel.world import World


def compute_deterministically(device: torch.device) -> None:
    """Use only kernels that give the same bits for the same input; on the CPU all of them do.

    `warn_only` would not do: attention would still take its nondeterministic kernels. To be called before the first matrix
    product: cuBLAS reads the configuration of its workspace when it is first used.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling takes time, and nothing here reads memory that it did not write.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def make_backend(config: Config, device: torch.device, world: World, plan: BatchPlan) -> Backend:
    """The configured backend, with initial weights that depend on the seed alone."""
    mesh_shape(config.parallel, world.size)  # refuse a mesh that does not fit, whatever the backend
    if config.parallel.backend == "deepspeed":
        from tarflow.trainer.parallel.zero import ZeroBackend

        return ZeroBackend(config, device, world, plan)
    if world.size > 1:
        return ShardedBackend(config, device, world)
    model = TarFlow(config.model)
    init_weights(model, config.train.seed)
    return SingleBackend(model, config, device)
