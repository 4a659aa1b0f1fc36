"""The loader: the same batches for every world and number of workers, exact resume, bad samples, labels."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.loading.evaluation_batches import evaluation_batches
from tarflow.data_pipeline.loading.loader import Batch, Loader
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.data_pipeline.storage.open_index import open_index
from tests.helpers.effort import draws
from tests.helpers.loaders import make_loader

ARGS: dict[str, Any] = {"image_size": 8, "channels": 3}


def batches(data: Path, count: int, **options: Any) -> list[Batch]:
    """The first `count` batches of a fresh loader."""
    with make_loader(data, **(ARGS | options)) as loader:
        return list(itertools.islice(loader, count))


def global_ids(data: Path, count: int, world: int, **options: Any) -> list[list[int]]:
    """The ids of `count` global batches, put together by slot from all ranks."""
    size = options["global_batch_size"]
    out = np.full((count, size), -1)
    for rank in range(world):
        for step, batch in enumerate(batches(data, count, rank=rank, world_size=world, **options)):
            out[step, batch.slots.numpy()] = batch.ids.numpy()
    assert out.min() >= 0
    return out.tolist()


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def test_a_batch_is_what_its_fields_say(make_set: Callable[..., Path], lab: SimpleNamespace) -> None:
    root = make_set([10, 7, 1], classes=3)
    for step, batch in enumerate(batches(root, 5, global_batch_size=6, num_classes=3, seed=3)):
        assert (batch.images.dtype, tuple(batch.images.shape)) == (torch.uint8, (6, 3, 8, 8))
        assert batch.labels.dtype == batch.ids.dtype == batch.slots.dtype == torch.int64
        assert [lab.number_of(image) for image in batch.images] == batch.ids.tolist()
        assert batch.labels.tolist() == [i % 3 for i in batch.ids.tolist()]
        assert batch.slots.tolist() == list(range(6))
        assert batch.images_seen == 6 * step
    assert batches(root, 1, global_batch_size=6)[0].labels.tolist() == [-1] * 6


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_give_what_the_thread_gives(make_set: Callable[..., Path], workers: int) -> None:
    root = make_set([70, 7, 0, 90], classes=2)
    options: dict[str, Any] = {"global_batch_size": 130, "num_classes": 2, "flip": True, "image_size": 5}
    for ours, theirs in zip(batches(root, 4, num_workers=workers, **options), batches(root, 4, **options)):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.slots, theirs.slots)


def test_batches_that_are_kept_are_not_overwritten(make_set: Callable[..., Path], lab: SimpleNamespace) -> None:
    root = make_set([40])
    kept = batches(root, 20, global_batch_size=4, num_workers=1, prefetch_batches=2)
    for batch in kept:
        assert [lab.number_of(image) for image in batch.images] == batch.ids.tolist()
    first = kept[0].images[1]  # a view outlives its batch and the loader
    expected = lab.number_of(first)
    del kept
    assert lab.number_of(first) == expected


@pytest.mark.case("D01")
def test_uneven_tiny_and_empty_shards_give_every_rank_the_same_steps(make_set: Callable[..., Path]) -> None:
    root = make_set([10, 7, 1])
    single = global_ids(root, 18, 1, global_batch_size=2)
    assert global_ids(root, 18, 2, global_batch_size=2, num_workers=1) == single
    for epoch in range(2):
        assert sorted(flat(single[9 * epoch : 9 * epoch + 9])) == list(range(18))


@pytest.mark.case("D01")
def test_one_shard_for_two_ranks_with_two_workers_each(make_set: Callable[..., Path]) -> None:
    root = make_set([12], name="one")
    assert global_ids(root, 6, 2, global_batch_size=4, num_workers=2) == global_ids(root, 6, 1, global_batch_size=4)


@pytest.mark.case("D01")
def test_an_empty_shard_is_named(make_set: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    root = make_set([3, 0, 2])
    with caplog.at_level(logging.INFO, "tarflow.data"):
        assert len(batches(root, 5, global_batch_size=2)) == 5
    assert "3 shards, 5 samples" in caplog.text
    assert "1 shards are empty: shard-0001.tar" in caplog.text


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda s: sum(s) > 0),
    world=st.integers(1, 4), share=st.integers(1, 4), nodes=st.integers(1, 3), start=st.integers(0, 40),
)  # fmt: skip
@settings(max_examples=draws(20), deadline=None)
@pytest.mark.case("D10")
def test_resume_anywhere_in_another_world(
    tmp_path_factory: pytest.TempPathFactory,
    lab: SimpleNamespace,
    sizes: list[int],
    world: int,
    share: int,
    nodes: int,
    start: int,
) -> None:
    root = tmp_path_factory.mktemp("set")
    build_index(root, lab.write_shards(root, sizes))
    size = world * share
    options: dict[str, Any] = {"global_batch_size": size, "num_canonical_nodes": nodes, "shuffle_block": 5}
    stream = flat(global_ids(root, (start + 60) // size + 2, 1, **options))
    resumed = flat(global_ids(root, 3, world, images_seen=start, **options))
    assert resumed == stream[start : start + len(resumed)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 14])  # in epoch 0, and in epoch 1 (12 global batches an epoch)
@pytest.mark.case("D10")
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(
    make_set: Callable[..., Path], workers: int, stop: int
) -> None:
    root = make_set([9, 4, 11])
    options: dict[str, Any] = {"global_batch_size": 2, "num_workers": workers}
    whole = global_ids(root, 36, 2, global_batch_size=2)
    first = global_ids(root, stop, 2, **options)
    rest = global_ids(root, 36 - stop, 2, images_seen=2 * stop, **options)
    assert first + rest == whole
    epochs = [tuple(flat(whole[12 * e : 12 * e + 12])) for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len(set(epochs)) == 3, "an epoch is replayed"


@pytest.mark.case("D10")
def test_prefetched_is_not_trained_on(make_set: Callable[..., Path]) -> None:
    """The position is the consumer's: whatever was decoded ahead is not lost."""
    root = make_set([50])
    with make_loader(root, **ARGS, global_batch_size=4, prefetch_batches=8) as loader:
        taken = [next(iterator) for iterator in [iter(loader)] for _ in range(3)]
    after = batches(root, 1, global_batch_size=4, images_seen=taken[-1].images_seen + 4)[0]
    assert after.ids.tolist() == batches(root, 4, global_batch_size=4)[3].ids.tolist()


@pytest.mark.case("D13")
def test_flips_differ_between_ranks_workers_and_epochs_and_repeat(tmp_path: Path, lab: SimpleNamespace) -> None:
    half = np.zeros((8, 8, 3), dtype=np.uint8)
    half[:, :4] = 255
    members = [(f"{i:03d}.png", png(half)) for i in range(64)]
    lab.write_tar(tmp_path / "a.tar", members)
    build_index(tmp_path, [tmp_path / "a.tar"])

    def mirrored(workers: int) -> dict[tuple[int, int], tuple[bool, ...]]:
        streams: dict[tuple[int, int], tuple[bool, ...]] = {}
        for rank in range(2):
            found = batches(tmp_path, 8, global_batch_size=16, rank=rank, world_size=2, num_workers=workers, flip=True)
            for epoch in range(2):
                images = torch.cat([batch.images for batch in found[4 * epoch : 4 * epoch + 4]])
                streams[rank, epoch] = tuple((images[:, 0, 0, 0] == 0).tolist())
        return streams

    streams = mirrored(2)
    assert len(set(streams.values())) == 4, "two streams of random numbers are equal"
    assert all(6 < sum(stream) < 26 for stream in streams.values())
    assert streams == mirrored(0), "the same seed must give the same flips"


def png(pixels: np.ndarray) -> bytes:
    from tarflow.data_pipeline.prepare.encode import encode

    return encode(pixels, "png")


def damaged_set(root: Path, lab: SimpleNamespace, sizes: list[int], bad: set[int]) -> Path:
    """Like `write_shards`, with the samples `bad` undecodable."""
    root.mkdir(exist_ok=True)
    number, paths = 0, []
    for shard, size in enumerate(sizes):
        members: list[tuple[str, bytes]] = []
        for _ in range(size):
            content = b"\xff\xd8\xff broken" if number in bad else lab.image_bytes(number)
            members += [(f"{number:05d}.jpg", content), (f"{number:05d}.cls", b"0")]
            number += 1
        paths.append(root / f"shard-{shard}.tar")
        lab.write_tar(paths[-1], members)
    build_index(root, paths)
    return root


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.case("D02")
def test_strict_stops_naming_shard_and_member(tmp_path: Path, lab: SimpleNamespace, workers: int) -> None:
    root = damaged_set(tmp_path, lab, [5, 5], {7})
    with pytest.raises(DataError, match=r"shard-1\.tar, sample '00007': .*data\.on_error=skip"):
        batches(root, 5, global_batch_size=2, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.case("D02")
def test_one_bad_image_on_one_rank_changes_no_step(
    tmp_path: Path, lab: SimpleNamespace, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = damaged_set(tmp_path, lab, [6, 6], {4, 11})
    healthy = global_ids(damaged_set(tmp_path / "healthy", lab, [6, 6], set()), 6, 1, global_batch_size=4)
    options: dict[str, Any] = {"global_batch_size": 4, "num_workers": workers, "on_error": "skip"}
    found = global_ids(root, 6, 2, **options)
    replaced = {4: 5, 11: 6}  # the next of the shard; after the last comes the first
    assert found == [[replaced.get(i, i) for i in batch] for batch in healthy]
    assert "sample '00004'" in caplog.text
    with make_loader(root, **ARGS, **options) as loader:
        list(itertools.islice(loader, 6))
        assert loader.counters == {"undecodable": 4}


@pytest.mark.case("D02")
def test_a_shard_of_bad_images_is_replaced_from_the_next(tmp_path: Path, lab: SimpleNamespace) -> None:
    root = damaged_set(tmp_path, lab, [3, 4], {0, 1, 2})
    with make_loader(root, **ARGS, global_batch_size=7, on_error="skip", max_bad_share=1.0) as loader:
        batch = next(iter(loader))
    assert sorted(batch.ids.tolist()) == [3, 3, 3, 3, 4, 5, 6]
    assert [lab.number_of(image) for image in batch.images] == batch.ids.tolist()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.case("D02")
def test_too_many_bad_images_stop_the_run(tmp_path: Path, lab: SimpleNamespace, workers: int) -> None:
    root = damaged_set(tmp_path, lab, [20, 20], set(range(20)))
    with pytest.raises(DataError, match=r"11 of \d+ images had to be replaced .*data\.max_bad_share=0\.01"):
        batches(root, 100, global_batch_size=1, on_error="skip", num_workers=workers)
    all_bad = damaged_set(tmp_path / "all", lab, [20], set(range(20)))
    with pytest.raises(DataError, match=r"no sample of .* can be read"):
        batches(all_bad, 1, global_batch_size=1, on_error="skip", num_workers=workers)


def labelled_set(root: Path, lab: SimpleNamespace, labels: list[str | None]) -> Path:
    members: list[tuple[str, bytes]] = []
    for i, label in enumerate(labels):
        members.append((f"{i:04d}.png", lab.image_bytes(i)))
        if label is not None:
            members.append((f"{i:04d}.cls", label.encode()))
    lab.write_tar(root / "a.tar", members)
    build_index(root, [root / "a.tar"])
    return root


@pytest.mark.case("D06")
def test_labels_are_checked_before_anything_is_read(tmp_path: Path, lab: SimpleNamespace) -> None:
    root = labelled_set(tmp_path, lab, ["0", "999", "1000", "5"])
    with pytest.raises(DataError, match=r"a\.tar, sample '0002': label 1000 is outside 0\.\.999"):
        make_loader(root, **ARGS, global_batch_size=2, num_classes=1000)
    assert len(batches(root, 2, global_batch_size=2, num_classes=1001)) == 2
    for bad, message in (("-1", "label -1 is outside"), (None, "'0001' has no label")):
        root = labelled_set(tmp_path, lab, ["0", bad, "2"])
        with pytest.raises(DataError, match=message):
            make_loader(root, **ARGS, global_batch_size=2, num_classes=3)
        with pytest.raises(DataError, match=message):
            evaluation_batches(DataSettings.of(root), ImageShape(8, num_classes=3), 2)
        with make_loader(root, **ARGS, global_batch_size=3, num_classes=3, on_error="skip") as loader:
            batch = next(iter(loader))
            assert sorted(batch.labels.tolist()) == [0, 2, 2]
            assert sum(loader.counters.values()) == 1
        assert batches(root, 1, global_batch_size=3)[0].labels.tolist() == [-1, -1, -1]
    root = labelled_set(tmp_path, lab, [None, None])
    with pytest.raises(DataError, match=r"has no labels.*model\.num_classes=0"):
        make_loader(root, **ARGS, global_batch_size=2, num_classes=3)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.case("D01")
def test_validation_covers_each_sample_once_on_any_number_of_ranks(
    make_set: Callable[..., Path], lab: SimpleNamespace, world: int
) -> None:
    root = make_set([10, 0, 7, 1])
    shape, found = ImageShape(8, num_classes=3), list[int]()
    for rank in range(world):
        for batch in evaluation_batches(DataSettings.of(root), shape, 4, rank=rank, world_size=world):
            assert batch.slots.tolist() == batch.ids.tolist()
            assert [lab.number_of(image) for image in batch.images] == batch.ids.tolist()
            found += batch.ids.tolist()
    assert found == list(range(18))


def test_a_limited_validation_is_spread_over_the_set(make_set: Callable[..., Path]) -> None:
    data = DataSettings.of(make_set([50, 50]))
    ids = [i for batch in evaluation_batches(data, ImageShape(8), 4, limit=10) for i in batch.ids.tolist()]
    assert ids == list(range(0, 100, 10))
    everything = evaluation_batches(data, ImageShape(8), 64, limit=10_000)
    assert sum(len(batch.ids) for batch in everything) == 100


def test_validation_names_or_leaves_out_a_bad_image(tmp_path: Path, lab: SimpleNamespace) -> None:
    root = damaged_set(tmp_path, lab, [5], {2})
    with pytest.raises(DataError, match="sample '00002'"):
        list(evaluation_batches(DataSettings.of(root), ImageShape(8), 2))
    skipping = DataSettings.of(root, on_error="skip")
    kept = [i for batch in evaluation_batches(skipping, ImageShape(8), 2) for i in batch.ids.tolist()]
    assert kept == [0, 1, 3, 4]


@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_a_shard_changed_after_indexing_is_refused(
    make_set: Callable[..., Path], lab: SimpleNamespace, on_error: str
) -> None:
    root = make_set([4, 4])
    lab.write_shards(root, [4, 9])
    with pytest.raises(DataError, match=r"shard-0001\.tar has \d+ bytes, the index says \d+"):
        batches(root, 2, global_batch_size=4, on_error=on_error)


@pytest.mark.parametrize("size", [0, 700])
def test_spare_a_shard_that_is_empty_or_cut_on_this_machine_is_refused(
    make_set: Callable[..., Path], size: int
) -> None:
    """A file system that shows a zero-byte file of another host's shard must not pass for a short epoch."""
    root = make_set([4, 4])
    with (root / "shard-0000.tar").open("r+b") as file:
        file.truncate(size)
    for workers in (0, 1):
        with pytest.raises(DataError, match=rf"shard-0000\.tar has {size} bytes, the index says \d+"):
            batches(root, 2, global_batch_size=4, on_error="skip", num_workers=workers)


def test_spare_the_end_of_an_epoch_needs_no_meeting_of_ranks_and_workers(make_set: Callable[..., Path]) -> None:
    """One rank goes on for epochs while the other has not begun: nothing waits for the other."""
    root = make_set([5, 3])
    options: dict[str, Any] = {"global_batch_size": 4, "world_size": 2, "num_workers": 1}
    ahead = batches(root, 20, rank=0, **options)
    behind = batches(root, 20, rank=1, **options)
    for epoch in range(5):
        ids = [
            i
            for batch in ahead[2 * epoch : 2 * epoch + 2] + behind[2 * epoch : 2 * epoch + 2]
            for i in batch.ids.tolist()
        ]
        assert sorted(ids) == list(range(8))


def test_spare_samples_are_drawn_without_replacement_across_folders(tmp_path: Path, lab: SimpleNamespace) -> None:
    """Resampling with replacement misses whole folders in an epoch; here every folder is in every epoch."""
    shards = [path for name in ("a", "b", "c") for path in lab.write_shards(tmp_path / name, [3])]
    build_index(tmp_path, shards)
    ids = flat(global_ids(tmp_path, 9, 1, global_batch_size=3))
    for epoch in range(3):
        assert {i // 3 for i in ids[9 * epoch : 9 * epoch + 9]} == {0, 1, 2}


def test_a_shard_that_is_gone_is_named(make_set: Callable[..., Path]) -> None:
    root = make_set([4, 4])
    (root / "shard-0001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-0001\.tar, sample '0000\d': cannot open the shard: No such file"):
        batches(root, 2, global_batch_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 10, "world_size": 4}, "set it to 8 or 12"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 does not exist in a world of 2"),
        ({"channels": 2}, r"data\.channels cannot be 2"),
        ({"image_size": 0}, r"data\.image_size"),
        ({"num_workers": -1}, r"data\.num_workers"),
        ({"prefetch_batches": 0}, r"data\.prefetch_batches"),
        ({"images_seen": -1}, r"data\.images_seen"),
        ({"on_error": "ignore"}, r"data\.on_error cannot be 'ignore'"),
        ({"max_bad_share": 2.0}, r"data\.max_bad_share"),
        ({"num_canonical_nodes": 0}, r"data\.num_canonical_nodes cannot be 0"),
    ],
)
def test_settings_out_of_range_are_named(make_set: Callable[..., Path], options: dict[str, Any], message: str) -> None:
    root = make_set([4])
    with pytest.raises(DataError, match=message):
        make_loader(root, **(ARGS | {"global_batch_size": 2} | options))


def test_two_loaders_in_one_process_do_not_disturb_each_other(make_set: Callable[..., Path]) -> None:
    """D12: training and validation data at once, and the same data twice."""
    a, b = make_set([20], name="a"), make_set([30], name="b")
    options: dict[str, Any] = {**ARGS, "global_batch_size": 5, "num_workers": 1}
    loaders = [make_loader(a, **options), make_loader(b, **options), make_loader(a, **options)]
    found: list[list[int]] = [[], [], []]
    iterators: list[Iterator[Batch]] = [iter(loader) for loader in loaders]
    for _ in range(6):
        for ids, iterator in zip(found, iterators):
            ids += next(iterator).ids.tolist()
    assert found[0] == found[2]
    assert sorted(found[0][:20]) == list(range(20))
    assert sorted(found[1]) == list(range(30))
    for loader in loaders:
        loader.close()


def test_a_second_iteration_starts_at_the_same_place(make_set: Callable[..., Path]) -> None:
    root = make_set([20])
    for workers in (0, 1):
        with make_loader(root, **ARGS, global_batch_size=5, num_workers=workers, images_seen=7) as loader:
            first, second = ([next(iter(loader)).ids.tolist() for _ in range(1)] for _ in range(2))
        assert first == second


def test_the_fingerprint_is_the_index_s(make_set: Callable[..., Path]) -> None:
    root = make_set([4])
    with make_loader(root, **ARGS, global_batch_size=2) as loader:
        assert loader.fingerprint == open_index(root).fingerprint
        assert loader.num_samples == 4


def test_no_shared_memory_names_are_used(make_set: Callable[..., Path]) -> None:
    before = set(os.listdir("/dev/shm"))
    with make_loader(make_set([20]), **ARGS, global_batch_size=5, num_workers=2) as loader:
        iterator = iter(loader)
        next(iterator)
        assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_survive_copies_that_do_not_block(
    make_set: Callable[..., Path], lab: SimpleNamespace, workers: int
) -> None:
    root = make_set([64])
    data = DataSettings.of(root, num_workers=workers)
    with Loader(data, ImageShape(8), BatchShard(16), pin_memory=True) as loader:
        for batch in itertools.islice(loader, 40):
            assert batch.images.is_pinned()
            images = batch.images.to("cuda", non_blocking=True)
            assert [lab.number_of(image.cpu()) for image in images] == batch.ids.tolist()
