"""Shared work: every unit once, whoever dies, without locks."""

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tarflow.evaluation.shared_work import SharedWork, stretches
from tests.helpers.waiting import until

UNITS = [f"unit-{i:02d}" for i in range(12)]
fork = multiprocessing.get_context("fork")


def write(name, path):
    path.write_text(f"result of {name}")


def worker(folder, lease_s, delay_s, done_by, gate=None):
    work = SharedWork(folder, {"batch": 4}, lease_s)
    if gate is not None:
        gate.wait(20)

    def compute(name, path):
        time.sleep(delay_s)
        write(name, path)

    work.work_through(UNITS, compute)
    Path(done_by, str(os.getpid())).write_text(json.dumps(work.computed))


def start(folder, lease_s, delay_s, done_by, gate=None):
    process = fork.Process(target=worker, args=(folder, lease_s, delay_s, done_by, gate))
    process.start()
    return process


def end(process):
    process.join(20)
    assert process.exitcode == 0


def claimed_by(folder, pid):
    return [p for p in (folder / "claims").glob("unit-*") if f'"pid": {pid}}}' in p.read_text()]


@pytest.mark.case("S02")
def test_three_processes_do_every_unit_once(tmp_path):
    done_by = tmp_path / "done"
    done_by.mkdir()
    gate = fork.Barrier(3)  # none is done before the others have begun, however busy the machine
    workers = [start(tmp_path / "work", 60, 0.03, done_by, gate) for _ in range(3)]
    for process in workers:
        end(process)
    lists = [json.loads(p.read_text()) for p in done_by.iterdir()]
    assert sorted(name for names in lists for name in names) == UNITS
    assert sum(bool(names) for names in lists) >= 2
    assert {(tmp_path / "work" / u).read_text() for u in UNITS} == {f"result of {u}" for u in UNITS}
    assert list((tmp_path / "work/claims").iterdir()) == []
    assert [p for p in (tmp_path / "work").iterdir() if p.name.endswith(".tmp")] == []


def test_the_unit_of_a_killed_process_is_done_by_another(tmp_path):
    """On this machine at once: its process is dead. The lease is far longer than the test."""
    folder, done_by = tmp_path / "work", tmp_path / "done"
    done_by.mkdir()
    stuck = start(folder, 600, 600, done_by)
    until("the claim", lambda: folder.exists() and claimed_by(folder, stuck.pid))
    os.kill(stuck.pid, signal.SIGKILL)
    stuck.join(10)
    work = SharedWork(folder, {}, 600)
    assert work.work_through(UNITS, write)
    assert sorted(work.computed) == UNITS


def test_a_claim_of_another_machine_is_void_after_its_lease_and_not_before(tmp_path):
    work = SharedWork(tmp_path, {}, 0.4)
    claim = tmp_path / "claims/unit-00.0"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    began = time.monotonic()
    assert work.work_through(["unit-00"], write)
    assert time.monotonic() - began >= 0.3
    assert work.computed == ["unit-00"]


def test_a_holder_that_lives_renews_its_claim(tmp_path):
    first, second = SharedWork(tmp_path, {}, 1), SharedWork(tmp_path, {}, 1)

    def slowly(name, path):
        time.sleep(2.5)
        write(name, path)

    thread = threading.Thread(target=first.work_through, args=(["unit-00"], slowly))
    thread.start()
    until("the claim", lambda: list((tmp_path / "claims").glob("unit-00.*")))
    assert second.work_through(["unit-00"], write)
    thread.join(10)
    assert (first.computed, second.computed) == (["unit-00"], [])


def test_a_holder_that_was_paused_beyond_its_lease_does_no_harm(tmp_path):
    """Two compute the same unit; the first result stays, and no claim or temporary file does."""
    slow, quick = SharedWork(tmp_path, {}, 60), SharedWork(tmp_path, {}, 60)

    def overtaken(name, path):
        (claim,) = (tmp_path / "claims").glob("unit-00.*")
        os.utime(claim, (0, 0))
        assert quick.work_through([name], lambda name, path: path.write_text("first"))
        path.write_text("second")

    assert slow.work_through(["unit-00"], overtaken)
    assert (tmp_path / "unit-00").read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["claims", "plan.json", "unit-00"]
    assert list((tmp_path / "claims").iterdir()) == []


def test_an_error_gives_the_unit_back_and_leaves_nothing(tmp_path):
    work = SharedWork(tmp_path, {}, 60)

    def broken(name, path):
        path.write_text("half")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        work.work_through(UNITS, broken)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["claims", "plan.json"]
    assert list((tmp_path / "claims").iterdir()) == []


def test_who_comes_first_decides_the_plan(tmp_path):
    assert SharedWork(tmp_path, {"batch": 4}, 60).plan == {"batch": 4, "lease_s": 60}
    late = SharedWork(tmp_path, {"batch": 8}, 10)
    assert late.plan == {"batch": 4, "lease_s": 60}
    assert late.lease_s == 60


def test_work_that_is_over_or_was_cleared_away_ends_without_an_error(tmp_path):
    folder = tmp_path / "all" / "work"
    work, other = SharedWork(folder, {}, 60), SharedWork(folder, {}, 60)

    def cleared(name, path):
        other.remove()
        write(name, path)

    assert not work.work_through(UNITS, cleared)
    assert list(tmp_path.iterdir()) == []
    again = SharedWork(folder, {}, 60)
    assert not again.work_through(UNITS, write, over=lambda: bool(again.computed))
    assert again.computed == UNITS[:1]


@pytest.mark.case("S02")
def test_stretches_hold_every_index_once():
    for total, size in ((10, 3), (9, 3), (2, 5), (1, 1)):
        assert [i for part in stretches(total, size) for i in part] == list(range(total))


def test_joining_work_that_is_cleared_away_at_this_moment_begins_it_anew(tmp_path, monkeypatch):
    folder, agree, calls = tmp_path / "all" / "work", SharedWork._agree, []

    def unlucky(self, plan):
        calls.append(1)
        if len(calls) < 3:
            SharedWork.clear(folder)
        return agree(self, plan)

    monkeypatch.setattr(SharedWork, "_agree", unlucky)
    work = SharedWork(folder, {"batch": 4}, 60)
    assert len(calls) == 3
    assert work.work_through(UNITS, write)


def dies_while_it_claims(folder):
    work = SharedWork(folder, {}, 3600)
    die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    Path.write_text = os.fdopen = die  # whichever way the holder is about to be written
    work.work_through(["unit-00"], write)


@pytest.mark.case("S02")
def test_a_process_killed_while_it_claims_holds_nothing(tmp_path):
    process = fork.Process(target=dies_while_it_claims, args=(tmp_path / "work",))
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    work = SharedWork(tmp_path / "work", {}, 3600)
    limit = time.monotonic() + 10  # far below the lease
    assert work.work_through(["unit-00"], write, over=lambda: time.monotonic() > limit)
    assert work.computed == ["unit-00"]


@pytest.mark.case("H07")
def test_whatever_stands_in_the_place_of_a_result_is_given_back_and_what_a_link_leads_to_is_left(tmp_path):
    work, kept = SharedWork(tmp_path / "work", {"batch": 4}, 60), tmp_path / "kept"
    kept.write_text("another's")
    work.path("unit-00").symlink_to(tmp_path / "nothing")
    work.path("unit-01").mkdir()
    (work.path("unit-01") / "file").touch()
    work.path("unit-02").symlink_to(kept)
    work.path("unit-03").write_text("whole")
    assert work.give_back(UNITS, lambda path: path.read_text() == "whole") == ["unit-00", "unit-01", "unit-02"]
    assert work.work_through(UNITS[:4], write)
    assert [work.path(name).read_text() for name in UNITS[:4]] == [
        *(f"result of {name}" for name in UNITS[:3]),
        "whole",
    ]
    assert kept.read_text() == "another's"
    assert not (tmp_path / "nothing").exists()
