"""The pictures of a result: grids of samples, neighbours in the training data, the trajectory from noise to image.

grid.png           samples as configured, a row per class
grid-noisy.png     the same before denoising           (when there is denoising)
grid-unguided.png  the same noise without guidance     (when there is guidance)
neighbours.png     samples above their nearest training images
trajectory.png     one sample a row: noise, after each block, denoised
denoising.png      one sample a row: at some noise levels from t1 to 0 (where denoising takes several steps)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tarflow.evaluation.metrics.nearest_neighbours import Neighbours
from tarflow.evaluation.samples.draw import Drawn, Sampler
from tarflow.evaluation.samples.grid import grid_indices, make_grid
from tarflow.evaluation.samples.png_folder import save_png
from tarflow.models.noise import to_pixels

NEIGHBOUR_COLUMNS = 10
TRAJECTORY_ROWS = 4
STRIP_COLUMNS = 9  # of states of iterative denoising


class GridImages:
    """The images of a grid: collected from batches that are drawn anyway; the rest is drawn at the end."""

    def __init__(self, rows: int, columns: int, num_classes: int) -> None:
        self.columns = columns
        self.indices = grid_indices(rows, columns, num_classes)
        self._wanted = set(self.indices)
        self._images: dict[int, Tensor] = {}
        self._noisy: dict[int, Tensor] = {}
        self._seen: set[int] = set()

    def add(self, drawn: Drawn) -> None:
        """Keep the images of a batch that are in the grid; a sample that is not finite leaves its cell empty."""
        for row, (index, good) in enumerate(zip(drawn.indices, drawn.finite.tolist())):
            if index in self._wanted:
                self._seen.add(index)
                if good:
                    self._images[index] = to_pixels(drawn.images[row])
                    self._noisy[index] = to_pixels(drawn.noisy[row])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The images kept, as arrays for a chunk's file."""
        kept_indices = sorted(self._images)
        pictures = {"images": self._images, "noisy": self._noisy}
        stacked = {
            name: np.stack([kept[i].numpy() for i in kept_indices]) for name, kept in pictures.items() if kept_indices
        }
        seen = np.array(sorted(self._seen), dtype=np.int64)
        return {"seen": seen, "index": np.array(kept_indices, dtype=np.int64), **stacked}

    def merge(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Add another chunk's `arrays`."""
        self._seen |= set(arrays["seen"].tolist())
        for row, index in enumerate(arrays["index"].tolist()):
            self._images[index] = torch.from_numpy(arrays["images"][row])
            self._noisy[index] = torch.from_numpy(arrays["noisy"][row])

    def complete(self, sampler: Sampler, batch_size: int) -> None:
        """Draw the images that were in no batch."""
        rest = [index for index in self.indices if index not in self._seen]
        for drawn in sampler.draw_all(rest, batch_size):
            self.add(drawn)

    def save(self, path: Path, noisy: bool = False) -> None:
        """Write the grid, unless all of its cells are empty."""
        images = self._noisy if noisy else self._images
        if images:
            save_png(path, make_grid([images.get(index) for index in self.indices], self.columns))


def save_grids(folder: Path, grid: GridImages, sampler: Sampler, rows: int, batch_size: int) -> None:
    """The grid as configured, before denoising, and without guidance."""
    sampling = sampler.sampling
    grid.complete(sampler, batch_size)
    grid.save(folder / "grid.png")
    if sampling.denoise_multiplier:
        grid.save(folder / "grid-noisy.png", noisy=True)
    if sampling.settings.guidance:
        unguided = Sampler(sampler.model, sampling.with_changes(guidance=0.0), sampler.batches)
        unguided.plan = sampler.plan  # any plan gives the same images
        plain = GridImages(rows, grid.columns, sampler.model.config.num_classes)
        plain.complete(unguided, batch_size)
        plain.save(folder / "grid-unguided.png")


def save_neighbours(path: Path, samples: Tensor, neighbours: Neighbours) -> None:
    """Samples uint8 [n, C, H, W] above their nearest training images, ten at most."""
    shown = min(NEIGHBOUR_COLUMNS, len(samples))
    save_png(path, make_grid([*samples[:shown], *neighbours.nearest[:shown]], columns=shown))


def save_trajectory(path: Path, sampler: Sampler, indices: Sequence[int]) -> None:
    """One sample a row: the noise, the image after each block, and after denoising. Clipped to the range of pixels."""
    drawn = sampler.draw(indices, with_trajectory=True)
    columns = [step.cpu() for step in drawn.trajectory] + (
        [drawn.images] if sampler.sampling.denoise_multiplier else []
    )
    _save_rows(path, columns)
    if states := drawn.denoising:
        last = len(states) - 1
        shown = sorted({round(k * last / (STRIP_COLUMNS - 1)) for k in range(STRIP_COLUMNS)})
        _save_rows(path.with_name("denoising.png"), [states[number] for number in shown])


def _save_rows(path: Path, columns: Sequence[Tensor]) -> None:
    images = [_shown(column[row]) for row in range(len(columns[0])) for column in columns]
    if any(image is not None for image in images):
        save_png(path, make_grid(images, columns=len(columns)))


def _shown(image: Tensor) -> Tensor | None:
    return to_pixels(image) if torch.isfinite(image).all() else None
