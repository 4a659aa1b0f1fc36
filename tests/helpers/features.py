"""For stand-ins of a feature network. Torch is not loaded."""

from typing import Any


class NoSpatial:
    """The part of a stand-in without spatial features."""

    spatial_dim = 0

    def __call__(self, images: Any) -> Any:
        raise NotImplementedError

    def with_spatial(self, images: Any) -> tuple[Any, Any]:
        """Features [n, d], and [n, 0]."""
        rows = self(images)
        return rows, rows.new_zeros(len(rows), 0)
