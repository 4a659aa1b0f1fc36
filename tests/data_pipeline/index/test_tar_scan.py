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

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index import tar_scan
from tarflow.data_pipeline.index.tar_scan import scan_tar
from tests.helpers.effort import draws

names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..")
)


@given(
    st.lists(st.tuples(st.lists(names, min_size=1, max_size=4), st.integers(0, 3000)), max_size=12),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=draws(120), deadline=None)
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
@pytest.mark.case("D02")
def test_every_cut_is_noticed_and_leaves_only_whole_members(tmp_path: Path, lab: SimpleNamespace, cut: int) -> None:
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


@pytest.mark.case("D02")
def test_garbage_in_a_header_stops_there(tmp_path: Path, lab: SimpleNamespace) -> None:
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


@given(
    st.lists(st.integers(0, 9000), min_size=30, max_size=60),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 59), st.sampled_from(["long", "folder", "odd", "big label"])), max_size=2),
    st.none() | st.tuples(st.integers(0, 59), st.sampled_from([5, 126, 150, 156])),
)
@settings(max_examples=draws(150), deadline=None)
def test_leaps_over_regular_members_find_what_going_one_by_one_finds(
    sizes: list[int], format: int, fractions: bool, odd: list[tuple[int, str]], damage: tuple[int, int] | None
) -> None:
    """Writers repeat themselves, and the scan leaps on that guess; what breaks the rhythm must not be missed."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"leap-{os.getpid()}.tar"
    try:
        with tarfile.open(path, "w", format=format) as tar:
            for number, size in enumerate(sizes):
                kinds = {kind for place, kind in odd if place == number}
                label = b"7" * (700 if "big label" in kinds else 2)
                stem = f"{number:04d}" if "long" not in kinds else f"{number:04d}{'x' * 90}/{'y' * 90}"
                members = [(f"{stem}.cls", label), (f"{stem}.jpg", os.urandom(size))]
                for name, content in members + ([("odd.txt", b"?")] if "odd" in kinds else []):
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime = len(content), 1_700_000_000 + 0.25 * fractions
                    tar.addfile(info, io.BytesIO(content))
                if "folder" in kinds:
                    info = tarfile.TarInfo(f"{number}-folder")
                    info.type = tarfile.DIRTYPE
                    tar.addfile(info)
        with tarfile.open(path) as tar:
            expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isfile()]
        hit = None
        if damage is not None and 2 * damage[0] < len(expected):
            hit = 2 * damage[0]
            with path.open("r+b") as file:
                file.seek(expected[hit][1] - 512 + damage[1])
                before = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([before[0] ^ 1]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tarflow.data_pipeline.index.tar_scan._WINDOWS", 4)
            leaping = scan_tar(path)
            patch.setattr("tarflow.data_pipeline.index.tar_scan._GUESSES", 0)
            careful = scan_tar(path)
        assert leaping == careful
        found = [(n.decode(), o, s) for n, o, s in zip(leaping.names, leaping.offsets, leaping.sizes)]
        assert found == expected[: len(expected) if hit is None else hit]
        assert (leaping.damage is None) == (hit is None)
    finally:
        path.unlink(missing_ok=True)


def test_leaps_are_made(tmp_path: Path, lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would compare one way with itself."""
    lab.write_tar(
        tmp_path / "a.tar", [(f"{i}.{e}", b"x" * n) for i in range(99) for e, n in (("cls", 1), ("jpg", 5000))]
    )
    leaps: list[bool] = []
    leap = tar_scan._leap

    def counted(fd: int, scan: tar_scan.TarScan, keep: int, position: int, *rest: object) -> int:
        further = leap(fd, scan, keep, position, *rest)
        leaps.append(further > position)
        return further

    monkeypatch.setattr(tar_scan, "_WINDOWS", 8)
    monkeypatch.setattr(tar_scan, "_leap", counted)
    assert len(scan_tar(tmp_path / "a.tar").names) == 198
    assert sum(leaps) >= 10
