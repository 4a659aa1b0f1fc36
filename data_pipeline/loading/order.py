"""Maps stream position to sample id: a pure function of (seed, shard sizes, settings).

The stream has no end. Position p (the value of `images_seen` when that sample is drawn) is place p % N of epoch p // N,
where N is the number of samples. Global batch k holds positions k*G .. k*G+G-1, so a batch may straddle the end
of an epoch and THERE ARE NO INCOMPLETE BATCHES: every epoch holds every sample exactly once whatever the global batch
size, and nothing here depends on ranks or workers. A changed batch size or world continues at the same position.

Within an epoch:
1. the shards are permuted, keyed by (seed, epoch), and laid end to end (only their cumulative counts are kept);
2. that line is cut into `num_canonical_nodes` parts of equal length (the first N % C parts are one longer);
3. inside each part, blocks of `shuffle_block` samples are permuted, keyed by (seed, epoch, part, block), so a reader
   touches only the few shards of the current block and memory stays bounded for any size of data set;
4. the epoch deals from the parts in turn: place q belongs to canonical node q % C.

Ranks take slots (places in the global batch) sorted by canonical node, in equal pieces, so that a node reads almost
only its own part while batch k stays the same set in the same slots for every world size.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.errors import DataError

_CACHE_BYTES = 32 << 20


class Order:
    """The order of one data set's samples.

    `shard_sizes`: samples in each shard, in index order (zeros allowed). Sample ids count through the shards in that
    order, 0 .. N-1. Raises DataError for an empty data set or a setting below 1.
    """

    def __init__(
        self, shard_sizes: NDArray[np.int64], *, seed: int = 0, num_canonical_nodes: int = 1, shuffle_block: int = 65536
    ) -> None:
        for name, value in (("num_canonical_nodes", num_canonical_nodes), ("shuffle_block", shuffle_block)):
            if value < 1:
                raise DataError(f"{name} is {value}, it must be at least 1")
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if sizes.ndim != 1 or (sizes < 0).any():
            raise DataError(f"shard_sizes must be a list of counts, got shape {sizes.shape}")
        self.shard_sizes = sizes
        self.shard_starts = np.concatenate([[0], np.cumsum(sizes)])
        self.num_samples = int(self.shard_starts[-1])
        if self.num_samples == 0:
            raise DataError(f"the data set holds no samples ({len(sizes)} shards, all of them empty)")
        self.seed = seed
        self.num_canonical_nodes = num_canonical_nodes
        self.shuffle_block = shuffle_block
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], NDArray[np.int64]] = OrderedDict()
        self._block_bytes = 0

    def copy(self) -> Order:
        """The same order with caches of its own, for another thread."""
        return Order(
            self.shard_sizes, seed=self.seed, num_canonical_nodes=self.num_canonical_nodes, shuffle_block=self.shuffle_block
        )  # fmt: skip

    def ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids, int64 of the same shape, at these stream positions (int64 [n], >= 0, any order)."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.num_samples)
        out = np.empty_like(positions)
        if positions.size == 0:
            return out
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return self._ids_in_epoch(first, places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            out[chosen] = self._ids_in_epoch(epoch, places[chosen])
        return out

    def batch(self, images_seen: int, global_batch_size: int) -> NDArray[np.int64]:
        """Ids, int64 [G], of the global batch that starts at `images_seen`; entry i is slot i."""
        return self.ids(np.arange(images_seen, images_seen + global_batch_size, dtype=np.int64))

    def slots(self, images_seen: int, global_batch_size: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """Slots, int64 [G / world_size], that `rank` reads of the global batch that starts at `images_seen`."""
        check_world(global_batch_size, rank, world_size)
        share = global_batch_size // world_size
        if self.num_canonical_nodes == 1:
            return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)
        positions = np.arange(images_seen, images_seen + global_batch_size, dtype=np.int64)
        nodes = positions % self.num_samples % self.num_canonical_nodes
        return np.argsort(nodes, kind="stable")[rank * share : (rank + 1) * share]

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard, row inside the shard), both int64 of the shape of `ids`."""
        shards = np.searchsorted(self.shard_starts, ids, side="right") - 1
        return shards, ids - self.shard_starts[shards]

    def _ids_in_epoch(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        n, c, block = self.num_samples, self.num_canonical_nodes, self.shuffle_block
        parts, offsets = np.divmod(places, c) if c > 1 else (np.zeros_like(places), places)
        if c > 1:
            parts, offsets = offsets, parts  # place q is entry q // C of part q % C
        length, longer = divmod(n, c)
        starts = parts * length + np.minimum(parts, longer)
        blocks, inside = np.divmod(offsets, block)

        # One lookup per distinct (part, block): a batch touches about one block of each part.
        group = parts * (length // block + 2) + blocks
        by_group = np.argsort(group, kind="stable")
        edges = np.flatnonzero(np.diff(group[by_group])) + 1
        mixed = np.empty_like(offsets)
        for members in np.split(by_group, edges):
            part, number = int(parts[members[0]]), int(blocks[members[0]])
            size = min(block, length + (part < longer) - number * block)
            mixed[members] = self._block(epoch, part, number, size)[inside[members]]

        line = starts + blocks * block + mixed
        shards, ends = self._epoch(epoch)
        rank_in_line = np.searchsorted(ends, line, side="right")
        shard = shards[rank_in_line].astype(np.int64)
        return line - (ends[rank_in_line] - self.shard_sizes[shard]) + self.shard_starts[shard]

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shards in this epoch's order, end of each on the line)."""
        if epoch not in self._epochs:
            shards = keyed.permutation(keyed.key(self.seed, "shards", epoch), len(self.shard_sizes))
            self._epochs[epoch] = (shards, np.cumsum(self.shard_sizes[shards]))
            while len(self._epochs) > 2:  # a batch at an epoch's end needs two
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _block(self, epoch: int, part: int, number: int, size: int) -> NDArray[np.int64]:
        name = (epoch, part, number)
        if name in self._blocks:
            self._blocks.move_to_end(name)
            return self._blocks[name]
        mixed = keyed.permutation(keyed.key(self.seed, "samples", epoch, part, number), size)
        self._blocks[name] = mixed
        self._block_bytes += mixed.nbytes
        while self._block_bytes > _CACHE_BYTES and len(self._blocks) > 1:
            self._block_bytes -= self._blocks.popitem(last=False)[1].nbytes
        return mixed


def check_world(global_batch_size: int, rank: int, world_size: int) -> None:
    """Raise DataError unless the global batch divides evenly among the ranks; names the sizes that would."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise DataError(f"rank {rank} does not exist in a world of {world_size}")
    if global_batch_size < 1:
        raise DataError(f"global_batch_size is {global_batch_size}, it must be at least 1")
    if global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        near = " or ".join(str(size) for size in (below, below + world_size) if size)
        raise DataError(
            f"global_batch_size {global_batch_size} does not divide among {world_size} ranks; set it to {near}"
        )
