"""An index behind an address may name only what lies under it, and a server may answer only so much, in only so much time."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarflow.cli import main
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.shard_list import META_KEY, sealed
from tarflow.data_pipeline.storage.access import Access
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.data_pipeline.storage.roots import check_name, redirected
from tests.data_pipeline.storage.http_server import BadServer, Behaviour
from tests.helpers.loaders import make_loader


@pytest.fixture
def served(make_set: Callable[..., Path]) -> Iterator[tuple[BadServer, Path]]:
    """(server, folder it serves)."""
    root = make_set([4, 3])
    server = BadServer(root)
    yield server, root
    server.close()


def rename_shard(root: Path, name: str) -> None:
    """Let the index name its first shard so; sealed, as whoever means harm would."""
    path = root / "index" / "shards.parquet"
    table = pq.read_table(path)
    meta = json.loads(table.schema.metadata[META_KEY])
    del meta["checksum"]
    names = pa.array([name, *table["path"].to_pylist()[1:]])
    table = table.set_column(0, "path", names).replace_schema_metadata({META_KEY: json.dumps(sealed(meta)).encode()})
    pq.write_table(table, path)


def take(data: Any, count: int = 3, **options: Any) -> list[Any]:
    with make_loader(data, image_size=8, channels=3, global_batch_size=2, num_classes=3, **options) as loader:
        return list(itertools.islice(loader, count))


def fetched(server: BadServer) -> list[str]:
    return [path for path, _ in server.behaviour.requests if "shards.parquet" not in path]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file:/etc/passwd",
        "simplecache::file:///etc/passwd",
        "simplecache::/etc/passwd",
        "x::file:///etc/passwd",
        "data:application/x-tar;base64,AAAA",
        "data://x,AAAA",
        "../shard-0000.tar",
        "a/../../shard-0000.tar",
        "%2e%2e/shard-0000.tar",
        "%252e%252e/shard-0000.tar",
        "..%2fshard-0000.tar",
        "..\\shard-0000.tar",
        "a\x1b]0;title\x07.tar",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/x.tar",
        "ftp://127.0.0.1/x.tar",
        "memory://x.tar",
        "http://127.0.0.1:1/x.tar",
    ],
)
@pytest.mark.case("H08")
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_fetched(
    served: tuple[BadServer, Path], tmp_path: Path, name: str
) -> None:
    server, root = served
    rename_shard(root, name)
    with pytest.raises(DataError) as caught:
        take(server.url, cache_dir=str(tmp_path / "c"))
    assert fetched(server) == []
    assert str(caught.value).isprintable()
    if "://" in name and "::" not in name:
        assert "data.allow_roots" in str(caught.value)


@pytest.mark.case("H08")
def test_a_folder_s_index_names_no_address_that_is_not_allowed(
    served: tuple[BadServer, Path], tmp_path: Path, make_set: Callable[..., Path]
) -> None:
    server, root = served
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    rename_shard(copy, f"{server.url}/shard-0000.tar")
    with pytest.raises(DataError, match=r"does not lie under the folder of its index.*data\.allow_roots"):
        open_index(copy)
    assert fetched(server) == []
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "c"), "allow_roots": (server.url,)}
    assert [b.ids.tolist() for b in take(copy, **options)] == [b.ids.tolist() for b in take(root)]
    assert fetched(server) == ["/shard-0000.tar"]


@pytest.mark.case("H08")
def test_what_a_setting_allows_is_read_by_workers_and_by_info_too(
    served: tuple[BadServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, root = served
    other = BadServer(root)
    rename_shard(root, f"{other.url}/shard-0000.tar")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    try:
        ours = take(server.url, cache_dir=str(tmp_path / "c"), allow_roots=(f"{other.url}/",), num_workers=1)
        assert len(ours) == 3
        assert fetched(other) == ["/shard-0000.tar"]
        assert main(["data", "info", server.url]) == 2
        assert main(["data", "info", server.url, "--allow-root", other.url]) == 0
        with pytest.raises(DataError, match="does not lie under"):  # a longer name is another folder
            open_index(server.url, Access(str(tmp_path / "c"), allow_roots=(f"{other.url}/shard-0",)))
        with pytest.raises(DataError, match=r"data\.allow_roots cannot hold 'cdn\.example\.org'"):
            open_index(server.url, Access(str(tmp_path / "c"), allow_roots=("cdn.example.org",)))
    finally:
        other.close()


@pytest.mark.parametrize("what", [".tar", "shards.parquet", "samples-00000.parquet"])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 0], ids=["cache", "ranges"])
@pytest.mark.case("H08")
def test_redirects_stay_with_the_host_unless_allowed(
    served: tuple[BadServer, Path], tmp_path: Path, what: str, cache_bytes: int
) -> None:
    server, root = served
    (root / "moved").mkdir()
    for path in (*root.glob("*.tar"), *root.glob("index/*")):
        shutil.copy(path, root / "moved" / path.name)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    other = BadServer(root / "moved")
    options: dict[str, Any] = {"cache_bytes": cache_bytes, "retries": 0}
    try:
        targets = [
            secret.as_uri(),
            f"{other.url}/",
            f"{other.url.replace('127.0.0.1', 'localhost')}/",
            "data:,x",
            "//[",
            "",
        ]
        for number, target in enumerate(targets):
            server.behaviour = Behaviour(moved={what: target})
            with pytest.raises(DataError, match="redirects to"):
                take(server.url, cache_dir=str(tmp_path / str(number)), **options)
        assert other.behaviour.requests == []
        server.behaviour = Behaviour(moved={what: f"/x/{what}"})
        with pytest.raises(DataError, match="redirects more than 5 times"):
            take(server.url, cache_dir=str(tmp_path / "round"), **options)
    finally:
        other.close()


@pytest.mark.case("H08")
def test_a_redirect_to_an_allowed_host_and_one_on_the_same_host_are_followed(
    served: tuple[BadServer, Path], tmp_path: Path
) -> None:
    server, root = served
    other = BadServer(root)
    try:
        server.behaviour = Behaviour(moved={"/shard-0001.tar": f"{other.url}/shard-0001.tar"})
        assert len(take(server.url, cache_dir=str(tmp_path / "a"), allow_roots=(other.url,))) == 3
        assert fetched(other) == ["/shard-0001.tar"]
        shutil.copy(root / "shard-0001.tar", root / "else.tar")
        server.behaviour = Behaviour(moved={"/shard-0001.tar": "/else.tar"})
        assert len(take(server.url, cache_dir=str(tmp_path / "b"))) == 3
    finally:
        other.close()


@pytest.mark.case("H08")
def test_https_of_the_same_host_is_no_other_one() -> None:
    assert redirected("http://a.org/x", "http://a.org/x", "https://a.org/y", ()) == "https://a.org/y"
    for here, to in (
        ("https://a.org/x", "http://a.org/x"),
        ("http://a.org/x", "http://a.org.evil.net/x"),
        ("http://a.org/x", "http://a.org@evil.net/x"),
        ("http://a.org/x", "//evil.net/x"),
        ("http://a.org/x", "http://a.org:22/x"),
        ("http://a.org/x", "file:///x"),
    ):
        with pytest.raises(DataError, match="redirects to"):
            redirected(here, here, to, ("https://cdn.org/sets",))
    assert redirected("http://a.org/x", "http://a.org/x", "https://cdn.org/sets/x", ("https://cdn.org/sets",))
    with pytest.raises(DataError, match="redirects to"):
        redirected("http://a.org/x", "http://a.org/x", "https://cdn.org/sets2/x", ("https://cdn.org/sets",))


def test_names_that_shards_have_pass() -> None:
    for name in ("a.tar", "a/b-00000.tar", "..a/b..tar", "été 100%.tar", "x%20y.tar", "http://h:80/a~b/c.tar"):
        check_name(name)


@pytest.mark.parametrize("what", ["shards.parquet", "samples-00000.parquet", ".tar"])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 0], ids=["cache", "ranges"])
@pytest.mark.case("H08")
def test_an_endless_body_is_given_up(
    served: tuple[BadServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, cache_bytes: int
) -> None:
    server, _ = served
    monkeypatch.setattr("tarflow.data_pipeline.index.index.MAX_BYTES", 1 << 20)
    server.behaviour = Behaviour(endless=True, only=what)
    with pytest.raises(DataError, match=r"sends more than \d+ bytes|ignores ranges"):
        take(server.url, cache_dir=str(tmp_path / "c"), cache_bytes=cache_bytes, timeout_s=5.0)
    assert server.sent < 32 << 20


@pytest.mark.case("H08")
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(served: tuple[BadServer, Path], tmp_path: Path) -> None:
    """Each byte comes in time; all of them would take days."""
    server, _ = served
    server.behaviour = Behaviour(drip=0.02, only="shards.parquet")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"2 attempts .*TimeoutError.*data\.timeout_s"):
        take(server.url, cache_dir=str(tmp_path / "c"), retries=1, timeout_s=0.05)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("only", "name"), [(".tar", r"shard http.*\.tar holds"), ("samples-00000.parquet", "http.*samples")]
)
@pytest.mark.case("H07")
def test_what_came_wrong_is_fetched_once_more_and_then_named(
    served: tuple[BadServer, Path], tmp_path: Path, only: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, root = served
    expected = [b.ids.tolist() for b in take(root)]
    server.behaviour = Behaviour(wrong=1, only=only)
    assert [b.ids.tolist() for b in take(server.url, cache_dir=str(tmp_path / "a"))] == expected
    assert "fetched once more" in caplog.text
    server.behaviour = Behaviour(wrong=99, only=only)
    with pytest.raises(DataError, match=rf"{name}.*checksum.*twice"):
        take(server.url, cache_dir=str(tmp_path / "b"))
    assert not [path for path in os.listdir(tmp_path / "b") if "partial" in path]


@pytest.mark.case("H07")
def test_what_cannot_be_checked_is_said_and_kept(
    served: tuple[BadServer, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tarflow.data_pipeline.loading.settings import DataSettings
    from tarflow.data_pipeline.loading.survey import survey
    from tests.helpers.old_index import as_version_0_1

    server, root = served
    settings: dict[str, Any] = {"cache_dir": str(tmp_path / "c")}
    assert survey(DataSettings.of(server.url, **settings)).describe()["unchecked"] is None
    take(server.url, cache_bytes=0, **settings)
    assert "is not checked: without a cache (data.cache_bytes=0)" in caplog.text
    assert "without a cache" in str(
        survey(DataSettings.of(server.url, cache_bytes=0, **settings)).describe()["unchecked"]
    )
    as_version_0_1(root)
    take(server.url, **settings)
    assert "of an earlier version, holds no checksums" in caplog.text
