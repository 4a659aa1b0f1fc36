"""What a data set of a stranger may claim: counted, measured and refused before memory or time go by it."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tarflow.cli import main
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.index.classes import parse_classes
from tarflow.data_pipeline.index.mds import mds_shards
from tarflow.data_pipeline.index.patterns import expand_braces, find_shards
from tarflow.data_pipeline.index.samples import Rules
from tarflow.data_pipeline.index.tar.grouping import group
from tarflow.data_pipeline.index.tar.links import TarLink, follow
from tarflow.data_pipeline.index.tar.scan import scan_tar


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("s-{0..9999}{0..9999}{0..9999}.tar", "1,000,000,000,000"),
        ("s-{0..999999999999999999}.tar", "1,000,000,000,000,000,000"),
        ("{" + "{0..99},x},{0..99},{" * 0 + "{0..999},{0..999}}" + "{0..999}.tar", "2,000,000"),
        ("{a,{b,{0..999}}}{0..9999}", "10,020,000"),
        ("".join("{a,b}" for _ in range(40)), "1,099,511,627,776"),
        ("{" * 20 + "0..1" + ",a}" * 19 + "}" + "{0..99999999}", None),
    ],
)
@pytest.mark.case("H10")
def test_names_of_braces_are_counted_before_they_are_made(pattern: str, count: str | None) -> None:
    began = time.process_time()
    with pytest.raises(DataError, match=f"stands for {count} names" if count else "braces|stands for|cannot read"):
        expand_braces(pattern)
    with pytest.raises(DataError):
        find_shards(pattern)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "pattern", ["{a,{1..3}}x{0..1}", "{1..3}{a,b,}", "x", "{000..012}-{a,b}", "{{a,b},{c,d}}{e,f}"]
)
def test_the_count_is_that_of_the_names(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = expand_braces(pattern)
    monkeypatch.setattr("tarflow.data_pipeline.index.patterns.MAX_NAMES", len(names))
    assert expand_braces(pattern) == names
    monkeypatch.setattr("tarflow.data_pipeline.index.patterns.MAX_NAMES", len(names) - 1)
    with pytest.raises(DataError, match=f"stands for {len(names)} names"):
        expand_braces(pattern)


def test_links_that_lead_to_each_other_take_the_time_of_one_look_each() -> None:
    count = 20_000
    links = [TarLink(b"l%d" % i, b"l%d" % (i + 1), symbolic=False) for i in range(count)]
    began = time.process_time()
    found, left = follow(links, [b"l%d" % count])
    assert (len(found), left) == (count, [])
    assert time.process_time() - began < 5, "a round through all links for each of them takes minutes"
    assert follow(links, []) == ([], links)


def pax(path: Path, headers: dict[str, str]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = 3, headers
        tar.addfile(info, io.BytesIO(b"abc"))


@pytest.mark.parametrize("size", ["9" * 5000, "9" * 19, "-1", "1e9", ""])
@pytest.mark.case("H10")
def test_a_size_in_a_pax_header_that_no_file_has(tmp_path: Path, size: str) -> None:
    pax(tmp_path / "a.tar", {"size": size})
    scan = scan_tar(tmp_path / "a.tar")
    assert scan.names in ([b"a.png"], [])
    assert all(offset + size <= scan.file_bytes for offset, size in zip(scan.offsets, scan.sizes))


@pytest.mark.case("H10")
def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    pax(tmp_path / "a.tar", {"size": str(1 << 60)})
    with pytest.raises(DataError, match=r"damaged, member 'a\.png'"):
        build_index(tmp_path, [tmp_path / "a.tar"])


@pytest.mark.case("H10")
def test_a_label_of_gigabytes_is_not_read(tmp_path: Path, lab: SimpleNamespace) -> None:
    """The file has holes: it takes no room, and would take all memory."""
    path = tmp_path / "a.tar"
    size = 40 << 30
    with path.open("wb") as file:
        for name, length, content in (("a.png", 3, b"abc"), ("a.cls", size, b"")):
            info = tarfile.TarInfo(name)
            info.size = length
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.write(content.ljust(512, b"\0") if content else b"")
        file.truncate(512 * 3 + size + 1024)
    scan = scan_tar(path)
    assert scan.sizes == [3, size]
    with pytest.raises(DataError, match=r"a\.cls.*has 42949672960 bytes, a label at most"):
        group(scan, str(path), Rules())
    with pytest.raises(DataError, match=r"a\.cls.*has 42949672960 bytes, a label at most"):
        group(scan, str(path), Rules(label_field="cls:x"))


@pytest.mark.parametrize(
    "content", [b"[" * 50_000, b'{"label": ' + b"[" * 50_000, b'{"label": 1e400}', b'{"label": ' + b"9" * 5000 + b"}", b"\xff"]
)  # fmt: skip
@pytest.mark.case("H10")
def test_labels_in_json_that_cannot_be(tmp_path: Path, lab: SimpleNamespace, content: bytes) -> None:
    lab.write_tar(tmp_path / "a.tar", [("a.png", lab.image_bytes(1)), ("a.json", content)])
    with pytest.raises(DataError, match=r"a\.json.*(is not JSON|is inf|expected)"):
        build_index(tmp_path, [tmp_path / "a.tar"], label_field="json:label")
    build_index(tmp_path, [tmp_path / "a.tar"])


def mds_set(folder: Path, **changes: Any) -> None:
    entry: dict[str, Any] = {
        "format": "mds", "version": 2, "compression": None, "samples": 1, "column_names": ["image", "label"],
        "column_encodings": ["bytes", "int"], "column_sizes": [None, 8], "raw_data": {"basename": "shard.00000.mds", "bytes": 27},
        "hashes": [], "size_limit": 1 << 26, "zip_data": None,
    }  # fmt: skip
    begin = 12
    body = (3).to_bytes(4, "little") + b"abc" + (1).to_bytes(8, "little")
    table = b"".join(n.to_bytes(4, "little") for n in (1, begin, begin + len(body)))
    (folder / "shard.00000.mds").write_bytes(table + body)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [entry | changes]}))


def test_an_mds_set_as_it_should_be(tmp_path: Path) -> None:
    mds_set(tmp_path)
    index, _ = build_index(tmp_path, [tmp_path])
    assert index.rows(0).labels.tolist() == [1]
    assert index.rows(0).sizes.tolist() == [3]


@pytest.mark.parametrize(
    "changes",
    [
        {"raw_data": {"basename": "../shard.mds", "bytes": 27}},
        {"raw_data": {"basename": "/etc/passwd", "bytes": 27}},
        {"raw_data": {"basename": "..", "bytes": 27}},
        {"raw_data": {"basename": "a\x1b[2J.mds", "bytes": 27}},
        {"raw_data": {"basename": "a\\b.mds", "bytes": 27}},
        {"raw_data": {"basename": "a.mds"}},
        {"raw_data": {"basename": "a.mds", "bytes": -1}},
        {"raw_data": {"basename": "a.mds", "bytes": "27"}},
        {"raw_data": []},
        {"samples": -1},
        {"samples": 1e400},
        {"samples": 1 << 40},
        {"samples": True},
        {"column_names": "image"},
        {"column_names": ["image"]},
        {"column_sizes": [None, 1]},
        {"column_sizes": [None, None]},
        {"column_sizes": [-4, 8]},
        {"column_encodings": [None, "int"]},
        {"column_encodings": [["bytes"], "int"]},
        {"compression": 7},
        {"version": "2"},
    ],
)
@pytest.mark.case("H10")
def test_an_mds_index_that_cannot_be_is_one_error(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    mds_set(tmp_path, **changes)
    with pytest.raises(DataError, match=r"cannot read .*index\.json as the index of an MDS set"):
        mds_shards(tmp_path)
    assert main(["data", "index", str(tmp_path)]) == 2
    assert capsys.readouterr().err.isascii()


def test_an_mds_index_that_changed_its_mind_is_one_error_of_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mds_set(tmp_path)
    build_index(tmp_path, [tmp_path])
    mds_set(tmp_path, raw_data={"basename": "shard.00001.mds", "bytes": 27})
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert "is no longer listed in" in capsys.readouterr().out


@pytest.mark.parametrize("samples", [2, 1 << 29])
@pytest.mark.case("H10")
def test_an_mds_index_that_counts_more_samples_than_its_shard_holds(tmp_path: Path, samples: int) -> None:
    mds_set(tmp_path, samples=samples)
    with pytest.raises(DataError, match=r"damaged: .*index\.json"):
        build_index(tmp_path, [tmp_path])


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[1]", '["a", "a"]', "", '"a"', "[" + "9" * 5000 + "]"])
@pytest.mark.parametrize("where", ["classes", "mds", "beside"])
@pytest.mark.case("H10")
def test_lists_that_are_none_are_one_error(
    tmp_path: Path, text: str, where: str, make_set: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_set([2])
    if where == "mds":
        (root / "index.json").write_text(text)
        assert main(["data", "index", str(root)]) == 2
        assert "as the index of an MDS set" in capsys.readouterr().err
        return
    file = root / "classes.json" if where == "beside" else tmp_path / "names.json"
    file.write_text(text)
    assert main(["data", "index", str(root), *(["--classes", str(file)] if where == "classes" else [])]) == 2
    assert str(file) in "".join(capsys.readouterr().err.split())


@pytest.mark.case("H10")
def test_a_list_of_classes_from_a_pipe_or_a_device_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(DataError, match="not a regular file"):
            parse_classes(tmp_path / name)
