"""Files that several processes read, write and remove at once."""

import os
import shutil
from pathlib import Path

import pytest

from tarflow.evaluation import results
from tarflow.files import LineWriter, append_json_line, append_line, listed

SWEPT = "step-00000020-hash-weights"


def test_a_folder_that_goes_while_it_is_listed_is_empty(tmp_path, monkeypatch):
    """A worker clears its work away between another's look at the folder and its reading of it: the second died."""
    work = tmp_path / "evals" / "work"
    scandir, removed = os.scandir, []

    def scandir_too_late(path=".", *rest):
        if not isinstance(path, int) and Path(path) in (work, work / SWEPT):
            shutil.rmtree(path)
            removed.append(Path(path))
        return scandir(path, *rest)

    def make():
        (work / SWEPT / "claims").mkdir(parents=True)
        monkeypatch.setattr(os, "scandir", scandir_too_late)

    for look in (
        lambda: results.sweep(tmp_path),
        lambda: listed(work),
        lambda: listed(work / SWEPT),
        lambda: listed(tmp_path, "evals/work/*/*"),
    ):
        make()
        assert not look()
        monkeypatch.setattr(os, "scandir", scandir)
        shutil.rmtree(work, ignore_errors=True)
    assert removed == [work, work, work / SWEPT, work]


def test_names_that_begin_with_a_dot_are_listed_and_in_order(tmp_path):
    for name in ("b", ".a.gone", "c[1]"):
        os.mkdir(tmp_path / name)
    assert [path.name for path in listed(tmp_path)] == [".a.gone", "b", "c[1]"]
    assert listed(tmp_path, ".*.gone") == [tmp_path / ".a.gone"]
    assert listed(tmp_path / "c[1]") == listed(tmp_path / "missing") == []


def test_V11_half_a_line_is_closed_before_the_next_one_in_every_kind_of_file(tmp_path):
    from tarflow.trainer.run_dir import note

    path = tmp_path / "log.txt"
    for half in (b"whole\nhalf of a li", b"", b"whole\n"):
        for write in (
            lambda: note(tmp_path, "next"),
            lambda: line_writer(path),
            lambda: append_json_line(path, ["next"]),
        ):
            path.write_bytes(half)
            write()
            lines = path.read_text().splitlines()
            assert lines[:-1] == half.decode().splitlines()
            assert lines[-1].endswith(("next", '["next"]'))
            assert path.read_bytes().endswith(b"\n")


def line_writer(path):
    writer = LineWriter(path)
    writer.write("next")
    writer.close()


def test_V11_a_line_that_a_full_disk_cut_is_closed_by_whoever_writes_next(tmp_path, monkeypatch):
    path, write = tmp_path / "metrics.jsonl", os.write
    first = LineWriter(path)
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4]))
    first.write("one of many")
    with pytest.raises(OSError, match="No space left"):
        append_line(path, "two")
    monkeypatch.undo()
    first.close()
    append_line(path, "three")
    again = LineWriter(path)
    again.write("four")
    again.close()
    assert path.read_text().splitlines() == ["one ", "two", "three", "four"]
