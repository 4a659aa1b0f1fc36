"""Files that several processes read, write and remove at once, on file systems as they are."""

import errno
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from tarflow import file_systems
from tarflow.evaluation import results
from tarflow.files import (
    LineWriter,
    append_line,
    fsync_tree,
    listed,
    open_regular,
    publish_dir,
    put_once,
    read_up_to,
    replace_dir,
    write_json,
    write_text,
)
from tarflow.records import append_record_line
from tests.helpers.poor_files import lack

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
        lambda: results.remove_leftovers(tmp_path),
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


WRITERS = {
    "text": lambda folder: write_text(folder / "a", "1"),
    "json": lambda folder: write_json(folder / "a", 1),
    "lines": lambda folder: append_record_line(folder / "a", {"a": 1}),
    "once": lambda folder: put_once(filled(folder / ".a.tmp"), folder / "a"),
    "folder": lambda folder: replace_dir(filled(folder / "b.tmp" / "c").parent, folder / "a"),
    "published": lambda folder: publish_dir(filled(folder / "b.tmp" / "c").parent, folder / "a"),
    "tree": lambda folder: fsync_tree(filled(folder / "a" / "c").parent),
}
by_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


def filled(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("1")
    return path


@by_writer
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS], ids=lambda n: errno.errorcode[n])
@pytest.mark.parametrize("what", ["fsync_dir", "fsync_file"])
@pytest.mark.case("F02")
def test_a_file_system_without_fsync_is_written_and_noted_once(tmp_path, monkeypatch, capsys, write, number, what):
    monkeypatch.setattr(file_systems, "_said", set())
    lack(monkeypatch, **{what: number})
    for folder in ("1", "2"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder)
        assert [p.name for p in (tmp_path / folder).iterdir()] == ["a"]
    kind = {"fsync_dir": "directories", "fsync_file": "files"}[what]
    notes = [line for line in capsys.readouterr().err.splitlines() if f"has no fsync of {kind}" in line]
    assert notes == [] if write in (WRITERS["lines"], WRITERS["once"]) and what == "fsync_dir" else len(notes) == 1


@by_writer
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT], ids=lambda n: errno.errorcode[n])
@pytest.mark.case("F02")
def test_a_disk_that_could_not_write_is_an_error_that_names_the_file(tmp_path, monkeypatch, write, number):
    lack(monkeypatch, fsync_file=number)
    with pytest.raises(OSError) as caught:
        write(tmp_path)
    assert caught.value.errno == number
    assert caught.value.filename.startswith(str(tmp_path))


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK], ids=lambda n: errno.errorcode[n])
@pytest.mark.case("F02")
def test_a_file_is_put_in_place_where_links_are_refused(tmp_path, monkeypatch, number):
    lack(monkeypatch, link=number)
    put_once(filled(tmp_path / ".a.tmp"), tmp_path / "a")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "1")]


@pytest.mark.case("V11")
def test_half_a_line_is_closed_before_the_next_one_in_every_kind_of_file(tmp_path):
    from tarflow.trainer.run_dir import note

    path = tmp_path / "log.txt"
    for half in (b"whole\nhalf of a li", b"", b"whole\n"):
        for write in (
            lambda: note(tmp_path, "next"),
            lambda: line_writer(path),
            lambda: append_record_line(path, {"a": "next"}),
        ):
            path.write_bytes(half)
            write()
            lines = path.read_text().splitlines()
            assert lines[:-1] == half.decode().splitlines()
            assert "next" in lines[-1]
            assert path.read_bytes().endswith(b"\n")


def line_writer(path):
    writer = LineWriter(path)
    writer.write("next")
    writer.close()


@pytest.mark.case("V11")
def test_a_line_that_a_full_disk_cut_is_closed_by_whoever_writes_next(tmp_path, monkeypatch):
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


@pytest.mark.case("H06")
def test_only_a_regular_file_is_opened_and_nothing_is_waited_for(tmp_path: Path) -> None:
    """A pipe without a writer would block for ever."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        descriptor = open_regular(tmp_path / name)
        assert os.read(descriptor, 9) == b"x"
        os.close(descriptor)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="it is not a regular file") as caught:
            open_regular(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "dangling")


def test_a_bounded_read_makes_room_for_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    tracemalloc.start()
    try:
        assert len(read_up_to(path, 1 << 30)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert len(read_up_to(path, 999)) == 1000, "one more than is allowed"
    assert len(read_up_to(path, 10)) == 11
