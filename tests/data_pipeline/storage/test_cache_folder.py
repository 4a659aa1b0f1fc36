"""The cache of a node that others use, too: nobody else's folder, files or links, and nothing that is not what was indexed."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.storage.access import Access
from tarflow.data_pipeline.storage.cache_folder import make_cache_folder
from tarflow.data_pipeline.storage.shard_cache import ShardCache
from tests.data_pipeline.storage.http_server import BadServer
from tests.helpers.loaders import make_loader
from tests.helpers.other_user import OTHER, ROOT, attempts_of_another, let_pass


@pytest.fixture
def served(make_set: Callable[..., Path]) -> Iterator[tuple[BadServer, Path]]:
    """(server, folder it serves)."""
    root = make_set([9, 8])
    server = BadServer(root)
    yield server, root
    server.close()


@pytest.fixture
def of_another(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a path another user's: really where this is root, else as it seems to the code."""
    theirs: set[tuple[int, int]] = set()

    def give(path: Path) -> None:
        if ROOT:
            os.chown(path, OTHER, OTHER, follow_symlinks=False)
            return
        about = path.lstat()
        theirs.add((about.st_dev, about.st_ino))

    def seen(about: os.stat_result) -> os.stat_result:
        if (about.st_dev, about.st_ino) not in theirs:
            return about
        return os.stat_result((*about[:4], OTHER, *about[5:]))

    if not ROOT:
        real_fstat, real_lstat = os.fstat, Path.lstat
        monkeypatch.setattr(os, "fstat", lambda fd: seen(real_fstat(fd)))
        monkeypatch.setattr(Path, "lstat", lambda path: seen(real_lstat(path)))
    return give


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder as /tmp is: everybody may write, nobody may rename or remove what is another's."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def take(data: Any, count: int = 9, **options: Any) -> list[Any]:
    with make_loader(data, image_size=8, channels=3, global_batch_size=2, num_classes=3, **options) as loader:
        return [(b.ids.tolist(), b.images.numpy().tobytes()) for b in itertools.islice(loader, count)]


def put(folder: Path, content: bytes = b"abc") -> bytes:
    fd = ShardCache(folder, 1000).open("a", 3, lambda file: file.write(content))
    try:
        return os.pread(fd, 10, 0)
    finally:
        os.close(fd)


@pytest.mark.case("H07")
def test_the_cache_is_made_for_its_owner_alone(shared: Path) -> None:
    old = os.umask(0)
    try:
        put(shared / "cache")
    finally:
        os.umask(old)
    assert (shared / "cache").stat().st_mode & 0o777 == 0o700
    assert (shared / "cache" / "a.shard").stat().st_mode & 0o777 == 0o600
    (shared / "cache").chmod(0o755)  # as earlier versions made it
    put(shared / "cache")
    assert (shared / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.case("H07")
def test_a_folder_that_someone_else_made_first_is_refused(shared: Path, of_another: Callable[[Path], None]) -> None:
    (shared / "cache").mkdir()
    (shared / "cache").chmod(0o777)
    of_another(shared / "cache")
    with pytest.raises(DataError, match=rf"cache.*uid {OTHER}.*data\.cache_dir"):
        put(shared / "cache")
    with pytest.raises(DataError, match=rf"cache.*uid {OTHER}.*data\.cache_dir"):
        put(shared / "cache" / "mine")  # nor one below it
    assert list((shared / "cache").iterdir()) == []


@pytest.mark.case("H07")
def test_a_folder_that_changes_hands_later_is_refused(tmp_path: Path, of_another: Callable[[Path], None]) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)
    of_another(tmp_path / "cache")
    with pytest.raises(DataError, match=rf"belongs to .*uid {OTHER}"):
        cache.open("a", 3, lambda file: file.write(b"abc"))


@pytest.mark.case("H07")
def test_a_link_that_someone_else_planted_is_not_followed(
    shared: Path, tmp_path: Path, of_another: Callable[[Path], None]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.partial").write_text("kept")
    (shared / "cache").symlink_to(mine)
    of_another(shared / "cache")
    (shared / "chain").symlink_to(shared / "cache")  # a link of one's own that leads there
    for name in ("cache", "chain"):
        with pytest.raises(DataError, match=rf"cache is a link of .*uid {OTHER}.*data\.cache_dir"):
            ShardCache(shared / name, 1000).sweep()
    assert (mine / "precious.partial").read_text() == "kept"
    (tmp_path / "scratch").symlink_to(mine)  # one's own, in a folder of one's own, is followed
    assert make_cache_folder(tmp_path / "scratch" / "cache") == mine / "cache"


@pytest.mark.case("H07")
def test_a_place_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "all"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(DataError, match=r"lies in .*all, which everybody may write \(mode 777\).*data\.cache_dir"):
        put(open_to_all / "cache")
    assert list(open_to_all.iterdir()) == []
    open_to_all.chmod(0o775)  # a group's folder is as its owner wants it
    assert put(open_to_all / "cache") == b"abc"


@pytest.mark.case("H07")
def test_links_in_a_circle_and_files_in_the_way_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").touch()
    for name in ("a", "a/cache", "file/cache"):
        with pytest.raises(DataError, match=r"cannot make the folder .*data\.cache_dir"):
            put(tmp_path / name)
    with pytest.raises(DataError, match=r"file is a link or a file, .*data\.cache_dir"):
        put(tmp_path / "file")


@pytest.mark.case("H07")
def test_a_folder_that_others_could_have_filled_is_refused(tmp_path: Path) -> None:
    """A file of one's own name and right size may have been planted, or be a link to another."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for mode in (0o770, 0o707):
        cache.chmod(mode)
        with pytest.raises(DataError, match=r"cache can be written by others \(mode 7[07]{2}\).*data\.cache_dir"):
            put(cache)
        assert list(cache.iterdir()) == []
    cache.chmod(0o700)
    (tmp_path / "link").symlink_to(cache)
    with pytest.raises(DataError, match=r"link is a link or a file, .*data\.cache_dir"):
        put(tmp_path / "link")


@pytest.mark.parametrize("name", ["a.partial", "a.shard"])
@pytest.mark.parametrize("kind", ["link", "hanging link", "pipe", "theirs"])
@pytest.mark.case("H07")
def test_what_was_planted_under_a_name_is_neither_followed_nor_used(
    tmp_path: Path, name: str, kind: str, of_another: Callable[[Path], None]
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    cache = make_cache_folder(tmp_path / "cache")
    planted = cache / name
    if kind == "pipe":
        os.mkfifo(planted)
    elif kind == "theirs":
        planted.write_bytes(b"bad")  # of the right size
        of_another(planted)
    else:
        planted.symlink_to(target if kind == "link" else tmp_path / "new")
    assert put(cache) == b"abc"
    assert target.read_bytes() == b"old"
    assert not (tmp_path / "new").exists()
    assert sorted(os.listdir(cache)) == ["a.shard"]
    assert not (cache / "a.shard").is_symlink()


@pytest.mark.parametrize("ending", [".tar", ".parquet"])
@pytest.mark.case("H07")
def test_a_planted_or_damaged_copy_in_the_cache_is_fetched_anew(
    served: tuple[BadServer, Path], tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, root = served
    cache = tmp_path / "cache"
    good = take(root)
    assert take(server.url, cache_dir=str(cache)) == good
    files = {path: path.read_bytes() for path in cache.glob("*.shard")}
    assert len(files) == 3
    for path, content in files.items():
        if (content[:4] == b"PAR1") == (ending == ".parquet"):
            path.write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    assert take(server.url, cache_dir=str(cache)) == good
    assert {path: path.read_bytes() for path in files} == files
    if ending == ".tar":
        assert "in the cache is damaged and is fetched again" in caplog.text


@pytest.mark.case("H07")
def test_a_flaw_that_the_sketch_misses_is_found_by_the_thread_that_fetches_ahead(
    served: tuple[BadServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tarflow.data_pipeline.storage import remote_shards
    from tarflow.data_pipeline.storage.open_index import open_index

    server, root = served
    access = Access(str(tmp_path / "c"))
    index = open_index(server.url, access)
    content = index.shard_content(0)
    assert content is not None
    monkeypatch.setattr(remote_shards, "sketch_of_file", lambda fd, size: content.sketch)
    remote_shards.RemoteShards(index, access).fetch(0)
    (path,) = (path for path in (tmp_path / "c").glob("*.shard"))
    path.write_bytes(b"x" * path.stat().st_size)
    remote_shards.RemoteShards(index, access).fetch(0)
    assert path.read_bytes() == (root / "shard-0000.tar").read_bytes()


def test_two_users_on_one_node_keep_out_of_each_other_s_cache(shared: Path, of_another: Callable[[Path], None]) -> None:
    """Two real users where the tests may change theirs; else the other one's folder stands for the other user."""
    folder, theirs = shared / "cache", shared / "first"
    assert put(folder) == b"abc"
    if ROOT:
        let_pass(shared)
        told = attempts_of_another(
            f"from tarflow.data_pipeline.storage.shard_cache import ShardCache; folder = Path({str(folder)!r})",
            "os.listdir(folder)",
            "(folder / 'a.shard').read_bytes()",
            "(folder / 'b.shard').write_bytes(b'bad')",
            "(folder / 'a.shard').unlink()",
            "folder.rename(folder.with_name('away'))",
            "ShardCache(folder, 1000).open('b', 3, lambda file: file.write(b'bad'))",
            "[folder.with_name('first').mkdir(), (folder.with_name('first') / 'a.shard').write_bytes(b'bad')]",
        )
        assert all(re.match(r"PermissionError|DataError: .*data\.cache_dir", answer) for answer in told[:-1]), told
        assert told[-1] == "[None, 3]"
        assert put(folder, b"xyz") == b"abc"  # what was there
        assert os.listdir(folder) == ["a.shard"]
    else:
        theirs.mkdir()
        (theirs / "a.shard").write_bytes(b"bad")
        of_another(theirs)
    with pytest.raises(DataError, match=rf"uid {OTHER}"):
        put(theirs)
    assert (theirs / "a.shard").read_bytes() == b"bad"


def test_two_users_have_two_default_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = Access().folder()
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    assert Access().folder() != mine
    assert Access().folder() == tmp_path / f"tarflow-cache-{OTHER}"


def test_counts_of_a_stream_are_kept_in_the_private_folder(shared: Path, lab: SimpleNamespace) -> None:
    from tarflow.data_pipeline.loading.stream.counts import ShardCounts

    target = shared.parent / "target"
    target.write_text("kept")
    counts = ShardCounts(shared / "cache", ["x.tar"], "0of1")
    (shared / "cache").mkdir()
    counts.path.symlink_to(target)
    counts.learn(0, 7)
    assert target.read_text() == "kept"
    assert (shared / "cache").stat().st_mode & 0o777 == 0o700
    assert ShardCounts(shared / "cache", ["x.tar"], "0of1").of(0) == 7
