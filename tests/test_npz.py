"""Arrays that numpy wrote come back; what a stranger declares is refused before it is read into memory."""

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tarflow.npz import declared, read_npz, write_npz
from tarflow.records import DamagedFileError

LIMIT = 1 << 20


class Planted:
    """Unpickling it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def npy(header: str = "{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }", data: bytes = b"\0" * 16) -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def packed(path: Path, *members: tuple[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def written(path: Path, **arrays: np.ndarray) -> Path:
    with open(path, "wb") as file:
        write_npz(file, arrays)
    return path


ARRAYS: dict[str, Any] = {
    "a": np.arange(6.0).reshape(2, 3), "n": np.int64(4), "t": np.array("text"), "e": np.zeros((0, 3), np.uint8),
    "f": np.asfortranarray(np.arange(6).reshape(3, 2)),
}  # fmt: skip


def test_arrays_come_back_as_they_were_and_the_same_arrays_are_the_same_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.npz", **ARRAYS)
    found = read_npz(path, LIMIT)
    assert found.checked
    assert found.arrays.keys() == ARRAYS.keys()
    assert all(np.array_equal(found.arrays[name], array) for name, array in ARRAYS.items())
    assert read_npz(path, LIMIT, ["a"]).arrays.keys() == {"a"}
    assert declared(path, LIMIT)["a"].shape == (2, 3)
    assert path.read_bytes() == written(tmp_path / "b.npz", **ARRAYS).read_bytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_numpy_are_read_and_said_to_be_unchecked(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_npz(tmp_path / "a.npz", LIMIT)
    assert not found.checked
    assert np.array_equal(found.arrays["f"], ARRAYS["f"])


@pytest.mark.case("H04")
def test_no_flipped_bit_changes_an_array(tmp_path: Path) -> None:
    path = written(tmp_path / "a.npz", a=np.arange(3.0), t=np.array("x"))
    data, refused = path.read_bytes(), 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        try:
            found = read_npz(path, LIMIT)
        except DamagedFileError:
            refused += 1
            continue
        assert found.checked
        assert (found.arrays["a"].tolist(), str(found.arrays["t"])) == ([0, 1, 2], "x")
    assert refused > len(data) // 2  # the others are dates and attributes, which numpy does not look at


@pytest.mark.case("H01")
def test_objects_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    np.savez(tmp_path / "a.npz", a=np.array([Planted(marker)], dtype=object))
    for look in (declared, read_npz):
        with pytest.raises(DamagedFileError, match="holds objects, which are pickled"):
            look(tmp_path / "a.npz", LIMIT)
    assert not marker.exists()


HUGE = "{'descr': '<f8', 'fortran_order': False, 'shape': (%s,), }"


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a.npy", npy(HUGE % "1000000000000"))], "does not fit its size"),
        ([("a.npy", npy(HUGE % "-2"))], "does not fit its size"),
        ([("a.npy", npy(HUGE % ("9" * 5000)))], "header"),
        ([("a.npy", npy("{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000000,), }", b""))], "neither numbers"),
        ([("a.npy", npy("{'descr': [('x', '<f8')], 'fortran_order': False, 'shape': (2,), }"))], "neither numbers"),
        ([("a.npy", npy("{'descr': '<M8[s]', 'fortran_order': False, 'shape': (2,), }"))], "neither numbers"),
        ([("a.npy", npy("(" * 9000))], "header"),
        ([("a.npy", npy("-" * 9000 + "1"))], "header"),
        ([("a.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff{")], "EOF|header"),
        ([("a.npy", npy()), ("a.npy", npy())], "stands in it twice"),
        ([("../a.npy", npy())], "no name of an array"),
        ([("/a.npy", npy())], "no name of an array"),
        ([("a\x1b[2J.npy", npy())], "no name of an array"),
        ([("a.txt", npy())], "no name of an array"),
        ([("a.npy", npy() + b"more")], "does not fit its size"),
        ([("a.npy", b"")], "EOF"),
        ([(f"{n}.npy", b"") for n in range(10_001)], "more than 10,000"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.case("H10")
def test_what_a_member_declares_is_held_against_its_size(
    tmp_path: Path, members: list[tuple[str, bytes]], says: str
) -> None:
    path = packed(tmp_path / "a.npz", *members)
    with pytest.raises(DamagedFileError, match=says) as caught:
        read_npz(path, LIMIT, what="a test's arrays", way_out="make them anew")
    assert "\x1b" not in str(caught.value)
    assert str(caught.value).startswith(f"{path} (a test's arrays)")
    assert str(caught.value).endswith("make them anew")


@pytest.mark.case("H10")
def test_a_zip_bomb_is_refused_unread(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.npz", ("a.npy", npy(HUGE % (1 << 24), bytes(1 << 27))), how=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match=r"134,217,.* bytes, more than 1,048,576"):
        read_npz(path, LIMIT)
    data = bytearray(path.read_bytes())  # the directory says that the member is small
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = (1 << 10).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"does not fit its size|Bad CRC-32"):
        read_npz(path, LIMIT)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 21


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY", b"x" * 1000])
def test_rubbish_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a\.npz"):
        read_npz(tmp_path / "a.npz", LIMIT)


def test_absent_is_not_damaged_and_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "a.npz", LIMIT)
    with pytest.raises(DamagedFileError, match="not a regular file"):
        read_npz(tmp_path, LIMIT)


def test_cut_files_are_refused_wherever_they_end(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    write_npz(buffer, {"a": np.arange(20.0)})
    for end in range(0, len(buffer.getvalue()), 7):
        (tmp_path / "a.npz").write_bytes(buffer.getvalue()[:end])
        with pytest.raises(DamagedFileError):
            read_npz(tmp_path / "a.npz", LIMIT)


@pytest.mark.case("H06")
def test_files_with_a_hole_are_refused_in_words(tmp_path: Path) -> None:
    """Without some of its bytes the directory lies elsewhere, and zipfile seeks to places before the file."""
    buffer = io.BytesIO()
    write_npz(buffer, {"a": np.arange(20.0)})
    whole, said = buffer.getvalue(), set()
    for start in range(0, len(whole), 5):
        for length in (1, 12, 60):
            (tmp_path / "a.npz").write_bytes(whole[:start] + whole[start + length :])
            with pytest.raises(DamagedFileError) as caught:
                read_npz(tmp_path / "a.npz", LIMIT)
            said.add(caught.value.problem)
    assert "its directory points outside the file" in said
    assert not [text for text in said if "Errno" in text]
