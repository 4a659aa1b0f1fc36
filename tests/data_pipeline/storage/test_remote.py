"""Data behind a loopback HTTP server that is slow, busy, cuts answers or knows no ranges; and the cache of a node."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tarflow.data_pipeline.storage.remote_shards as shards
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.evaluation_batches import evaluation_batches
from tarflow.data_pipeline.loading.loader import Batch
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.storage.access import Access, address
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.data_pipeline.storage.remote import Remote
from tarflow.data_pipeline.storage.shard_cache import ShardCache
from tests.data_pipeline.storage import http_server
from tests.helpers.loaders import make_loader
from tests.helpers.ranks import launch_ranks
from tests.helpers.waiting import until

REPOSITORY = Path(__file__).parents[3]
ARGS: dict[str, Any] = {"image_size": 8, "channels": 3, "global_batch_size": 6, "num_classes": 3}


@pytest.fixture
def served(make_set: Callable[..., Path]) -> Iterator[tuple[Any, Path]]:
    """(server, folder it serves)."""
    root = make_set([30, 0, 25, 5])
    server = http_server.BadServer(root)
    yield server, root
    server.close()


def take(data: Any, count: int, **options: Any) -> list[Batch]:
    with make_loader(data, **(ARGS | options)) as loader:
        return list(itertools.islice(loader, count))


def same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.ids, b.ids)


FAULTS: list[dict[str, Any]] = [
    {},
    {"delay": 0.05},
    {"busy_every": 2},
    {"cut_every": 2},
    {"busy_every": 5, "cut_every": 3, "delay": 0.02},
]
WITHOUT_RANGES: list[dict[str, Any]] = [
    {"ranges": False, "cut_every": 2},
    {"ranges": False, "busy_every": 2, "delay": 0.05},
]
CACHE = 1 << 20


@pytest.mark.parametrize(
    ("fault", "cache_bytes"),
    [(fault, CACHE) for fault in FAULTS + WITHOUT_RANGES] + [(fault, 0) for fault in FAULTS],
    ids=lambda value: str(value) if isinstance(value, int) else "+".join(value) or "healthy",
)
def test_batches_equal_those_from_disk_whatever_the_server_does(
    served: tuple[Any, Path], tmp_path: Path, fault: dict[str, Any], cache_bytes: int
) -> None:
    server, root = served
    server.behaviour = http_server.Behaviour(**fault)
    cache = tmp_path / "cache"
    options: dict[str, Any] = {"cache_dir": str(cache), "cache_bytes": cache_bytes, "prefetch_batches": 1}
    count = 22 if cache_bytes else 2  # two epochs and a bit
    same(take(server.url, count, **options), take(root, count))
    shards = [path for path, _ in server.behaviour.requests if path.endswith(".tar")]
    if cache_bytes:
        assert len(shards) <= 3 * 4, "a shard is fetched again although it is in the cache"
        assert not list(cache.glob("*.partial"))
        assert not list(cache.glob("*.lock"))
        before = len(shards)
        same(take(server.url, 2, **options), take(root, 2))
        assert len([path for path, _ in server.behaviour.requests if path.endswith(".tar")]) == before
    else:
        assert not cache.exists()
        assert all(asked for path, asked in server.behaviour.requests if path.endswith(".tar"))


@pytest.mark.parametrize("world", [1, 2])
def test_workers_and_ranks_share_one_cache(served: tuple[Any, Path], tmp_path: Path, world: int) -> None:
    server, root = served
    server.behaviour = http_server.Behaviour(busy_every=4, delay=0.02)
    for rank in range(world):
        options: dict[str, Any] = {"rank": rank, "world_size": world}
        ours = take(server.url, 12, num_workers=2, cache_dir=str(tmp_path / "cache"), **options)
        same(ours, take(root, 12, **options))
    whole = [path for path, _ in server.behaviour.requests if path.endswith(".tar")]
    assert len(whole) <= 3 + 2, "a shard was fetched more than once"


def test_validation_reads_over_http(served: tuple[Any, Path], tmp_path: Path) -> None:
    server, root = served
    far, near = DataSettings.of(server.url, cache_dir=str(tmp_path / "cache")), DataSettings.of(root)
    ours, theirs = (list(evaluation_batches(data, ImageShape(8), 16)) for data in (far, near))
    same(ours, theirs)


@pytest.mark.parametrize("cache_bytes", [1 << 20, 0], ids=["cache", "ranges"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [({"status": 503}, "HTTP 503"), ({"hang": True}, "Timeout"), ({"cut_every": 1}, "payload|early")],
)
def test_a_server_that_does_not_recover_is_given_up_with_the_settings_named(
    served: tuple[Any, Path], tmp_path: Path, fault: dict[str, Any], message: str, cache_bytes: int
) -> None:
    server, _ = served
    server.behaviour = http_server.Behaviour(**fault)
    options: dict[str, Any] = {
        "retries": 2,
        "timeout_s": 0.4,
        "cache_dir": str(tmp_path / "c"),
        "cache_bytes": cache_bytes,
    }
    began = time.monotonic()
    # The same for both policies: an outage is no bad sample, skipping would train on the rest.
    for on_error in ("strict", "skip"):
        with pytest.raises(DataError, match=rf"shard-000\d\.tar: 3 attempts in .*{message}.*data\.retries=2") as caught:
            take(server.url, 1, on_error=on_error, **options)
        assert "data.timeout_s=0.4" in str(caught.value)
    assert time.monotonic() - began < 40
    # Three attempts for the reader and, with a cache, three for the thread that fetches ahead; twice.
    assert len([path for path, _ in server.behaviour.requests if path.endswith(".tar")]) <= (12 if cache_bytes else 6)
    assert not list(tmp_path.glob("c/*.partial"))


def test_without_ranges_and_without_a_cache_the_setting_is_named(served: tuple[Any, Path]) -> None:
    server, _ = served
    server.behaviour = http_server.Behaviour(ranges=False)
    with pytest.raises(DataError, match=r"ignores ranges .*data\.cache_bytes \(now 0\)"):
        take(server.url, 1, cache_bytes=0)


def test_a_shard_that_is_gone_or_changed_is_named(served: tuple[Any, Path], tmp_path: Path) -> None:
    server, root = served
    for cache_bytes in (0, 1 << 20):
        options: dict[str, Any] = {"cache_bytes": cache_bytes, "cache_dir": str(tmp_path / "c"), "retries": 1}
        gone = (root / "shard-0002.tar").read_bytes()
        (root / "shard-0002.tar").unlink()
        with pytest.raises(DataError, match=r"shard-0002\.tar, sample .*there is nothing at http"):
            take(server.url, 10, **options)
        (root / "shard-0002.tar").write_bytes(gone + b"more")
        with pytest.raises(DataError, match=r"shard-0002\.tar has \d+ bytes, the index says \d+"):
            take(server.url, 10, **options)
        (root / "shard-0002.tar").write_bytes(gone)
    server.behaviour = http_server.Behaviour(status=403)
    with pytest.raises(DataError, match=r"may not be read .*credentials"):
        take(server.url, 1, cache_dir=str(tmp_path / "other"))


def test_an_address_without_an_index_says_what_to_do(served: tuple[Any, Path], tmp_path: Path) -> None:
    server, _ = served
    with pytest.raises(DataError, match=r"no index at http.*/nothing/index: run `tarflow data index`"):
        open_index(f"{server.url}/nothing", Access(cache_dir=str(tmp_path)))
    with pytest.raises(DataError, match=r"cannot read http://127\.0\.0\.1:9/index/shards\.parquet: 2 attempts"):
        open_index("http://127.0.0.1:9", Access(cache_dir=str(tmp_path), retries=1, timeout_s=0.5))


@pytest.mark.case("I07")
def test_an_address_without_an_index_goes_by_the_answer_not_by_the_words(
    served: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged list of shards whose reader happens to complain in the same words is a damaged one."""
    server, _ = served
    monkeypatch.setattr("tarflow.data_pipeline.index.shard_list.META_KEY", b"there is nothing at all")
    with pytest.raises(DataError, match=r"cannot read .*there is nothing at all.*; rebuild the index"):
        open_index(server.url, Access(cache_dir=str(tmp_path)))


def test_an_object_store_s_file_system_is_read_through_the_same_cache(
    make_set: Callable[..., Path], tmp_path: Path
) -> None:
    """Fsspec's `file://` stands for every store that is no HTTP server."""
    root = make_set([20, 11])
    for cache_bytes in (1 << 20, 0):
        same(take(f"file://{root}", 5, cache_dir=str(tmp_path / "c"), cache_bytes=cache_bytes), take(root, 5))
    assert len(list((tmp_path / "c").glob("*.shard"))) == 3  # two shards and the rows of the index


def test_addresses_and_paths_are_told_apart() -> None:
    assert address("http://a/b") == address(Path("http://a/b")) == "http://a/b"
    assert address("s3://bucket/x") == "s3://bucket/x"
    assert address("file:///tmp/x") == "file:///tmp/x"
    for path in ("/a/b", "a:b", "sets/x", "C:/x"):
        assert address(path) is None


@pytest.mark.parametrize("options", [{"cache_bytes": -1}, {"timeout_s": 0.0}, {"retries": -1}])
def test_settings_out_of_range_are_named(make_set: Callable[..., Path], options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"data\.{next(iter(options))} cannot be"):
        take(make_set([3]), 1, **options)


def put(cache: ShardCache, name: str, size: int) -> int:
    return cache.open(name, size, lambda file: file.write(b"x" * size))


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "c", 1000)
    for step, name in enumerate("abcabd"):
        fd = put(cache, name, 300)
        os.utime(tmp_path / "c" / f"{name}.shard", ns=(step, step))
        os.close(fd)
    assert sorted(path.stem for path in (tmp_path / "c").glob("*.shard")) == ["a", "b", "d"]
    assert sum(path.stat().st_size for path in (tmp_path / "c").iterdir()) <= 1000


class DyingRemote(Remote):
    """Kills its process within the first shard."""

    def save(self, url: str, total: int, file: Any) -> None:
        file.write(b"half")
        file.flush()
        if url.endswith(".tar"):
            os.kill(os.getpid(), signal.SIGKILL)
        super().save(url, total, file)


def fetch_and_be_killed(url: str, cache: Path) -> None:
    shards.Remote = DyingRemote  # type: ignore[misc]
    take(url, 1, cache_dir=str(cache))


@pytest.mark.case("D12")
def test_a_half_written_cache_file_is_fetched_again(served: tuple[Any, Path], tmp_path: Path) -> None:
    """Killed while fetching: the next run is not disturbed, fetches the shard again and leaves nothing behind."""
    server, root = served
    cache = tmp_path / "cache"
    killed = launch_ranks(fetch_and_be_killed, 1, server.url, cache, may_fail=True)
    assert killed.codes == [-signal.SIGKILL]
    assert len(list(cache.glob("*.partial"))) in (1, 2)  # the reader's, and maybe that of the thread that fetches ahead
    same(take(server.url, 10, cache_dir=str(cache)), take(root, 10))
    assert not [path for path in cache.iterdir() if path.suffix != ".shard"]
    whole = next(path for path in cache.glob("*.shard") if path.stat().st_size > 50_000)
    whole.write_bytes(b"cut after a crash of the machine")
    same(take(server.url, 10, cache_dir=str(cache)), take(root, 10))


@pytest.mark.case("D12")
def test_two_jobs_at_once_on_one_cache(served: tuple[Any, Path], make_set: Callable[..., Path], tmp_path: Path) -> None:
    """The same data twice and other data of the same names, all at once through one cache that is too small for them."""
    server, root = served
    other_root = make_set([30, 0, 25, 5], name="other", classes=2)
    other = http_server.BadServer(other_root)
    server.behaviour = http_server.Behaviour(delay=0.02)
    options: dict[str, Any] = {
        "cache_dir": str(tmp_path / "c"),
        "cache_bytes": 120_000,
        "num_workers": 1,
        "num_classes": 3,
    }
    loaders = [make_loader(url, **(ARGS | options)) for url in (server.url, other.url, server.url)]
    found: list[list[Batch]] = [[], [], []]
    try:
        iterators = [iter(loader) for loader in loaders]
        for _ in range(15):
            for batches, iterator in zip(found, iterators):
                batches.append(next(iterator))
    finally:
        for loader in loaders:
            loader.close()
        other.close()
    same(found[0], take(root, 15))
    same(found[2], found[0])
    same(found[1], take(other_root, 15))
    for served_by, folder in ((server, root), (other, other_root)):
        asked = {request for request in served_by.behaviour.requests if request[0].endswith(".tar")}
        shards = [path for path in folder.glob("*.tar") if path.name != "shard-0001.tar"]  # that one is empty
        # The cache was used: shards were asked for whole. What lies in it at any one moment is a matter of chance.
        assert asked == {(f"/{path.name}", f"bytes=0-{path.stat().st_size - 1}") for path in shards}
    files = list((tmp_path / "c").iterdir())
    # Nothing half-written; nothing at all, if the last fetch had made room for itself when the loaders were closed.
    assert {path.suffix for path in files} <= {".shard"}
    assert sum(path.stat().st_size for path in files) <= 120_000


@pytest.mark.parametrize(("limit", "left"), [(1000, "ab"), (500, "a")])
@pytest.mark.case("D12")
def test_fetches_at_the_same_time_count_each_other(tmp_path: Path, limit: int, left: str) -> None:
    """The first has written nothing yet when the second makes room.

    With 500 bytes there is none for both, and the second one's stays for those only who have it open.
    """
    cache = ShardCache(tmp_path, limit)
    os.close(put(cache, "old", 400))

    def held() -> dict[str, int]:
        return {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".lock"}

    def fetch_b(file: Any) -> None:
        assert held() == {"a.partial": 400, "b.partial": 400}, "both have taken their room, and none is left"
        file.write(b"x" * 400)

    def fetch(file: Any) -> None:
        fd = ShardCache(tmp_path, limit).open("b", 400, fetch_b)  # by another process, meanwhile
        assert os.pread(fd, 500, 0) == b"x" * 400
        os.close(fd)
        assert held() == {"a.partial": 400} | ({"b.shard": 400} if "b" in left else {})
        file.write(b"x" * 400)

    fd = cache.open("a", 400, fetch)
    assert os.pread(fd, 500, 0) == b"x" * 400
    os.close(fd)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.shard" for name in left}


def test_what_a_fetch_reserved_and_did_not_write_is_not_in_the_file(tmp_path: Path) -> None:
    os.close(ShardCache(tmp_path, 1000).open("a", 400, lambda file: file.write(b"abc")))
    assert (tmp_path / "a.shard").read_bytes() == b"abc"


@pytest.mark.case("D12")
def test_a_running_fetch_is_not_swept_away(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 1 << 20)
    seen: list[int] = []

    def fetch(file: Any) -> None:
        file.write(b"abc")
        seen.append(ShardCache(tmp_path, 1 << 20).sweep())  # another process starts meanwhile

    os.close(cache.open("x", 3, fetch))
    assert seen == [0]
    assert (tmp_path / "x.shard").read_bytes() == b"abc"


def test_a_full_disk_names_the_settings(tmp_path: Path) -> None:
    def fetch(file: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"no room for .*data\.cache_bytes .*data\.cache_dir"):
        ShardCache(tmp_path, 1 << 20).open("x", 3, fetch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_are_fetched_before_they_are_wanted(make_set: Callable[..., Path], tmp_path: Path, workers: int) -> None:
    """As far as half the cache reaches, and further as the consumer goes on."""
    root = make_set([40] * 12)
    server = http_server.BadServer(root)
    size = (root / "shard-0000.tar").stat().st_size
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "c"), "cache_bytes": 10 * size, "num_workers": workers}
    order: dict[str, Any] = {"shuffle_block": 40, "global_batch_size": 8, "prefetch_batches": 1}
    asked = lambda: len({path for path, _ in server.behaviour.requests if path.endswith(".tar")})  # noqa: E731
    try:
        with make_loader(server.url, **(ARGS | options | order)) as loader:
            iterator = iter(loader)
            first = [next(iterator)]
            until("half of the cache to be full: five shards, of which the consumer needs one", lambda: asked() >= 5)
            time.sleep(0.2)
            assert asked() <= 7, "more was fetched than half of the cache holds"
            first += [next(iterator) for _ in range(30)]  # six shards on
            until("five shards more", lambda: asked() >= 10)
        same(first, take(root, 31, **order))
    finally:
        server.close()
    assert {path.suffix for path in (tmp_path / "c").iterdir()} == {".shard"}


def test_a_fetch_under_way_ends_with_the_loader(served: tuple[Any, Path], tmp_path: Path) -> None:
    server, _ = served
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "c"), "timeout_s": 5.0}
    with make_loader(server.url, **(ARGS | options)) as loader:
        next(iter(loader))
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "tarflow-fetch"]
    assert {path.suffix for path in (tmp_path / "c").iterdir()} == {".shard"}
