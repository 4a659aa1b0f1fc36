"""Shards that change under their index, or before the next one: the fingerprint and the readers see what they hold."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tarflow.cli import main
from tarflow.data_pipeline.errors import BadSampleError, DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.index.content import BLOCK, BLOCKS, content_of, sketch_of_file
from tarflow.data_pipeline.index.mds import write_mds
from tarflow.data_pipeline.loading.choose_reader import data_facts
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.stream.shards import stream_fingerprint
from tarflow.data_pipeline.prepare.verify import verify
from tarflow.data_pipeline.storage.changed_shards import check_shards
from tarflow.data_pipeline.storage.local_shards import LocalShards
from tarflow.data_pipeline.storage.open_index import open_index
from tests.helpers.loaders import make_loader
from tests.helpers.old_index import as_version_0_1


def write_bmps(lab: SimpleNamespace, root: Path, first: int, shards: int = 2) -> list[Path]:
    """Two shards whose sizes, names and labels do not depend on `first`, and whose pixels do."""
    root.mkdir(exist_ok=True)
    paths = [root / f"{shard}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        members = [
            pair
            for i in range(3)
            for pair in ((f"{shard}{i}.bmp", lab.image_bytes(first + i, format="BMP")), (f"{shard}{i}.cls", b"%d" % i))
        ]
        lab.write_tar(path, members)
    return paths


def other_time(path: Path) -> None:
    """What a copy looks like, or a file written later than the clock of the file system can tell."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 7_000_000_000))


def flip_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def take(data: Any, count: int = 1, **options: Any) -> list[Any]:
    with make_loader(
        data, **{"image_size": 8, "channels": 3, "global_batch_size": 3, "num_classes": 3} | options
    ) as loader:
        return list(itertools.islice(loader, count))


@pytest.mark.parametrize("form", ["tar", "mds", "stream"])
@pytest.mark.case("V04")
def test_other_images_of_the_same_sizes_give_another_fingerprint(
    tmp_path: Path, lab: SimpleNamespace, form: str
) -> None:
    def fingerprint(first: int) -> str:
        if form == "mds":
            for old in (tmp_path / "set").glob("*.mds"):
                old.unlink()
            write_mds(tmp_path / "set", ((lab.image_bytes(first + i, format="BMP"), i) for i in range(3)), 1 << 20)
            return build_index(tmp_path / "set", [tmp_path / "set"])[0].fingerprint
        shards = write_bmps(lab, tmp_path / "set", first)
        if form == "stream":
            return data_facts(DataSettings.of(f"{tmp_path}/set/{{0,1}}.tar", reader="stream")).fingerprint
        return build_index(tmp_path / "set", shards)[0].fingerprint

    first = fingerprint(0)
    assert fingerprint(9) != first
    assert fingerprint(0) == first


@pytest.mark.case("V04")
def test_streams_of_which_nothing_is_known_keep_the_fingerprint_of_their_names() -> None:
    facts = data_facts(DataSettings.of("pipe:cat /nowhere/{0..1}.tar"))
    names = b"pipe:cat /nowhere/0.tar\npipe:cat /nowhere/1.tar"
    assert facts.fingerprint == facts.former_fingerprint == "stream-" + hashlib.sha256(names).hexdigest()[:25]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.case("V04")
def test_a_shard_replaced_by_one_of_the_same_size_is_refused(
    tmp_path: Path, lab: SimpleNamespace, workers: int
) -> None:
    index, _ = build_index(tmp_path / "set", write_bmps(lab, tmp_path / "set", 0))
    before = content_of(tmp_path / "set/1.tar")
    write_bmps(lab, tmp_path / "set", 5)
    other_time(tmp_path / "set/1.tar")
    assert content_of(tmp_path / "set/1.tar").file_bytes == before.file_bytes
    wanted = r"shard .*[01]\.tar holds other bytes than when it was indexed.*tarflow data index"
    with pytest.raises(DataError, match=wanted):
        check_shards(index)
    for rank in (0, 1):  # the first looks at all shards when it starts, the others at each that they open
        with pytest.raises(DataError, match=wanted):
            take(tmp_path / "set", 4, num_workers=workers, rank=rank, world_size=3, on_error="skip")


@pytest.mark.case("V04")
def test_copies_and_touched_shards_go_on(tmp_path: Path, lab: SimpleNamespace) -> None:
    for path in write_bmps(lab, tmp_path / "set", 0):
        build_index(tmp_path / "set", sorted((tmp_path / "set").glob("*.tar")))
        other_time(path)
    check_shards(open_index(tmp_path / "set"))
    assert len(take(tmp_path / "set", 2)) == 2
    (tmp_path / "set/1.tar").unlink()  # missing shards are the reader's to name
    check_shards(open_index(tmp_path / "set"))


@pytest.mark.case("V04")
def test_a_sketch_covers_small_files_and_both_ends_of_large_ones(tmp_path: Path) -> None:
    def sketch(path: Path) -> str:
        with path.open("rb") as file:
            return sketch_of_file(file.fileno(), path.stat().st_size)

    rng = random.Random(0)
    for size in (1, BLOCK - 1, BLOCK + 1, BLOCK * BLOCKS, 3 * BLOCK * BLOCKS + 5):
        path = tmp_path / str(size)
        path.write_bytes(rng.randbytes(size))
        whole, content = sketch(path), content_of(path)
        assert content.sketch == whole
        places = {0, size - 1}
        if size <= BLOCK * BLOCKS:
            places |= {rng.randrange(size) for _ in range(5)}
        for at in places:
            flip_byte(path, at)
            assert sketch(path) != whole, (size, at)
            flip_byte(path, at)
        assert sketch(path) == whole
        middle = size // 2
        flip_byte(path, middle)
        assert content_of(path).checksum != content.checksum
    assert content_of(tmp_path / "1").file_bytes == 1


@pytest.mark.case("V04")
def test_verify_finds_what_kept_size_and_time(tmp_path: Path, lab: SimpleNamespace) -> None:
    """Then neither a start nor the sketch sees it; the whole checksum does."""
    (path,) = write_bmps(lab, tmp_path / "set", 0, shards=1)
    index, _ = build_index(tmp_path / "set", [path])
    status = path.stat()
    flip_byte(path, 512 + 54 + 30)  # a pixel of the first image
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    check_shards(index)
    report = verify(index)
    assert report.problems == {"content_differs": 1}
    assert f"shard {path}: its bytes are not those that were indexed" in report.lines()[-1]


@pytest.mark.case("V04")
def test_an_index_of_an_earlier_version_goes_on_with_its_fingerprint(
    make_set: Callable[..., Path], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_set([4, 4])
    new = open_index(root)
    assert new.fingerprint != new.fingerprint_of_places
    as_version_0_1(root)
    old = open_index(root)
    assert old.fingerprint == old.fingerprint_of_places == new.fingerprint_of_places
    assert (old.knows_content, old.shard_content(0)) == (False, None)
    for path in root.glob("*.tar"):
        other_time(path)
    check_shards(old)
    assert take(root)
    assert (
        sum("does not cover what the shards hold" in line and "tarflow data index" in line for line in caplog.messages)
        == 1
    )
    assert verify(old).problems == {}
    assert main(["data", "info", str(root)]) == 0
    assert f"{old.fingerprint} (of an earlier version, without contents" in capsys.readouterr().out
    assert data_facts(DataSettings.of(root)).former_fingerprint is None


@pytest.fixture
def served(tmp_path: Path, lab: SimpleNamespace) -> Iterator[tuple[str, Path]]:
    import http.server
    import threading
    from functools import partial

    build_index(tmp_path / "set", write_bmps(lab, tmp_path / "set", 0))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "set")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "set"
    server.shutdown()
    server.server_close()


@pytest.mark.case("V04")
def test_a_shard_changed_behind_an_address_is_noticed_when_it_is_fetched(
    served: tuple[str, Path], tmp_path: Path, lab: SimpleNamespace
) -> None:
    url, root = served
    options = {"cache_dir": str(tmp_path / "cache"), "retries": 0}
    assert take(url, 2, **options)
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    write_bmps(lab, root, 5)
    with pytest.raises(DataError, match=r"shard http.*\.tar holds other bytes than when it was indexed \(checksum"):
        take(url, 2, **options)
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.case("H06")
def test_a_pipe_in_the_place_of_a_shard_is_named_and_not_waited_for(tmp_path: Path, lab: SimpleNamespace) -> None:
    (shard, *_) = write_bmps(lab, tmp_path, 0)
    build_index(tmp_path, sorted(tmp_path.glob("*.tar")))
    shard.unlink()
    os.mkfifo(shard)
    index = open_index(tmp_path)
    check_shards(index)  # what cannot be opened is told by who reads it
    with pytest.raises(BadSampleError, match="cannot open the shard: it is not a regular file"):
        LocalShards(index).read(0, 0, 10)
    with pytest.raises(DataError, match=r"cannot open shard .*: it is not a regular file"):
        build_index(tmp_path, [shard])
    assert stream_fingerprint([str(shard)]) == stream_fingerprint([str(shard)])
    report = verify(index)
    assert report.problems == {"unreadable_shard": 1}
    assert "it is not a regular file" in "\n".join(report.lines())
