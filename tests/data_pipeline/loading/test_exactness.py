"""Shows 1 of the data room: whatever the sizes, the world, the workers and the interruptions, the stream is one.

The reference is the uninterrupted run of a single process without workers. Every picture shows its own id, so what is
compared is what was decoded, not what the loader says of itself.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tests.helpers.effort import draws

# Uneven, tiny and empty shards.
shard_sizes = st.lists(st.one_of(st.just(0), st.integers(1, 3), st.integers(4, 14)), min_size=1, max_size=6).filter(
    lambda sizes: sum(sizes) > 0
)


batch_sizes = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24, 42])


@st.composite
def one_run(draw: st.DrawFn, size: int, processes: bool) -> tuple[int, int, int]:
    """(world 1-8 that divides the global batch, workers 0-3, global batches); at most four processes at a time."""
    worlds = [world for world in range(1, 9) if size % world == 0]
    world = draw(st.sampled_from([world for world in worlds if world <= 4] if processes else worlds))
    workers = draw(st.integers(1, 3 if world == 1 else 4 // world)) if processes else 0
    return world, workers, draw(st.integers(0, 4))


def run(
    data: Path,
    lab: SimpleNamespace,
    world: int,
    count: int,
    *,
    size: int,
    seed: int,
    images_seen: int = 0,
    **options: Any,
) -> list[list[int]]:
    """The ids of `count` global batches as the pictures show them, put together by slot from all ranks."""
    out = np.full((count, size), -1)
    for rank in range(world if count else 0):
        place = BatchShard(size, images_seen, rank, world, seed)
        with Loader(DataSettings.of(data, **options), ImageShape(8), place) as loader:
            for step, batch in enumerate(itertools.islice(loader, count)):
                shown = [lab.number_of(image) for image in batch.images]
                assert shown == batch.ids.tolist()
                out[step, batch.slots.numpy()] = shown
    assert out.min(initial=0) >= 0, "a slot was filled by no rank"
    return out.tolist()


def check(root: Path, lab: SimpleNamespace, data: st.DataObject, processes: bool) -> None:
    sizes = data.draw(shard_sizes, "shard sizes")
    total = sum(sizes)
    size = data.draw(batch_sizes, "global batch")
    runs = data.draw(st.lists(one_run(size, processes), min_size=1, max_size=2), "runs")
    last = data.draw(one_run(size, False), "the last run")
    options: dict[str, Any] = {
        "size": size,
        "num_canonical_nodes": data.draw(st.integers(1, 4), "canonical nodes"),
        "shuffle_block": data.draw(st.sampled_from([1, 3, 7, 65536]), "block"),
        "seed": data.draw(st.integers(0, 3), "seed"),
    }
    build_index(root, lab.write_shards(root, sizes))
    # Interrupt at the end of an epoch, right before or behind it, or anywhere.
    first = data.draw(
        st.sampled_from([total // size, -(-total // size), 1]) | st.integers(0, 5), "batches before the first stop"
    )
    runs[0] = (runs[0][0], runs[0][1], first)
    more = max(1, -(-2 * total // size) - sum(count for _, _, count in runs))  # go on to the end of the second epoch
    runs.append((last[0], 0, more))

    steps = sum(count for _, _, count in runs)
    reference = run(root, lab, 1, steps, **options)
    stream = list(itertools.chain.from_iterable(reference))
    for epoch in range(len(stream) // total):
        assert sorted(stream[epoch * total : (epoch + 1) * total]) == list(range(total)), "an epoch is not each id once"

    found: list[list[int]] = []
    for world, workers, count in runs:
        seen = len(found) * size
        found += run(root, lab, world, count, num_workers=workers, images_seen=seen, **options)
    assert found == reference


@given(data=st.data())
@settings(max_examples=draws(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.case("D10")
def test_interrupted_runs_of_any_world_equal_the_uninterrupted_single_process(
    tmp_path_factory: pytest.TempPathFactory, lab: SimpleNamespace, data: st.DataObject
) -> None:
    check(tmp_path_factory.mktemp("set"), lab, data, processes=False)


@given(data=st.data())
@settings(
    max_examples=draws(20), deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@pytest.mark.case("D10")
def test_the_same_with_worker_processes(
    tmp_path_factory: pytest.TempPathFactory, lab: SimpleNamespace, data: st.DataObject
) -> None:
    """Real processes in every example: each run but the last has one to three on every rank."""
    check(tmp_path_factory.mktemp("set"), lab, data, processes=True)
