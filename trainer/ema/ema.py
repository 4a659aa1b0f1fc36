"""Averages of the weights: power-function profiles, or a constant decay.

The profiles are those of Karras et al. (arXiv 2312.02696, section 3 and appendix C).

A power average of relative width s weighs past weights by a power of training time, so its memory grows with the run. Time
is `images_seen`, so batch size and world size do not change it. The averages are never swapped into the live model.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tarflow.trainer.config.ema import decay_name, power_name
from tarflow.trainer.parallel.backend import Backend


def power_of_width(relative_std: float) -> float:
    """Exponent gamma whose profile t^gamma has this relative standard deviation (equation 126 of the paper).

    Solves (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = s^2 for its positive root, s < 0.289.
    """
    t = relative_std**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_decay(relative_std: float, images_seen: int, batch: int) -> float:
    """Decay of the step that ends at `images_seen`: (1 - batch / images_seen)^(gamma + 1)."""
    return (1 - batch / images_seen) ** (power_of_width(relative_std) + 1)


class EMA:
    """Averages of a backend's local weights; a sharded model's averages are sharded the same way.

    `relative_stds`: widths of power averages. `decays`: decay per step of constant-decay averages.
    """

    def __init__(self, backend: Backend, relative_stds: tuple[float, ...], decays: tuple[float, ...] = ()) -> None:
        self._backend = backend
        self._sources = backend.locals()
        # Name of an average -> its decay at the step that ends at (images seen, images of the step).
        self._decays: dict[str, Callable[[int, int], float]] = {}
        for std in relative_stds:
            self._decays[power_name(std)] = partial(power_decay, std)
        for decay in decays:
            self._decays[decay_name(decay)] = lambda *_, decay=decay: decay
        self.averages = {name: {n: p.detach().clone() for n, p in self._sources.items()} for name in self._decays}

    @torch.no_grad()
    def update(self, images_seen: int, batch: int) -> None:
        """Add the weights after the step of `batch` images that ended at `images_seen`."""
        sources = list(self._sources.values())
        for name, average in self.averages.items():
            weight = 1 - self._decays[name](images_seen, batch)
            torch._foreach_lerp_(list(average.values()), sources, weight)

    def reset(self) -> None:
        """Set every average to the current weights."""
        for average in self.averages.values():
            for name, tensor in average.items():
                tensor.copy_(self._sources[name].detach())

    def state(self) -> dict[str, Tensor]:
        """All averages in the form that checkpoints hold, as "ema-0.050/NAME"."""
        return {
            f"{kind}/{name}": self._backend.to_saved(name, t)
            for kind, tensors in self.averages.items()
            for name, t in tensors.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Load tensors that came from `state()` and that a checkpoint has filled."""
        for kind, tensors in self.averages.items():
            for name, local in tensors.items():
                self._backend.from_saved(name, state[f"{kind}/{name}"], local)
