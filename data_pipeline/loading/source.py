"""What a loader asks of a source of batches, which is `indexed` or a `stream`: batches from a position on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.batch import Batch
from tarflow.data_pipeline.loading.sample_reader import Skipped


@dataclass(frozen=True)
class StreamCursor:
    """Where one rank of a stream without an index is: behind the first `drawn` samples of shard number `place`.

    `place` counts through the endless sequence of shards, of which rank r of W reads r, r + W, r + 2W, ...
    """

    rank: int
    world_size: int
    place: int
    drawn: int


@dataclass(frozen=True)
class Position:
    """Where a loader is: behind `images_seen` images of all ranks together (any number >= 0). Raises DataError.

    `cursor`: where exactly this rank of a stream is. Without one, and always where there is an index, `images_seen` decides.
    """

    images_seen: int = 0
    cursor: StreamCursor | None = None

    def __post_init__(self) -> None:
        if self.images_seen < 0:
            raise DataError(f"data.images_seen cannot be {self.images_seen!r}")


@dataclass(frozen=True)
class Delivery:
    """A batch, the bad samples in it that were replaced, and the position behind it."""

    batch: Batch
    replaced: list[Skipped]
    after: Position


class BatchSource(Protocol):
    """Where a loader's batches come from. One iteration at a time: `batches` and `close` end the one before."""

    reader: str  # `indexed`, `mds`, `stream` or `custom`

    @property
    def fingerprint(self) -> str:
        """What identifies the data; with other data, the order is another one."""

    @property
    def num_samples(self) -> int:
        """Samples per epoch. Raises DataError where that is not known."""

    @property
    def order_settings(self) -> dict[str, int]:
        """What the order depends on besides the data: a position in one order means nothing in another."""

    def batches(self, position: Position) -> Iterator[Delivery]:
        """Endless: the share of this rank in every global batch from `position` on. Raises DataError."""

    def worker_pids(self) -> list[int]:
        """Process ids of the workers of the current iteration; empty without workers."""

    def close(self) -> None:
        """Stop the workers or the thread. Batches that were handed out stay valid."""


def empty_batch(
    rows: int, pixels: tuple[int, int, int], pin_memory: bool
) -> tuple[torch.Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """(images uint8 [rows, H, W, C], labels int64 [rows], ids int64 [rows]) to be filled."""
    images = torch.empty((rows, *pixels), dtype=torch.uint8, pin_memory=pin_memory)
    return images, np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.int64)


def to_state(source: BatchSource, position: Position) -> dict[str, Any]:
    """The position as plain numbers and texts, with what it is valid for."""
    cursor = None if position.cursor is None else dict(vars(position.cursor))
    return {
        "images_seen": position.images_seen,
        "fingerprint": source.fingerprint,
        "order": source.order_settings,
        "stream": cursor,
    }


def from_state(source: BatchSource, state: dict[str, Any]) -> Position:
    """The position that `to_state` wrote. Raises DataError where it is damaged, or of other data or another order."""
    _check_keys(state, {"images_seen": int, "fingerprint": str, "order": dict, "stream": dict | None}, "")
    if state["fingerprint"] != source.fingerprint:
        raise DataError(
            f"the state of the loader belongs to the data set with fingerprint {state['fingerprint']}, data.train has "
            f"{source.fingerprint}: a position in one means nothing in the other"
        )
    _check_keys(state["order"], dict.fromkeys(source.order_settings, int), "order.")
    for name, value in source.order_settings.items():
        if state["order"][name] != value:
            raise DataError(
                f"the state of the loader was saved with {name}={state['order'][name]}, this loader has {name}={value}: "
                "its samples come in another order"
            )
    if state["images_seen"] < 0:
        raise DataError(f"the state of the loader cannot have images_seen={state['images_seen']}")
    if state["stream"] is None:
        return Position(state["images_seen"])
    return Position(state["images_seen"], _cursor(state["stream"]))


def _cursor(plain: dict[str, Any]) -> StreamCursor:
    _check_keys(plain, {"rank": int, "world_size": int, "place": int, "drawn": int}, "stream.")
    cursor = StreamCursor(**plain)
    own_shard = 0 <= cursor.rank < cursor.world_size and cursor.place % cursor.world_size == cursor.rank
    if cursor.place < 0 or cursor.drawn < 0 or not own_shard:
        raise DataError(f"the state of the loader holds a position in a stream that cannot be: {plain}")
    return cursor


def _check_keys(state: Any, expected: dict[str, Any], prefix: str) -> None:
    """Raise DataError unless `state` is a dictionary with exactly these keys and values of these types."""
    if not isinstance(state, dict) or state.keys() != expected.keys():
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        names = ", ".join(prefix + name for name in expected)
        raise DataError(f"the state of the loader must have {names}, and nothing else; found: {found}")
    for name, kind in expected.items():
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise DataError(f"the state of the loader cannot have {prefix}{name}={state[name]!r}")
