"""Files that several processes read, write and remove at once."""

import os
import shutil
from pathlib import Path

from tarflow.evaluation import results
from tarflow.files import listed

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
