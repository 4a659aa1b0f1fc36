"""Backends on torch alone: one process, whole replicas (ddp) and sharded ones (fsdp2, hybrid)."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from tarflow.models.flow import TarFlow
from tarflow.models.init import initial_values
from tarflow.trainer.config.schema import Config
from tarflow.trainer.optimizer import GuardedAdamW
from tarflow.trainer.parallel.apply import apply_parallelism
from tarflow.trainer.parallel.mesh import mesh_shape
from tarflow.trainer.parallel.world import World
from tarflow.trainer.stats import batch_stats, training_loss


class TorchBackend:
    """What both torch backends share: local masters, one guarded AdamW over them, saving and loading state."""

    def __init__(self, model: TarFlow, config: Config, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self.device, self.model = device, model
        self._weighting = config.train.loss_weight
        self._locals = self._make_locals()
        self.optimizer = GuardedAdamW(
            self._locals.values(),
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
            grad_clip=config.train.grad_clip,
            skip_spikes=config.train.skip_spikes,
            group=group,
        )
        self._step = torch.zeros((), device=device)
        self._vp_mean_square: Tensor | None = None

    def _make_locals(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward_backward(
        self,
        images: Tensor,
        labels: Tensor | None,
        share: float,
        last: bool = True,  # noqa: ARG002 - one process sums over no ranks
        noise: Tensor | None = None,
    ) -> Tensor:
        """Add this micro-batch's gradients to those that the parameters hold; see `Backend`."""
        z, logdet = self.model(images, labels, noise=noise)
        # Each micro-batch counts by its share of the images, so that the sum of the gradients is their mean.
        loss = training_loss(z, logdet, noise, self._weighting) * share
        loss.backward()
        if not self.model.config.nvp:
            mean_square = z.detach().square().mean(0) * share
            self._vp_mean_square = mean_square if self._vp_mean_square is None else self._vp_mean_square + mean_square
        return batch_stats(loss, z, logdet, share)

    def optimizer_step(self, lr: float) -> Tensor:
        """Update the masters (or skip a bad step), then whatever computes with copies of them."""
        self._collect_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._sync_params_from_masters()
        if self._vp_mean_square is not None:
            if dist.is_initialized():
                dist.all_reduce(self._vp_mean_square)
                self._vp_mean_square /= dist.get_world_size()
            self.model.update_prior(self._vp_mean_square)
            self._vp_mean_square = None
        return self.optimizer.grad_norm

    def _collect_gradients(self) -> None:
        """Put the gradients where the optimizer looks for them: on the local masters."""

    def _sync_params_from_masters(self) -> None:
        """Update the copies of the masters that compute, if there are any."""

    def skipped(self) -> Tensor:
        """[steps skipped in all, in a row until now], on the device."""
        return torch.stack([self.optimizer.skipped_steps, self.optimizer.skipped_in_a_row])

    def locals(self) -> dict[str, Tensor]:
        """The float32 masters: leaves that the optimizer updates in place."""
        return self._locals

    def to_saved(self, name: str, local: Tensor) -> Tensor:  # noqa: ARG002 - sharded backends look up its layout
        """The tensor itself: one process holds whole tensors."""
        return local

    def from_saved(self, name: str, saved: Tensor, local: Tensor) -> None:
        """Saved tensors share the memory of local ones."""

    def state(self) -> dict[str, Tensor]:
        """Saved form of weights, moments, step count and guard; it shares the memory of what trains."""
        tensors = {f"model/{name}": self.to_saved(name, p.detach()) for name, p in self._locals.items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            for name, p in self._locals.items():
                # AdamW holds no moments for an empty piece of a parameter that has fewer rows than there are ranks.
                local = self.optimizer.state[p][moment] if p.numel() else torch.zeros_like(p)
                tensors[f"optim/{moment}/{name}"] = self.to_saved(name, local)
        # One step count serves all parameters: they are always updated together.
        steps = [state["step"] for state in self.optimizer.state.values()]
        self._step.copy_(steps[0])
        guard = {f"guard/{name}": t for name, t in self.optimizer.guard_state().items()}
        return tensors | {"optim/step": self._step, "buffer/var": self.model.var} | guard

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:  # noqa: ARG002 - it was filled in place; see `state`
        """Take over the step count, for each parameter its own, and the masters' new values."""
        for entry in self.optimizer.state.values():
            entry["step"].copy_(self._step)
        self._sync_params_from_masters()


class SingleBackend(TorchBackend):
    """One process: float32 master weights and, if configured, a bfloat16 copy that computes.

    The cast happens once per step, in one call for all parameters, instead of in every matrix product of every forward pass.
    """

    def __init__(self, model: TarFlow, config: Config, device: torch.device) -> None:
        model.to(device)
        self._computing = list(model.parameters())
        self._dtype = getattr(torch, config.train.param_dtype)
        super().__init__(model, config, device, group=None)
        apply_parallelism(model, config, mesh=None)

    def _make_locals(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.model.named_parameters()]
        if self._dtype == torch.float32:
            return dict(zip(names, self._computing))
        masters: list[Tensor] = [p.detach().clone() for p in self._computing]
        self._master_of = dict(zip(map(id, self._computing), masters))
        for parameter in self._computing:
            parameter.data = parameter.data.to(self._dtype)
            parameter.register_post_accumulate_grad_hook(self._move_gradient)
        return dict(zip(names, masters))

    def _move_gradient(self, parameter: Tensor) -> None:
        """Move a bfloat16 gradient to its float32 master, where micro-batches add up without rounding to bfloat16."""
        master, grad = self._master_of[id(parameter)], parameter.grad
        assert grad is not None
        if master.grad is None:
            master.grad = grad.float()
        else:
            master.grad.add_(grad)
        parameter.grad = None

    @torch.no_grad()
    def _sync_params_from_masters(self) -> None:
        if self._dtype != torch.float32:
            torch._foreach_copy_([p.data for p in self._computing], list(self._locals.values()))


class ShardedBackend(TorchBackend):
    """Many processes: the model is sharded along the mesh's dp_shard and replicated along its dp_replicate (fully_shard).

    Built on the meta device: no rank ever holds the whole model. Shards are float32 and gathered in param_dtype.
    """

    def __init__(self, config: Config, device: torch.device, world: World) -> None:
        replicate, self._shards = mesh_shape(config.parallel, world.size)
        self.mesh = _make_mesh(device, replicate, self._shards)
        with torch.device("meta"):
            model = TarFlow(config.model)
        apply_parallelism(model, config, self.mesh)
        model.to_empty(device=device)
        self._parameters: dict[str, DTensor] = dict(model.named_parameters())  # type: ignore[arg-type]
        for name, value in initial_values(model, config.train.seed):
            self._fill(self._parameters[name], value)
        with torch.no_grad():
            model.var.fill_(1)
        group = self.mesh.get_group("dp_shard") if self._shards > 1 else None
        super().__init__(model, config, device, group)

    def _make_locals(self) -> dict[str, Tensor]:
        return {name: _local(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def _fill(self, parameter: DTensor, whole: Tensor) -> None:
        """Copy this rank's rows of a whole value into its shard."""
        pieces = whole.chunk(self._shards)
        place = self.mesh.get_local_rank("dp_shard")
        if place < len(pieces):
            _local(parameter).copy_(pieces[place])

    def forward_backward(
        self, images: Tensor, labels: Tensor | None, share: float, last: bool = True, noise: Tensor | None = None
    ) -> Tensor:
        """As in one process; gradients are reduced over ranks after the step's last micro-batch only."""
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return super().forward_backward(images, labels, share, last, noise)

    def _collect_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            grad = parameter.grad
            assert isinstance(grad, DTensor), name
            self._locals[name].grad = grad.to_local()
            parameter.grad = None

    def to_saved(self, name: str, local: Tensor) -> Tensor:
        """The whole tensor, of which this is a rank's piece, laid out as the weight `name`."""
        p = self._parameters[name]
        # The shape is given, since it cannot be inferred from pieces of uneven sizes.
        return DTensor.from_local(local, self.mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _make_mesh(device: torch.device, replicate: int, shard: int) -> DeviceMesh:
    """(dp_replicate, dp_shard), or dp_shard alone where there is one replica.

    On a mesh of two dimensions torch all-reduces every unit's gradients over the replicas, however few: with one, that is
    a collective and its stream for nothing.
    """
    if replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))


def _local(parameter: Tensor) -> Tensor:
    """The piece of a sharded parameter that this rank holds, sharing its memory."""
    piece = parameter.detach()
    assert isinstance(piece, DTensor)
    return piece.to_local()
