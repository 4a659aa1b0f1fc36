"""The order is a pure function: each id once per epoch, the same for every world, bounded in memory and time."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflow.data_pipeline import keyed
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.order import Order
from tests.helpers.effort import draws

PINNED = [10, 4, 2, 11, 6, 0, 9, 8, 7, 5, 3, 1, 2, 1, 9, 8, 4, 3, 7, 11, 10, 0, 5, 6]
PINNED_TWO = [10, 1, 9, 2, 7, 3, 8, 4, 0, 6, 11, 5]

shards = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@given(shards, st.integers(0, 5), st.integers(1, 9), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=draws(150), deadline=None)
def test_every_epoch_holds_every_id_once(sizes: list[int], seed: int, nodes: int, block: int, epoch: int) -> None:
    order = Order(np.array(sizes), seed=seed, num_canonical_nodes=nodes, shuffle_block=block)
    ids = order.batch(epoch * order.num_samples, order.num_samples)
    assert sorted(ids.tolist()) == list(range(sum(sizes)))


@given(shards, st.integers(1, 9), st.integers(1, 40), st.integers(1, 20), st.integers(0, 200), st.data())
@settings(max_examples=draws(150), deadline=None)
def test_ranks_share_a_batch_whatever_the_world(
    sizes: list[int], nodes: int, block: int, share: int, start: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, 8))
    order = Order(np.array(sizes), num_canonical_nodes=nodes, shuffle_block=block)
    batch = order.batch(start, share * world)
    gathered = np.full(share * world, -1)
    for rank in range(world):
        slots = order.slots(start, share * world, rank, world)
        assert len(slots) == share
        gathered[slots] = order.ids(start + slots)
    assert gathered.tolist() == batch.tolist()


@given(shards, st.integers(1, 5), st.integers(1, 40), st.lists(st.integers(1, 25), min_size=1, max_size=8))
@settings(max_examples=draws(100), deadline=None)
def test_the_stream_does_not_depend_on_how_it_is_cut(sizes: list[int], nodes: int, block: int, cuts: list[int]) -> None:
    order = Order(np.array(sizes), num_canonical_nodes=nodes, shuffle_block=block)
    whole = order.batch(0, sum(cuts))
    fresh = Order(np.array(sizes), num_canonical_nodes=nodes, shuffle_block=block)
    starts = np.concatenate([[0], np.cumsum(cuts)])
    pieces = [fresh.batch(int(starts[i]), cuts[i]) for i in reversed(range(len(cuts)))]
    assert np.concatenate(pieces[::-1]).tolist() == whole.tolist()


@pytest.mark.case("D13")
def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    sizes = np.full(20, 50)
    orders = {
        (seed, epoch): tuple(Order(sizes, seed=seed).batch(epoch * 1000, 1000)) for seed in (0, 1) for epoch in range(3)
    }
    assert len(set(orders.values())) == 6
    assert tuple(Order(sizes, seed=1).batch(2000, 1000)) == orders[1, 2]
    shard_orders = {
        tuple(dict.fromkeys((Order(sizes, seed=0, shuffle_block=1).batch(epoch * 1000, 1000) // 50).tolist()))
        for epoch in range(4)
    }
    assert len(shard_orders) == 4, "the order of the shards is frozen over epochs"


def test_the_order_is_pinned() -> None:
    """A change here changes the order of every run that resumes: never on purpose without a new format."""
    assert Order(np.array([3, 4, 5]), seed=7).batch(0, 24).tolist() == PINNED
    assert (
        Order(np.array([3, 4, 5]), seed=7, num_canonical_nodes=2, shuffle_block=4).batch(0, 12).tolist() == PINNED_TWO
    )


def test_a_node_reads_almost_only_its_share_of_the_shards() -> None:
    order = Order(np.full(64, 100), num_canonical_nodes=4, shuffle_block=200)
    touched: list[set[int]] = [set(), set(), set(), set()]
    for start in range(0, 6400, 64):
        for rank in range(4):
            ids = order.ids(start + order.slots(start, 64, rank, 4))
            touched[rank] |= set(order.locate(ids)[0].tolist())
    assert max(map(len, touched)) <= 64 // 4 + 2
    assert sum(map(len, touched)) <= 64 + 4


def test_neighbours_are_mixed() -> None:
    """Within a block all permutations look alike: the mean distance of neighbours is a third of the block."""
    ids = Order(np.array([100_000]), shuffle_block=100_000).batch(0, 100_000)
    assert abs(np.abs(np.diff(ids)).mean() / 100_000 - 1 / 3) < 0.01
    assert abs(np.corrcoef(ids, np.arange(100_000))[0, 1]) < 0.01


def test_permutations_are_uniform() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for i in range(6000):
        mixed = tuple(keyed.permutation(keyed.key(0, "test", i), 3).tolist())
        counts[mixed] = counts.get(mixed, 0) + 1
    assert len(counts) == 6
    assert all(850 < count < 1150 for count in counts.values()), counts


def test_400_million_samples_stay_small_and_quick() -> None:
    tracemalloc.start()
    started = time.perf_counter()
    order = Order(np.full(40_000, 10_000), num_canonical_nodes=8)
    order.batch(0, 4096)
    first = time.perf_counter() - started
    started = time.perf_counter()
    order.batch(7_123_456_789, 4096)
    jump = time.perf_counter() - started
    for step in range(40):
        order.batch(7_123_456_789 + 4096 * step, 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first < 2
    assert jump < 2
    assert peak < 64 << 20


@pytest.mark.parametrize("settings", [{"num_canonical_nodes": 0}, {"shuffle_block": 0}])
def test_settings_out_of_range_are_named(settings: dict[str, int]) -> None:
    with pytest.raises(DataError, match=next(iter(settings))):
        Order(np.array([5]), **settings)


def test_an_empty_data_set_and_an_uneven_world_are_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        Order(np.array([0, 0]))
    with pytest.raises(DataError, match="10 does not divide among 4 ranks; set it to 8 or 12"):
        Order(np.array([5])).slots(0, 10, 0, 4)
