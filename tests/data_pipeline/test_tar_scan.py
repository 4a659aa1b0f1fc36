"""The header scan against `tarfile` for every kind of header, and what it says about damage."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.tar_scan import scan_tar

names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..")
)


@given(
    st.lists(st.tuples(st.lists(names, min_size=1, max_size=4), st.integers(0, 3000)), max_size=12),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=120, deadline=None)
def test_members_equal_those_of_tarfile(members: list[tuple[list[str], int]], format: int) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"scan-{os.getpid()}.tar"
    try:
        with tarfile.open(path, "w", format=format) as tar:
            for parts, size in members:
                info = tarfile.TarInfo("/".join(parts))
                info.size = size
                info.mtime = 1234567.25  # makes pax write a header of its own
                try:
                    tar.addfile(info, io.BytesIO(os.urandom(size)))
                except ValueError:  # too long for ustar
                    continue
        scan = scan_tar(path)
        with tarfile.open(path) as tar:
            expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isfile()]
        found = [(n.decode().rstrip("/"), o, s) for n, o, s in zip(scan.names, scan.offsets, scan.sizes)]
        assert found == expected
        assert scan.damage is None
        for i in range(len(scan.names)):
            with open(path, "rb") as file:
                file.seek(scan.offsets[i])
                assert scan.content(i) == file.read(scan.sizes[i])
    finally:
        path.unlink(missing_ok=True)


def test_folders_and_links_are_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "x" * 150  # needs a long-link header
            tar.addfile(info)
        info = tarfile.TarInfo("x.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    scan = scan_tar(path)
    assert (scan.names, scan.not_files, scan.damage) == ([b"x.png"], 3, None)


def test_a_size_beyond_the_octal_field_is_read(tmp_path: Path) -> None:
    """Base-256 sizes (GNU) of 8 GiB and more; the file is sparse."""
    path = tmp_path / "big.tar"
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + (9 << 30) + 1024)
    scan = scan_tar(path)
    assert (scan.sizes, scan.damage) == ([9 << 30], None)


@pytest.mark.parametrize("cut", range(0, 4097, 128))
def test_D02_every_cut_is_noticed_and_leaves_only_whole_members(tmp_path: Path, lab: SimpleNamespace, cut: int) -> None:
    path = tmp_path / "a.tar"
    lab.write_tar(path, [("a.png", b"a" * 700), ("a.cls", b"1"), ("b.png", b"b" * 700)])
    with path.open("r+b") as file:
        file.truncate(cut)
    scan = scan_tar(path)
    ends = [512 + 700, 1536 + 512 + 1, 2560 + 512 + 700]
    assert len(scan.names) == sum(cut >= end for end in ends)
    assert scan.damage
    if 512 <= cut < 1212:
        assert scan.cut_member == b"a.png"


def test_D02_garbage_in_a_header_stops_there(tmp_path: Path, lab: SimpleNamespace) -> None:
    path = tmp_path / "a.tar"
    lab.write_tar(path, [(f"{i}.png", bytes([i]) * 600) for i in range(6)])
    data = bytearray(path.read_bytes())
    data[3 * 1536 + 4] ^= 255  # in the name of member 3: only the checksum tells
    path.write_bytes(data)
    scan = scan_tar(path)
    assert scan.names == [b"0.png", b"1.png", b"2.png"]
    assert scan.damage is not None
    assert "byte 4608" in scan.damage


def test_what_is_no_tar_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"hello world " * 100)
    assert "not a tar" in str(scan_tar(path).damage)
    path.write_bytes(b"")
    assert "0 bytes" in str(scan_tar(path).damage)
    path.write_bytes(gzip.compress(b"x" * 4000))
    with pytest.raises(DataError, match=r"a\.tar is gzip-compressed"):
        scan_tar(path)
    with pytest.raises(DataError, match=r"none\.tar: No such file"):
        scan_tar(tmp_path / "none.tar")
