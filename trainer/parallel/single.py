"""One process, one device: float32 master weights, and a bfloat16 copy that computes if so configured.

The cast happens once per step, in one call for all parameters, instead of in every product of every forward pass.
"""

import torch
from torch import Tensor

from models.flow import TarFlow, flow_loss
from trainer.config import OptimConfig


class SingleBackend:
    """Plain training on one device."""

    rank = 0
    world_size = 1

    def __init__(self, model: TarFlow, optim: OptimConfig, param_dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.model = model.to(device)
        names = [name for name, _ in model.named_parameters()]
        self._computing = list(model.parameters())
        if param_dtype == torch.float32:
            self._masters: list[Tensor] = list(self._computing)
        else:
            self._masters = [p.detach().clone().requires_grad_() for p in self._computing]
            for parameter in self._computing:
                parameter.data = parameter.data.to(param_dtype)
                parameter.register_post_accumulate_grad_hook(self._collect)
        self._master_of = dict(zip(map(id, self._computing), self._masters))
        self._named: dict[str, Tensor] = dict(zip(names, self._masters))
        self.optimizer = torch.optim.AdamW(
            self._masters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=device.type != "mps"
        )
        self._make_optimizer_state()
        self._vp_mean_square: Tensor | None = None

    def _collect(self, parameter: Tensor) -> None:
        """Move a bfloat16 gradient to its float32 master, where micro-batches add up without loss."""
        master, grad = self._master_of[id(parameter)], parameter.grad
        assert grad is not None
        if master.grad is None:
            master.grad = grad.float()
        else:
            master.grad.add_(grad)
        parameter.grad = None

    def _make_optimizer_state(self) -> None:
        """AdamW makes its moments at the first step; we need them before, as places to load a checkpoint into."""
        for master in self._masters:
            self.optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=self.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def forward_backward(self, images: Tensor, labels: Tensor | None, share: float) -> Tensor:
        z, logdet = self.model(images, labels)
        loss = flow_loss(z, logdet).mean() * share
        loss.backward()
        with torch.no_grad():
            mean_square = z.square().mean(0) * share
            if not self.model.config.nvp:
                self._vp_mean_square = mean_square + (0 if self._vp_mean_square is None else self._vp_mean_square)
            return torch.stack([loss.detach(), mean_square.mean(), logdet.mean() * share])

    def optimizer_step(self, lr: float, grad_clip: float) -> Tensor:
        grads = [m.grad for m in self._masters if m.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self._masters, grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loaded()
        if self._vp_mean_square is not None:
            self.model.update_prior(self._vp_mean_square)
            self._vp_mean_square = None
        return norm

    def parameters(self) -> dict[str, Tensor]:
        return self._named

    def state(self) -> dict[str, Tensor]:
        tensors = {f"model/{name}": p.detach() for name, p in self._named.items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors |= {f"optim/{moment}/{name}": self.optimizer.state[p][moment] for name, p in self._named.items()}
        # One step count serves all parameters: they are always updated together.
        return tensors | {"optim/step": self.optimizer.state[self._masters[0]]["step"], "buffer/var": self.model.var}

    @torch.no_grad()
    def loaded(self) -> None:
        if self._computing[0].dtype != torch.float32:
            torch._foreach_copy_([p.data for p in self._computing], [m.detach() for m in self._masters])
        step = self.optimizer.state[self._masters[0]]["step"]
        for master in self._masters[1:]:
            self.optimizer.state[master]["step"].copy_(step)
