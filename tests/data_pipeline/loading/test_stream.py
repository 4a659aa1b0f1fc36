"""Streams of tars without an index: pipes, addresses, files; what is promised and what is said."""

from __future__ import annotations

import itertools
import logging
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.images.transform import flips
from tarflow.data_pipeline.loading.loader import Batch
from tarflow.data_pipeline.loading.stream.reader import ROW_BITS
from tarflow.data_pipeline.loading.stream.shards import stream_shards
from tarflow.data_pipeline.prepare.encode import encode
from tests.helpers.loaders import make_loader

ARGS: dict[str, Any] = {"image_size": 8, "channels": 3, "reader": "stream"}


@pytest.fixture
def stream(tmp_path: Path, lab: SimpleNamespace) -> Callable[..., str]:
    """`stream([3, 4])` writes shards without an index and returns their pattern."""

    def make(sizes: list[int], **options: Any) -> str:
        lab.write_shards(tmp_path / "s", sizes, **options)
        return f"{tmp_path}/s/shard-{{0000..{len(sizes) - 1:04d}}}.tar"

    return make


def take(data: str, count: int, tmp_path: Path, **options: Any) -> list[Batch]:
    with make_loader(data, **(ARGS | {"cache_dir": str(tmp_path / "counts")} | options)) as loader:
        return list(itertools.islice(loader, count))


def numbers(batches: list[Batch], lab: SimpleNamespace) -> list[int]:
    return [lab.number_of(image) for batch in batches for image in batch.images]


@pytest.mark.parametrize("form", ["files", "pipe", "file address"])
def test_every_epoch_holds_every_sample_once(
    stream: Callable[..., str], tmp_path: Path, lab: SimpleNamespace, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = stream([5, 1, 0, 6])
    if form == "pipe":
        data = f"pipe:cat {data}"
    elif form == "file address":
        data = f"file:{data}"
    with caplog.at_level(logging.WARNING, "tarflow.data"):
        batches = take(data, 12, tmp_path, global_batch_size=3, num_classes=3)
    seen = numbers(batches, lab)
    for epoch in range(3):
        assert sorted(seen[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert len({tuple(seen[12 * e : 12 * e + 12]) for e in range(3)}) == 3
    for batch in batches:
        assert batch.labels.tolist() == [lab.number_of(image) % 3 for image in batch.images]
        assert batch.slots.tolist() == [0, 1, 2]
    assert [batch.images_seen for batch in batches] == list(range(0, 36, 3))
    assert len({i for batch in batches[:4] for i in batch.ids.tolist()}) == 12
    assert {i >> ROW_BITS for batch in batches for i in batch.ids.tolist()} == {0, 1, 3}
    assert "4 shards as streams, without an index: the order depends on the number of ranks" in caplog.text


@pytest.mark.case("D10")
def test_a_resume_goes_to_the_nearest_shard_and_says_so(
    stream: Callable[..., str], tmp_path: Path, lab: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    data = stream([6, 6, 6])
    whole = numbers(take(data, 18, tmp_path, global_batch_size=2), lab)
    for seen in range(2, 34, 2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tarflow.data"):
            found = numbers(take(data, 1, tmp_path, global_batch_size=2, images_seen=seen), lab)
        nearest = 6 * round(seen / 6 - 0.001)
        assert found == whole[nearest : nearest + 2]
        off = abs(seen - nearest)
        said = f"{off} samples of rank 0 {'are repeated' if nearest < seen else 'are skipped'}"
        assert (said in caplog.text) == (off > 0)
    # A new machine has no counts: the length of one shard is taken for all.
    assert numbers(take(data, 1, tmp_path / "new", global_batch_size=2, images_seen=12), lab) == whole[12:14]


@pytest.mark.case("D01")
def test_ranks_never_run_out_and_share_the_shards(
    stream: Callable[..., str], tmp_path: Path, lab: SimpleNamespace
) -> None:
    """More ranks than shards, uneven shards, an empty one: every rank makes every step, all samples come."""
    data = stream([7, 0, 2])
    seen: Counter[int] = Counter()
    for rank in range(4):
        options: dict[str, Any] = {"global_batch_size": 4, "rank": rank, "world_size": 4}
        batches = take(data, 30, tmp_path, **options)
        assert [batch.slots.tolist() for batch in batches] == [[rank]] * 30
        seen.update(numbers(batches, lab))
    assert set(seen) == set(range(9))


@pytest.mark.case("D01")
def test_only_empty_shards_end_at_once(stream: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample in any of the last 2 shards"):
        take(stream([0, 0]), 1, tmp_path, global_batch_size=1)


@pytest.mark.parametrize("on_error", ["strict", "skip"])
@pytest.mark.case("D02")
def test_bad_samples_and_cut_shards(tmp_path: Path, lab: SimpleNamespace, on_error: str) -> None:
    good = [(f"{i}.png", lab.image_bytes(i)) for i in range(6)]
    (tmp_path / "s").mkdir()
    lab.write_tar(tmp_path / "s" / "a.tar", [*good[:3], ("x.png", b"no image"), ("y.txt", b"text"), *good[3:]])
    lab.write_tar(tmp_path / "s" / "b.tar", [(f"{i}.png", lab.image_bytes(i)) for i in range(6, 9)])
    with (tmp_path / "s" / "b.tar").open("r+b") as file:
        file.truncate(1024 + 512 + 20)
    options: dict[str, Any] = {"global_batch_size": 7, "on_error": on_error, "cache_dir": str(tmp_path / "c")}
    with make_loader(tmp_path / "s", **ARGS, **options, max_bad_share=1.0) as loader:
        if on_error == "strict":
            with pytest.raises(DataError, match=r"shard .*[ab]\.tar.*data\.on_error=skip"):
                next(iter(loader))
        else:
            assert sorted(numbers([next(iter(loader))], lab)) == list(range(7))
            assert set(loader.counters) <= {"undecodable", "no_image", "damaged_shard"}
            assert loader.counters["undecodable"] == 1


@pytest.mark.case("D06")
def test_labels_out_of_range_are_named(stream: Callable[..., str], tmp_path: Path) -> None:
    data = stream([6], classes=3)
    with pytest.raises(DataError, match=r"shard-0000\.tar, sample '0000\d': label 2 is outside 0\.\.1"):
        take(data, 3, tmp_path, global_batch_size=2, num_classes=2)
    with pytest.raises(DataError, match="has no label, the model has 2 classes"):
        take(stream([6], classes=0), 3, tmp_path, global_batch_size=2, num_classes=2)


def test_a_pipe_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shard pipe:false is damaged or cannot be read"):
        take("pipe:false", 1, tmp_path, global_batch_size=1, reader="auto")


def test_the_reader_is_chosen_by_what_lies_there(stream: Callable[..., str], tmp_path: Path) -> None:
    data = stream([4])
    with pytest.raises(DataError, match=r"names tars, .*tarflow data index .*--out FOLDER.*data\.reader=stream"):
        make_loader(data, **(ARGS | {"reader": "auto", "global_batch_size": 2}))
    with pytest.raises(DataError, match=r"is a pipe: .*data\.reader=stream \(not mds\)"):
        make_loader("pipe:cat x", **(ARGS | {"reader": "mds", "global_batch_size": 2}))
    with make_loader("pipe:cat x", **(ARGS | {"reader": "auto", "global_batch_size": 2})) as loader:
        assert loader.reader == "stream"
        assert loader.fingerprint.startswith("stream-")
        with pytest.raises(DataError, match="number of samples in a stream is not known"):
            print(loader.num_samples, file=sys.stderr)
    assert stream_shards("pipe:cat a{0..1}") == ["pipe:cat a0", "pipe:cat a1"]
    assert stream_shards("https://h/{a,b}.tar") == ["https://h/a.tar", "https://h/b.tar"]


@pytest.mark.case("D13")
def test_flips_of_a_stream_are_keyed_by_position(tmp_path: Path, lab: SimpleNamespace) -> None:
    half = np.zeros((8, 8, 3), dtype=np.uint8)
    half[:, :4] = 255
    (tmp_path / "s").mkdir()
    lab.write_tar(tmp_path / "s" / "a.tar", [(f"{i}.png", encode(half, "png")) for i in range(20)])
    batches = take(str(tmp_path / "s"), 8, tmp_path, global_batch_size=5, flip=True, seed=3)
    mirrored = [int(image[0, 0, 0]) == 0 for batch in batches for image in batch.images]
    assert mirrored == flips(3, np.arange(40)).tolist()


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
@pytest.mark.case("H10")
def test_what_a_header_of_a_stream_promises_is_bounded(
    tmp_path: Path, lab: SimpleNamespace, kind: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """An endless body behind it would be read into memory."""
    folder = tmp_path / "s"
    lab.write_shards(folder, [4])
    info = tarfile.TarInfo("0.png")
    info.type, info.size = kind, 3 << 30
    (folder / "bad.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(20_000))
    with pytest.raises(DataError, match=r"bad\.tar is damaged .*a member at byte 0 has 3,221,225,472 bytes, at most"):
        take(str(folder), 9, tmp_path, global_batch_size=2)
    batches = take(str(folder), 4, tmp_path, global_batch_size=2, on_error="skip", max_bad_share=1.0)
    assert {lab.number_of(image) for batch in batches for image in batch.images} == {0, 1, 2, 3}


@pytest.mark.case("H08")
def test_an_address_of_a_stream_holds_no_marks_that_programs_obey() -> None:
    for text in (
        "gs://bucket/'; touch x; '.tar",
        "http://a/../b.tar",
        "http://a/simplecache::file:///x.tar",
        "http://a/b\n.tar",
    ):
        with pytest.raises(DataError, match=r"not an address of tars|not a name that remote data may have"):
            stream_shards(text)
    assert stream_shards("https://a.org/s-{0..1}.tar?key=a&b=%20c") == [
        f"https://a.org/s-{i}.tar?key=a&b=%20c" for i in (0, 1)
    ]
