"""Both scans against `tarfile` for every kind of header, what they say about damage, and the fast one against the plain one."""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.tar.fast import WINDOWS, FastScan
from tarflow.data_pipeline.index.tar.members import TarScan
from tarflow.data_pipeline.index.tar.plain import plain_scan
from tarflow.data_pipeline.index.tar.scan import scan_tar
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


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def scan_with(path: Path, windows: int, guesses: int) -> TarScan:
    """The fast scan with windows and guesses that make it leap, or not, in a small tar."""
    return scan_tar(path, by=lambda fd, scan, keep: FastScan(fd, scan, keep, windows, guesses).run())


def assert_scans_agree(path: Path) -> TarScan:
    """Plain, fast, fast with few windows and leaps, and without leaps: what they find, to the last field."""
    plain = scan_tar(path, by=plain_scan)
    for windows, guesses in ((WINDOWS, 2), (4, 2), (4, 0), (1, 1)):
        assert scan_with(path, windows, guesses) == plain, f"{windows} windows, {guesses} guesses"
    return plain


def block(name: bytes, kind: bytes, content: bytes = b"", size: bytes | None = None, target: bytes = b"", prefix: bytes = b"",
          magic: bytes = b"ustar\x0000", signed: bool = False) -> bytes:  # fmt: skip
    """A member byte by byte, for headers that no writer at hand makes: odd sizes, checksums of signed bytes, GNU's magic."""
    header = bytearray(512)
    for at, value in ((0, name[:100]), (124, size if size is not None else b"%011o" % len(content)), (156, kind),
                      (157, target[:100]), (257, magic), (345, prefix[:155])):  # fmt: skip
        header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    total = sum(header) - (256 * sum(byte > 127 for byte in header) if signed else 0)
    header[148:156] = b"%06o\0 " % total
    return bytes(header) + content + bytes(-len(content) % 512)


def pax(**records: str) -> bytes:
    """A pax header with these records (`__` stands for a dot in their names)."""
    out = b""
    for key, value in records.items():
        body = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(body) + 1
        while len(str(length)) + len(body) > length:
            length += 1
        out += str(length).encode() + body
    return block(b"PaxHeaders/x", b"x", out)


def gnu_sparse(name: bytes, maps: int, content: bytes) -> bytes:
    """An old GNU sparse member whose map goes on in `maps` blocks."""
    header = bytearray(block(name, b"S", b"", b"%011o" % len(content)))
    header[482] = maps > 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = b"".join(bytes(504) + bytes([i + 1 < maps]) + bytes(7) for i in range(maps))
    return bytes(header) + more + content + bytes(-len(content) % 512)


content = st.binary(max_size=40) | st.sampled_from([b"7", b"x" * 255, b"y" * 300, b"z" * 513, b"w" * 4000, b"v" * 9000])
raw_names = st.binary(min_size=1, max_size=110) | st.sampled_from([b"a.png", b"b\0left over", b"dir/c.cls", b"n" * 100])
long_text = st.integers(90, 6000).map(lambda length: b"long/" + b"x" * length)
ordinary = st.builds(block, raw_names, st.sampled_from([b"0", b"\0", b"7"]), content)
odd = st.one_of(
    st.builds(block, raw_names, st.sampled_from([b"1", b"2", b"3", b"5", b"6", b"D", b"M"]), content, target=raw_names),
    st.builds(block, raw_names, st.just(b"0"), content, prefix=raw_names),
    st.builds(block, raw_names, st.just(b"0"), content, magic=st.just(b"ustar  \0"), prefix=raw_names),
    st.builds(block, raw_names, st.just(b"0"), content, signed=st.just(True)),
    st.builds(lambda name, data: block(name, b"0", data, b"\x80" + len(data).to_bytes(11, "big")), raw_names, content),
    st.builds(lambda name, data: block(name, b"0", data, b"%7o \0" % len(data)), raw_names, content),
    st.builds(lambda name, size: block(name, b"0", b"", size), raw_names, st.sampled_from([b"-0000000001", b"x", b"\xff" * 12])),
    st.builds(lambda name, kind: block(b"././@LongLink", kind, name + b"\0"), long_text, st.sampled_from([b"L", b"K"])),
    st.builds(lambda data: block(b"././@LongLink", b"L", data), st.just(b"q" * (1 << 20) + b"end")),
    st.builds(lambda name: pax(mtime="1.5", path=name.decode()), long_text),
    st.builds(lambda name: pax(linkpath=name.decode()), long_text),
    st.builds(lambda size: pax(size=size), st.sampled_from(["0", "7", "1000", "9" * 30, "no number"])),
    st.builds(lambda: pax(GNU__sparse__major="1", GNU__sparse__name="s.png", GNU__sparse__realsize="9")),
    st.builds(lambda data: block(b"PaxHeaders/x", b"x", data), st.sampled_from([b"path=", b"99 path=x\n", b"0 path=x\n", b"\xff"])),
    st.builds(lambda data: block(b"pax_global_header", b"g", data), content),
    st.builds(gnu_sparse, raw_names, st.integers(0, 3), content),
)  # fmt: skip
members = st.one_of(ordinary, ordinary, st.just(pax(mtime="1700000000.25")), odd)


@given(
    st.lists(members, max_size=14),
    st.sampled_from([b"", bytes(512), bytes(1024), bytes(10240)]),
    st.none() | st.tuples(st.floats(0, 1), st.integers(1, 255)),
    st.none() | st.floats(0, 1),
)
@settings(max_examples=400, deadline=None)
def test_the_fast_scan_finds_what_the_plain_one_finds(
    parts: list[bytes], end: bytes, damage: tuple[float, int] | None, cut: float | None
) -> None:
    """Archives of every kind of header in any order, whole or with a byte flipped, cut or not, with and without an end mark."""
    data = bytearray(b"".join(parts) + end)
    if damage and data:
        data[int(damage[0] * (len(data) - 1))] ^= damage[1]
    if cut is not None:
        del data[int(cut * len(data)) :]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"raw-{os.getpid()}.tar"
    try:
        path.write_bytes(data)
        try:
            expected = scan_tar(path, by=plain_scan)
        except DataError as err:  # a flipped byte can make the beginning that of a compressed file
            with pytest.raises(DataError, match=re.escape(str(err))):
                scan_tar(path)
        else:
            assert assert_scans_agree(path) == expected
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ([block(b"././@LongLink", b"K", b"gone\0"), block(b"a", b"0"), block(b"l", b"2", target=b"a")], [b"a", b"l"]),
        ([pax(GNU__sparse__realsize="9"), block(b"d", b"5"), block(b"a", b"0")], [b"a"]),
        ([pax(path="x"), block(b"PaxHeaders/g", b"g", b"y"), block(b"a", b"0")], [b"x"]),
    ],
    ids=["a link's target before a file", "sparse before a folder", "a global header between"],
)
def test_an_extended_header_is_about_the_next_member_only(
    tmp_path: Path, parts: list[bytes], names: list[bytes]
) -> None:
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
    scan = assert_scans_agree(tmp_path / "a.tar")
    assert (scan.names, scan.sparse, scan.damage) == (names, [], None)


@given(
    st.lists(st.integers(0, 9000), min_size=30, max_size=60),
    st.sampled_from(FORMATS),
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
        scan = assert_scans_agree(path)
        found = [(n.decode(), o, s) for n, o, s in zip(scan.names, scan.offsets, scan.sizes)]
        assert found == expected[: len(expected) if hit is None else hit]
        assert (scan.damage is None) == (hit is None)
    finally:
        path.unlink(missing_ok=True)


def test_leaps_are_made(tmp_path: Path, lab: SimpleNamespace) -> None:
    """Or the tests above would compare one way with itself."""
    lab.write_tar(
        tmp_path / "a.tar", [(f"{i}.{e}", b"x" * n) for i in range(99) for e, n in (("cls", 1), ("jpg", 5000))]
    )
    scans: list[FastScan] = []

    def by(fd: int, scan: TarScan, keep: int) -> None:
        scans.append(FastScan(fd, scan, keep, windows=8))
        scans[0].run()

    assert len(scan_tar(tmp_path / "a.tar", by=by).names) == 198
    assert scans[0].leaps >= 10


def test_extended_headers_at_the_very_end_of_windows(tmp_path: Path) -> None:
    """Only the first member has no extended header, so those of all others come last in the windows that begin with a member."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(600):
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size, info.mtime = 3000, 1_700_000_000 + 0.25 * (number > 0)
            tar.addfile(info, io.BytesIO(bytes(3000)))
    scan = assert_scans_agree(path)
    assert (len(scan.names), scan.damage) == (600, None)
