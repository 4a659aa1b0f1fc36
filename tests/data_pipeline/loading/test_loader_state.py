"""The state of a loader: a loader that is restored from it yields bit for bit what the saved one would have yielded."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.loader import Batch, Loader
from tests.helpers.loaders import make_loader

ARGS: dict[str, Any] = {"image_size": 8, "channels": 3, "num_classes": 3, "flip": True, "seed": 5}
INDEXED: dict[str, Any] = {**ARGS, "num_canonical_nodes": 2, "shuffle_block": 7}
STREAM: dict[str, Any] = {**ARGS, "reader": "stream", "shuffle_block": 2}


@pytest.fixture
def data(tmp_path: Path, make_set: Callable[..., Path]) -> Path:
    """A set of uneven shards, one of them empty, and a cache folder of its own for streams."""
    STREAM["cache_dir"] = str(tmp_path / "counts")
    return make_set([9, 0, 5, 1], classes=3)


def taken(loader: Loader, count: int) -> tuple[list[Batch], dict[str, Any]]:
    """The next `count` batches, and the state after them as a file of text would keep it."""
    batches = list(itertools.islice(iter(loader), count))
    return batches, json.loads(json.dumps(loader.state_dict()))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.images_seen == b.images_seen
        for name in ("images", "labels", "ids", "slots"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize(("options", "workers"), [(INDEXED, 0), (INDEXED, 1), (STREAM, 0)])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.case("D10")
def test_a_restored_loader_continues_bit_for_bit(data: Path, options: dict[str, Any], workers: int, world: int) -> None:
    """Within a shard and at its ends, in the first epoch and the third; saved, restored, saved and restored again."""
    for rank in range(world):
        settings = {
            **options,
            "global_batch_size": 2 * world,
            "rank": rank,
            "world_size": world,
            "num_workers": workers,
        }
        with make_loader(data, **settings) as loader:
            whole, _ = taken(loader, 26)
        for stop in (1, 2, 3, 4, 7, 19) if not workers else (3, 19):
            with make_loader(data, **settings) as loader:
                first, state = taken(loader, stop)
            assert state["images_seen"] == 2 * world * stop
            with make_loader(data, **settings) as loader:
                loader.load_state_dict(state)
                assert loader.state_dict() == state
                second, later = taken(loader, 3)
            with make_loader(data, **settings) as loader:
                loader.load_state_dict(later)
                third, _ = taken(loader, 4)
            assert_same(first + second + third, whole[: stop + 7])


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.case("D10")
def test_with_an_index_another_world_continues_bit_for_bit(data: Path, world: int) -> None:
    options = {**INDEXED, "global_batch_size": 6}
    with make_loader(data, **options) as loader:
        whole, _ = taken(loader, 9)
    with make_loader(data, **options, rank=1, world_size=2) as loader:
        _, state = taken(loader, 4)
    for rank in range(world):
        with make_loader(data, **options, rank=rank, world_size=world) as loader:
            loader.load_state_dict(state)
            batches, _ = taken(loader, 5)
        for batch, expected in zip(batches, whole[4:], strict=True):
            assert batch.images_seen == expected.images_seen
            rows = torch.argsort(expected.slots)[batch.slots]  # of the same slots
            assert torch.equal(batch.images, expected.images[rows])
            assert torch.equal(batch.labels, expected.labels[rows])
            assert torch.equal(batch.ids, expected.ids[rows])


def test_another_batch_size_continues_at_the_same_image(data: Path) -> None:
    for options in (INDEXED, STREAM):
        with make_loader(data, **options, global_batch_size=1) as loader:
            whole, _ = taken(loader, 20)
        with make_loader(data, **options, global_batch_size=4) as loader:
            _, state = taken(loader, 2)
        with make_loader(data, **options, global_batch_size=3) as loader:
            loader.load_state_dict(state)
            (batch, *_), _ = taken(loader, 1)
        by_slot = batch.ids[torch.argsort(batch.slots)]
        assert by_slot.tolist() == [whole[i].ids.item() for i in (8, 9, 10)]


@pytest.mark.parametrize("world", [1, 3])
def test_in_another_world_a_stream_continues_as_one_that_starts_there(data: Path, world: int) -> None:
    """Its order depends on the number of ranks: at the nearest shard, as documented, by the sizes of shards seen so far."""
    options = {**STREAM, "global_batch_size": 6}
    with make_loader(data, **options) as loader:
        taken(loader, 6)  # two epochs: all sizes are known
    with make_loader(data, **options, rank=0, world_size=2) as loader:
        _, state = taken(loader, 3)
    for rank in range(world):
        options |= {"rank": rank, "world_size": world}
        with make_loader(data, **options) as loader:
            loader.load_state_dict(state)
            restored, _ = taken(loader, 4)
        with make_loader(data, **options, images_seen=18) as loader:
            fresh, _ = taken(loader, 4)
        assert_same(restored, fresh)


def test_bad_samples_of_a_stream_count_as_drawn(tmp_path: Path, lab: SimpleNamespace) -> None:
    (tmp_path / "s").mkdir()
    members = [(f"{i}.png", b"bad" if i in (1, 4) else lab.image_bytes(i)) for i in range(9)]
    lab.write_tar(tmp_path / "s" / "a.tar", members)
    options: dict[str, Any] = {**STREAM, "num_classes": 0, "on_error": "skip", "max_bad_share": 1.0, "shuffle_block": 3}
    options |= {"global_batch_size": 1, "cache_dir": str(tmp_path / "c")}
    with make_loader(tmp_path / "s", **options) as loader:
        whole, _ = taken(loader, 18)
    for stop in range(1, 15):
        with make_loader(tmp_path / "s", **options) as loader:
            _, state = taken(loader, stop)
        with make_loader(tmp_path / "s", **options) as loader:
            loader.load_state_dict(state)
            assert_same(taken(loader, 4)[0], whole[stop : stop + 4])


def test_what_was_decoded_ahead_is_not_in_the_state(data: Path) -> None:
    for options in (INDEXED, STREAM):
        with make_loader(data, **options, global_batch_size=1, prefetch_batches=8) as loader:
            assert loader.state_dict()["images_seen"] == 0
            batches = iter(loader)
            for seen in range(1, 12):
                next(batches)
                assert loader.state_dict()["images_seen"] == seen
            state = loader.state_dict()
            expected = list(itertools.islice(batches, 3))
            loader.load_state_dict(state)  # ends this iteration, and starts the next ones there
            assert list(batches) == []
            for _ in range(2):
                assert_same(taken(loader, 3)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images_seen": -1}, r"cannot have images_seen=-1"),
        ({"images_seen": 4.0}, r"cannot have images_seen=4\.0"),
        ({"images_seen": True}, r"cannot have images_seen=True"),
        ({"fingerprint": "0" * 32}, r"data set with fingerprint 0{32}, data\.train has"),
        ({"order": {"seed": 6, "shuffle_block": 2}}, r"saved with seed=6, this loader has seed=5"),
        ({"order": {"seed": 5, "shuffle_block": 3}}, r"saved with shuffle_block=3, this loader has shuffle_block=2"),
        ({"order": {"seed": 5}}, r"must have order\.seed, order\.shuffle_block, and nothing else; found: seed"),
        ({"stream": {"place": 0}}, r"must have stream\.rank, .*found: place"),
        ({"stream": {"rank": 1, "world_size": 1, "place": 0, "drawn": 1}}, "position in a stream that cannot be"),
        ({"stream": {"rank": 0, "world_size": 2, "place": 1, "drawn": 1}}, "position in a stream that cannot be"),
        ({"stream": {"rank": 0, "world_size": 1, "place": 0, "drawn": -1}}, "position in a stream that cannot be"),
        ({"stream": {"rank": 0, "world_size": 1, "place": "0", "drawn": 1}}, r"cannot have stream\.place='0'"),
        ({"more": 1}, r"must have images_seen, fingerprint, order, stream, and nothing else; found: .*more"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(data: Path, change: dict[str, Any], message: str) -> None:
    with make_loader(data, **STREAM, global_batch_size=2) as loader:
        expected, state = taken(loader, 3)
        with pytest.raises(DataError, match=message):
            loader.load_state_dict(state | change)
        with pytest.raises(DataError, match=r"must have images_seen.*found: list"):
            loader.load_state_dict([state])  # type: ignore[arg-type]
        assert loader.state_dict() == state  # it stays where it was
        assert_same(taken(loader, 3)[0], expected)


def test_a_state_of_an_index_is_not_one_of_a_stream(data: Path) -> None:
    with (
        make_loader(data, **INDEXED, global_batch_size=2) as indexed,
        make_loader(data, **STREAM, global_batch_size=2) as s,
    ):
        for loader, state in ((indexed, s.state_dict()), (s, indexed.state_dict())):
            with pytest.raises(DataError, match="belongs to the data set with fingerprint"):
                loader.load_state_dict(state)


def test_a_shard_that_became_shorter_is_named(data: Path) -> None:
    """A pipe whose output changed: its name is all that the fingerprint covers."""
    pipe = f"pipe:cat {data}/shard-0000.tar"
    with make_loader(pipe, **STREAM, global_batch_size=1) as loader:
        _, state = taken(loader, 4)
        (data / "shard-0000.tar").write_bytes((data / "shard-0003.tar").read_bytes())
        loader.load_state_dict(state)
        with pytest.raises(DataError, match=r"shard pipe:cat .* gave 1 samples, and 4 of it when .* state was saved"):
            next(iter(loader))
