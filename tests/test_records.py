"""What the product wrote is read back; what anyone changed is not."""

import json
import os
from pathlib import Path

import pytest
from pydantic import Field

from tarflow.files import append_line
from tarflow.records import (
    DamagedFileError,
    Record,
    append_record_line,
    load_record,
    read_lines,
    read_object,
    save_record,
    write_object,
)


class Made(Record):
    what = "a test's record"
    way_out = "make it again"
    name: str = Field(min_length=1)
    images: int = Field(0, ge=0)
    rate: float = 0.5


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    save_record(tmp_path / "a.json", Made(name="x", images=3, rate=0.1))
    assert load_record(tmp_path / "a.json", Made) == Made(name="x", images=3, rate=0.1)


def test_no_changed_byte_of_a_sealed_record_passes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_record(path, Made(name="run", images=1234, rate=0.1))
    data, passed = path.read_bytes(), 0
    for at in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
            try:
                found = load_record(path, Made)
            except DamagedFileError:
                continue
            assert found == Made(name="run", images=1234, rate=0.1)
            passed += 1
    assert passed < 40  # white space that became other white space


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"name": "x", "images": 1e400}', "not a finite number"),
        ('{"name": "x", "rate": NaN}', "not a finite number"),
        ('{"name": "x", "images": ' + "9" * 5000 + "}", "digits"),
        ('{"name": "x", "name": "y"}', "twice"),
        ('{"name": "x", "images": -1}', "images: input should be greater"),
        ('{"name": "x", "images": "1"}', "images: input should be a valid integer"),
        ('{"name": "x", "image": 1}', "image: extra"),
        ('{"images": 1}', "name: field required"),
    ],
)
def test_the_error_names_file_field_and_way_out(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DamagedFileError, match="make it again") as error:
        load_record(path, Made)
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_a_record_larger_than_its_bound_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedFileError, match="more than 16777216 bytes"):
        load_record(tmp_path / "a.json", Made)


def test_a_record_of_before_the_seal_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "x"}')
    assert load_record(tmp_path / "a.json", Made) == Made(name="x")


def test_an_object_without_a_model_is_sealed_as_well(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_object(path, {"fd": 12.5, "list": [1, 2.5e-3]})
    assert read_object(path) == {"fd": 12.5, "list": [1, 2.5e-3]}
    path.write_text(path.read_text().replace("12.5", "11.5"))
    with pytest.raises(DamagedFileError, match="checksum"):
        read_object(path)


def test_lines_that_were_changed_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_line(path, json.dumps({"old": 0}))  # of a version before the seal
    for number in range(4):
        append_record_line(path, {"n": number})
    text = path.read_text().replace('"n": 2', '"n": 7')
    path.write_text(text + json.dumps({"n": 9}) + "\n" + '{"n": 1')
    lines = read_lines(path)
    assert lines.rows == [{"old": 0}, {"n": 0}, {"n": 1}, {"n": 3}]
    assert lines.damaged == [4, 6]
    assert lines.torn
    assert str(lines) == "2 damaged lines left out (4, 6)"
    assert read_lines(tmp_path / "none.jsonl").rows == []
    path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\x0e")  # the end of the last line, one bit flipped
    assert (read_lines(path).damaged, read_lines(path).torn) == ([4, 6], False)
    with open(path, "ab") as file:
        file.truncate(1 << 26)  # zeros, as a power cut leaves them
    assert len(read_lines(path).rows) == 4
    assert read_lines(path).damaged[:3] == [4, 6, 7]


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to nothing"])
def test_what_is_no_file_is_damage_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    make = {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "link to nothing": lambda: path.symlink_to("none")}
    make[kind]()
    for read in (lambda: load_record(path, Made), lambda: read_object(path), lambda: read_lines(path)):
        with pytest.raises(DamagedFileError, match="not a regular file"):
            read()


def test_plain_values_may_have_a_model_all_the_same(tmp_path: Path) -> None:
    write_object(tmp_path / "a.json", {"name": "x", "images": 3})
    assert read_object(tmp_path / "a.json", Made) == {"name": "x", "images": 3}
    write_object(tmp_path / "a.json", {"name": "x", "images": -3})
    with pytest.raises(DamagedFileError, match=r"\(a test's record\) is damaged .*images: .*make it again"):
        read_object(tmp_path / "a.json", Made)


def test_the_end_of_a_file_of_lines_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_line(path, '{"old": NaN}')
    assert read_lines(path).rows == [{"old": None}]
    for number in range(100):
        append_record_line(path, {"n": number})
    size = path.stat().st_size
    assert [row["n"] for row in read_lines(path, tail=100).rows] == [98, 99]
    with open(path, "ab") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(DamagedFileError, match="more than 1073741824 bytes"):
        read_lines(path)
    assert read_lines(path, tail=100).damaged == [0]
    os.truncate(path, size)
    length = len(path.read_bytes().splitlines(keepends=True)[-1])
    assert [row["n"] for row in read_lines(path, tail=length).rows] == [99]
    assert len(read_lines(path, tail=1 << 20).rows) == 101


@pytest.mark.case("H11")
def test_an_error_shows_the_name_of_an_unknown_field(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"name": "x", "\x1b[31m\nall is well": 1}))
    with pytest.raises(DamagedFileError) as caught:
        load_record(path, Made)
    assert str(caught.value).isprintable()
    assert r"\x1b[31m\nall is well" in str(caught.value)


@pytest.mark.case("H06")
def test_a_file_of_lines_that_was_emptied_is_no_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert not read_lines(path).emptied
    append_record_line(path, {"n": 1})
    assert not read_lines(path).emptied
    for nothing in (b"", b"\n\n"):
        path.write_bytes(nothing)
        assert read_lines(path).emptied
        assert read_lines(path).flaws(path) == [f"{path}: it is empty, and is made with its first line"]
