"""Certificates of samples: how far the noise that each is the exact image of lies from the noise asked for, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Certificates:
    """Those of the samples that have one, by index."""

    indices: list[int] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)  # per sample: of each block, in the flow's forward order

    def add(self, indices: Sequence[int], certificate: Tensor) -> None:
        """A batch, [n, blocks]; rows of NaN alone have none."""
        for index, row in zip(indices, certificate.tolist()):
            if not all(np.isnan(row)):
                self.indices.append(index)
                self.rows.append(row)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """For the file of a chunk, and of a result."""
        blocks = len(self.rows[0]) if self.rows else 0
        return {
            "certified": np.array(self.indices, dtype=np.int64),
            "certificate": np.array(self.rows, dtype=np.float64).reshape(len(self.rows), blocks),
        }

    def merge(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Add another chunk's `arrays`."""
        self.indices += arrays["certified"].tolist()
        self.rows += arrays["certificate"].tolist()

    def describe(self) -> dict[str, Any]:
        """Plain values for result files: of each sample its largest block counts; three digits."""
        if not self.rows:
            return {"samples": 0}
        blocks = np.array(self.rows)
        known = blocks[np.isfinite(blocks).all(1)]
        found: dict[str, Any] = {"samples": len(blocks), "not_finite": len(blocks) - len(known)}
        if len(known):
            worst = known.max(1)
            found["maximum"] = _digits(worst.max())
            found["quantiles"] = {f"{q:g}": _digits(np.quantile(worst, q)) for q in QUANTILES}
            found["maximum_by_block"] = [_digits(value) for value in known.max(0)]
        return found

    def __str__(self) -> str:
        found, number = self.describe(), len(self.rows)
        return f"at most {found['maximum']:g} in {number} sample{'s' * (number != 1)}" if "maximum" in found else "none"


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
