"""AdamW that clips by global norm and skips bad steps, without a host sync.

A step whose gradient norm is not finite, or is more than `SIGMAS` standard deviations above the mean of recent norms,
changes nothing: no weight, no moment, no step count. The decision depends on the *global* norm alone, which is the same
number on every rank, so all ranks skip together; the host learns of it when it reads the counters.

A spike passes; a new level of the norm stays. So the norms of skipped steps are recorded too, clamped to the threshold that
they exceeded: a single spike hardly moves the threshold, while a new level is accepted after some steps (up to three times
the old level within the default of `train.max_skipped_in_a_row`). The standard deviation is at least `FLOOR` of the mean,
for norms that hardly vary. Where norms exceed `grad_clip`, clipping makes all steps equally long, so that only a norm several
times the usual one is a spike.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

SIGMAS = 6.0
FLOOR = 0.05  # smallest standard deviation, as a fraction of the mean
CLIPPED_FLOOR = 1.0  # the same where all steps are clipped
WINDOW = 128  # recent norms
WARMUP = 32  # norms before spikes are looked for: the first ones fall fast


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW over this rank's plain float32 tensors.

    `group`: the ranks over which the gradient is sharded; None if each rank has all of it. `grad_clip`: maximum global
    norm, 0 = off. `skip_spikes`: skip spikes too; steps that are not finite are always skipped. An engine that replaces
    `params` by tensors of its own later passes `make_moments=False` and the `device` of those tensors.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float = 0.0,
        skip_spikes: bool = False,
        group: dist.ProcessGroup | None = None,
        make_moments: bool = True,
        device: torch.device | None = None,
    ) -> None:
        tensors = list(params) if not make_moments else [p for p in params if p.numel()]
        device = device or tensors[0].device
        super().__init__(tensors, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.grad_clip, self.skip_spikes, self.group = grad_clip, skip_spikes, group
        self.calls = 0  # of step(): an engine may omit one
        self.grad_norm = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)  # since the run began
        self.skipped_in_a_row = torch.zeros((), device=device)
        self._norms = torch.zeros(WINDOW, device=device)
        self._recorded = torch.zeros((), dtype=torch.long, device=device)
        if make_moments:
            self._make_moments()

    def _make_moments(self) -> None:
        """Make the moments now rather than at the first step, so that a checkpoint can be loaded into them."""
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p] = {
                        "step": torch.zeros((), dtype=torch.float32, device=p.device),
                        "exp_avg": torch.zeros_like(p, requires_grad=False),
                        "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
                    }

    def guard_state(self) -> dict[str, Tensor]:
        """State that is saved so a resumed run makes the same skip decisions."""
        return {
            "norms": self._norms,
            "remembered": self._recorded,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the weights, or skip the step. `closure` is not supported."""
        assert closure is None
        self.calls += 1
        norm = self._global_norm()
        highest = self._highest_ordinary_norm()
        bad = ~torch.isfinite(norm) | (norm > highest)
        self._record(norm, highest, bad)
        self.grad_norm.copy_(norm)
        # The fused kernel divides gradients by `grad_scale` and does nothing at all where `found_inf` is 1.
        self.found_inf = bad.float()
        if self.grad_clip:
            self.grad_scale = torch.where(bad, 1.0, (norm / self.grad_clip).clamp(min=1.0))
        super().step()

    @torch.no_grad()
    def record_skipped_step(self) -> None:
        """Count a step that an engine skipped on its own, for a gradient that was not finite."""
        self.calls += 1
        self.grad_norm.fill_(float("nan"))
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    def _global_norm(self) -> Tensor:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        # In float64: on a CPU, the norm of a long flat partition loses five digits in float32.
        dtype = torch.float32 if self.grad_norm.device.type == "mps" else torch.float64
        squares = torch.zeros((), dtype=dtype, device=self.grad_norm.device)
        if grads:
            squares = torch.stack(torch._foreach_norm(grads, 2, dtype)).square().sum()
        if self.group is not None:
            dist.all_reduce(squares, group=self.group)
        return squares.sqrt().to(torch.float32)

    def _highest_ordinary_norm(self) -> Tensor:
        """The norm above which a step is a spike; infinite during warmup and without `skip_spikes`."""
        infinite = torch.full_like(self.grad_norm, float("inf"))
        if not self.skip_spikes:
            return infinite
        count = self._recorded.clamp(max=WINDOW)
        known = torch.arange(WINDOW, device=count.device) < count
        mean = (self._norms * known).sum() / count.clamp(min=1)
        std = (((self._norms - mean) * known).square().sum() / count.clamp(min=1)).sqrt()
        floor = mean * FLOOR
        if self.grad_clip:
            floor = torch.where(mean > self.grad_clip, mean * CLIPPED_FLOOR, floor)
        return torch.where(count >= WARMUP, mean + SIGMAS * torch.maximum(std, floor), infinite)

    def _record(self, norm: Tensor, highest: Tensor, bad: Tensor) -> None:
        """Record the norm, clamped to the threshold, in a ring buffer unless it is not finite; count bad steps."""
        finite = torch.isfinite(norm)
        # Not `self._norms[place] = norm`: indexing by a 0-d tensor syncs with the device.
        here = torch.arange(WINDOW, device=norm.device) == self._recorded % WINDOW
        self._norms.copy_(torch.where(here & finite, torch.minimum(norm, highest), self._norms))
        self._recorded += finite.long()
        self.skipped_steps += bad.float()
        self.skipped_in_a_row.copy_((self.skipped_in_a_row + 1) * bad.float())
