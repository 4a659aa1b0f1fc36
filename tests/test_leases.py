"""Leases: whoever holds one is alone, also where many come for one that is void."""

import json
import os
import threading

import pytest

from tarflow.leases import held, leased


def void(path):
    path.write_text("{}")
    os.utime(path, (0, 0))


def test_only_one_of_many_takes_over_a_void_lease_and_removes_it(tmp_path):
    void(tmp_path / "unit-00.0")
    gate, taken, seen = threading.Barrier(8), [], []

    def take():
        gate.wait(10)
        with leased(tmp_path, "unit-00", 60) as mine:
            taken.append(mine)
            gate.wait(10)
            seen.append(sorted(p.name for p in tmp_path.iterdir()))
            gate.wait(10)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(taken) == [False] * 7 + [True]
    assert seen == [["unit-00.1"]] * 8
    assert not list(tmp_path.iterdir())


def test_one_who_looked_long_ago_does_not_hold_beside_another(tmp_path, monkeypatch):
    """Between its look and its taking, two others have come: its number is free again, but is not the highest."""
    void(tmp_path / "a.0")
    link = os.link
    done: list[int] = []

    def late(source, target):
        if not done:
            done.append(1)
            with leased(tmp_path, "a", 60):
                os.utime(tmp_path / "a.1", (0, 0))
                other.enter_context(leased(tmp_path, "a", 60))
        return link(source, target)

    from contextlib import ExitStack

    with ExitStack() as other:
        monkeypatch.setattr(os, "link", late)
        with leased(tmp_path, "a", 60) as mine:
            assert not mine
            assert held(tmp_path, "a", 60)
        assert [p.name for p in tmp_path.iterdir()] == ["a.2"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["set[1]", "a*", ".lock", "b.7"])
def test_names_stand_for_themselves(tmp_path, name):
    (tmp_path / f"{name}.5.0").write_text("{}")
    with leased(tmp_path, name, 60) as mine, leased(tmp_path, name, 60) as again:
        assert (mine, again) == (True, False)
        assert json.loads((tmp_path / f"{name}.0").read_text()) == {"host": os.uname().nodename, "pid": os.getpid()}


def refuse(*_, **__):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.case("F02")
def test_a_lease_lives_where_links_and_times_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    with leased(tmp_path, "a", 0.5) as mine:
        first = (tmp_path / "a.0").stat().st_mtime_ns
        deadline = threading.Event()
        for _ in range(100):
            if (tmp_path / "a.0").stat().st_mtime_ns > first:
                break
            deadline.wait(0.05)
        assert mine
        assert (tmp_path / "a.0").stat().st_mtime_ns > first
        with leased(tmp_path, "a", 0.5) as second:
            assert not second


def test_whoever_was_paused_for_too_long_is_told(tmp_path):
    told = threading.Event()
    with leased(tmp_path, "a", 0.25, told.set):
        os.rename(tmp_path / "a.0", tmp_path / "a.gone")  # what one who takes over does
        assert told.wait(10)
