"""Post-hoc EMA: an average of any width, reconstructed after training from stored averages.

Karras et al., arXiv 2312.02696, section 3.2: every stored average is an integral of the weights over training time
against its profile, a power function that ends at the snapshot. Least squares fits the desired profile by these, and the
same combination of the stored averages is the desired average.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow.models.weights import save_weights_file, save_weights_folder
from tarflow.trainer.checkpoint.find import choose
from tarflow.trainer.checkpoint.marker import Checkpoint, config_of
from tarflow.trainer.checkpoint.provenance import names_of_checkpoint, provenance_of
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.chosen_sampling import chosen_sampling
from tarflow.trainer.config.ema import power_name
from tarflow.trainer.ema.ema import power_of_width
from tarflow.trainer.ema.snapshots import sources
from tarflow.trainer.errors import TrainerError

WORST_FIT = 0.1  # error relative to the profile's norm, beyond which the average would have another shape


@dataclass(frozen=True)
class Profile:
    """p(t) = (gamma + 1) t^gamma / end^(gamma + 1) for t in [0, end], in images seen: it integrates to one."""

    end: int
    relative_std: float

    def dot(self, other: "Profile") -> float:
        """Integral of p q over [0, the earlier end], in closed form; by logarithms, since the powers overflow."""
        a, b = power_of_width(self.relative_std), power_of_width(other.relative_std)
        earlier = min(self.end, other.end)
        log = a * np.log(earlier / self.end) + b * np.log(earlier / other.end)
        return float((a + 1) * (b + 1) / (a + b + 1) * np.exp(log) * earlier / self.end / other.end)


def fit(stored: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Coefficients [n] of the stored profiles, and the error of their sum relative to the wanted profile's norm.

    The coefficients are constrained to add up to one. Plain least squares only comes close, and a sum off by a thousandth
    is an error of a thousandth of each weight, which is large beside how far weights move within an average.
    """
    norms = np.sqrt([p.dot(p) for p in stored])
    size = np.sqrt(wanted.dot(wanted))
    gram = np.array([[p.dot(q) for q in stored] for p in stored]) / np.outer(norms, norms)
    target = np.array([p.dot(wanted) for p in stored]) / (norms * size)
    ones = size / norms  # of profiles scaled to norm one, these add up to the wanted one's integral
    system = np.block([[gram, ones[:, None]], [ones[None, :], np.zeros((1, 1))]])
    scaled = np.linalg.lstsq(system, np.append(target, 1.0), rcond=1e-13)[0][:-1]
    distance = scaled @ gram @ scaled - 2 * scaled @ target + 1
    return scaled * ones, float(np.sqrt(max(distance, 0.0)))


def reconstruct(
    run_dir: Path,
    relative_std: float,
    step: int | None,
    out: Path | None,
    log: Callable[[str], None],
    images: int | None = None,
    folder: bool = False,
) -> Path:
    """Reconstruct the average of a width at `step` or `images` (both None: the newest), and write it as a weights file.

    `folder`: `out` becomes a folder with model.safetensors, config.json and a model card. Returns its path. TrainerError for a
    width out of range, a file that cannot be written, no such checkpoint or several, no power averages stored, and too
    few of them for a fit within WORST_FIT.
    """
    if not 0 < relative_std < 0.28:
        raise TrainerError(f"--relative-std {relative_std:g}: a width lies between 0 and 0.28 of the run so far")
    if out is not None and ((not folder and out.suffix not in (".safetensors", ".pth")) or not out.parent.is_dir()):
        raise TrainerError(
            f"--out {out}: give a .safetensors or .pth file, or with / at its end a new folder, in a directory that exists"
        )
    if folder and out is not None and out.exists():
        raise TrainerError(f"--out {out} already exists: choose another name")
    moments = sources(run_dir, log)
    final = choose(moments, step, images, f"run {run_dir}", "averages")
    wanted = Profile(final.images_seen, relative_std)
    # Averages of later moments hold images that the wanted one has not seen.
    pairs = [(c, s) for c in moments if 0 < c.images_seen <= final.images_seen for s in _widths(c)]
    if not pairs:
        raise TrainerError(f"run {run_dir} stores no power averages: it was trained with ema.relative_stds=[]")
    coefficients, distance = fit([Profile(c.images_seen, std) for c, std in pairs], wanted)
    log(f"{len(pairs)} stored averages of {len({c.images_seen for c, _ in pairs})} moments up to {final.images_seen:,} images; "
        f"the profile of width {relative_std:g} is met within {distance:.1e} of its norm")  # fmt: skip
    if distance > WORST_FIT:
        raise TrainerError(
            f"the stored averages cannot make one of width {relative_std:g} (off by {distance:.0%} of its norm, "
            f"{WORST_FIT:.0%} at most). Widths near those of ema.relative_stds can be made; for more, train with a "
            "smaller ema.snapshot_every_images (0 = no snapshots)"
        )
    path = out or run_dir / f"{power_name(relative_std)}-{final.name}.safetensors"
    config, name = config_of(final), power_name(relative_std)
    sampling, _ = chosen_sampling(run_dir)
    classes = names_of_checkpoint(final, config)
    provenance = provenance_of(final, config, name, sampling, ema_relative_std=relative_std, classes=classes)
    save = save_weights_folder if folder else save_weights_file
    save(path, config.model, _combine(pairs, coefficients), provenance)
    return path


def _widths(checkpoint: Checkpoint) -> tuple[float, ...]:
    return config_of(checkpoint).ema.relative_stds


def _combine(pairs: Sequence[tuple[Checkpoint, float]], coefficients: NDArray[np.float64]) -> dict[str, Any]:
    """Weighted sum of stored averages in float64, loading one at a time; the prior's variance is the last one's."""
    total: dict[str, torch.Tensor] = {}
    for (checkpoint, std), coefficient in zip(pairs, coefficients.tolist()):
        weights = load_weights(checkpoint, power_name(std))
        variance = weights.pop("var")
        for name, tensor in weights.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + coefficient * tensor.double()
    return {name: t.float() for name, t in total.items()} | {"var": variance}
