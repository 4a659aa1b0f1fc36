"""AdamW that clips to a global norm and passes over bad steps, all on the device (case T14).

A step whose gradient norm is not finite, or stands more than `SIGMAS` standard deviations above the recent ones, changes
nothing: no weight, no moment, no step count. The decision is taken from the *global* norm, which is the same number on
every rank, so all ranks take the same one; the host learns of it only when it reads the counters.

A spike comes and goes; a new level stays. So a norm that was passed over is remembered too, cut to the threshold that it
broke: one spike moves the threshold little, but a level that stays is soon no spike any more (up to three times the old one
within `train.max_skipped_in_a_row` steps of its default). The standard deviation counts as `FLOOR` of the mean at least,
for norms that hardly vary. Where the norms are above `grad_clip`, every step is cut to the same length: there only a norm
several times the usual one is a spike.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

SIGMAS = 6.0
FLOOR = 0.05  # of the mean: the smallest standard deviation that is believed
CLIPPED_FLOOR = 1.0  # the same where all steps are clipped
WINDOW = 128  # norms remembered
WARMUP = 32  # norms needed before a spike can be told from the beginning of training


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW over this rank's plain float32 tensors.

    `group`: ranks whose tensors together make up the gradient, None if each rank has all of it. `grad_clip`: largest
    global norm, 0 = off. `skip_spikes`: whether spikes are passed over, too; non-finite steps always are. An engine that
    puts tensors of its own in the place of `params` later says `make_moments=False` and on which `device` those live.
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
        self.calls = 0  # of step(): an engine may leave one out
        self.grad_norm = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), device=device)  # in all
        self.skipped_in_a_row = torch.zeros((), device=device)
        self._norms = torch.zeros(WINDOW, device=device)
        self._remembered = torch.zeros((), dtype=torch.long, device=device)
        if make_moments:
            self._make_moments()

    def _make_moments(self) -> None:
        """Made now instead of at the first step: a checkpoint is loaded into them."""
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p] = {
                        "step": torch.zeros((), dtype=torch.float32, device=p.device),
                        "exp_avg": torch.zeros_like(p, requires_grad=False),
                        "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
                    }

    def guard_state(self) -> dict[str, Tensor]:
        """What a resumed run needs to decide as the uninterrupted one."""
        return {
            "norms": self._norms,
            "remembered": self._remembered,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the masters, or skip the step if the guard says so; no closure is taken."""
        assert closure is None
        self.calls += 1
        norm = self._global_norm()
        highest = self._highest_ordinary_norm()
        bad = ~torch.isfinite(norm) | (norm > highest)
        self._remember(norm, highest, bad)
        self.grad_norm.copy_(norm)
        # The fused kernel divides gradients by `grad_scale` and does nothing at all where `found_inf` is 1.
        self.found_inf = bad.float()
        if self.grad_clip:
            self.grad_scale = torch.where(bad, 1.0, (norm / self.grad_clip).clamp(min=1.0))
        super().step()

    @torch.no_grad()
    def record_skipped_step(self) -> None:
        """Count a step that an engine skipped by itself, because it saw that the gradient was not finite."""
        self.calls += 1
        self.grad_norm.fill_(float("nan"))
        self.skipped_steps += 1
        self.skipped_in_a_row += 1

    def _global_norm(self) -> Tensor:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        # In float64: the norm of a long flat partition loses five digits in float32 on a CPU.
        dtype = torch.float32 if self.grad_norm.device.type == "mps" else torch.float64
        squares = torch.zeros((), dtype=dtype, device=self.grad_norm.device)
        if grads:
            squares = torch.stack(torch._foreach_norm(grads, 2, dtype)).square().sum()
        if self.group is not None:
            dist.all_reduce(squares, group=self.group)
        return squares.sqrt().to(torch.float32)

    def _highest_ordinary_norm(self) -> Tensor:
        """The norm above which a step is a spike; infinite where that is not asked for or cannot be told yet."""
        infinite = torch.full_like(self.grad_norm, float("inf"))
        if not self.skip_spikes:
            return infinite
        count = self._remembered.clamp(max=WINDOW)
        known = torch.arange(WINDOW, device=count.device) < count
        mean = (self._norms * known).sum() / count.clamp(min=1)
        std = (((self._norms - mean) * known).square().sum() / count.clamp(min=1)).sqrt()
        floor = mean * FLOOR
        if self.grad_clip:
            floor = torch.where(mean > self.grad_clip, mean * CLIPPED_FLOOR, floor)
        return torch.where(count >= WARMUP, mean + SIGMAS * torch.maximum(std, floor), infinite)

    def _remember(self, norm: Tensor, highest: Tensor, bad: Tensor) -> None:
        """Keep the last finite norms in a ring, none above the threshold of its step; count the bad steps."""
        finite = torch.isfinite(norm)
        # Not by `self._norms[place]`: a tensor of no dimensions as an index waits for the device to read it.
        here = torch.arange(WINDOW, device=norm.device) == self._remembered % WINDOW
        self._norms.copy_(torch.where(here & finite, torch.minimum(norm, highest), self._norms))
        self._remembered += finite.long()
        self.skipped_steps += bad.float()
        self.skipped_in_a_row.copy_((self.skipped_in_a_row + 1) * bad.float())
