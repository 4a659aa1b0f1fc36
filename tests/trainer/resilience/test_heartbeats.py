"""Heartbeats of a thousand ranks: how many files they write and read, and that they are seen alive all the same."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tarflow.cluster import status
from tarflow.cluster.job import writer
from tarflow.records import sealed
from tarflow.trainer.config.schema import ParallelConfig
from tarflow.trainer.resilience import alive
from tarflow.trainer.resilience.alive import BeatSchedule, beat_interval_s, last_words, living_writer, read_heartbeats
from tarflow.trainer.resilience.watchdog import Watchdog
from tarflow.trainer.run_dir import create_run

RANKS = 1000
MINUTE = 60
_counts: Counter[str] = Counter()
_watched: list[str] = []


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _watched and event in ("open", "os.rename", "os.listdir", "os.scandir") and "heartbeats" in str(args[0]):
        _counts[event] += 1


sys.addaudithook(_hook)  # it cannot be removed, and costs nothing while nothing is watched


@pytest.fixture
def operations() -> Iterator[Callable[[], Counter[str]]]:
    """`operations()`: file operations on heartbeats since the last call, by their audit event."""

    def taken() -> Counter[str]:
        found = Counter(_counts)
        _counts.clear()
        return found

    _watched.append("on")
    taken()
    yield taken
    _watched.clear()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A run of a thousand ranks on other machines, all alive."""
    create_run(tmp_path / "run")
    (tmp_path / "run" / "heartbeats").mkdir()
    for rank in range(RANKS):
        beat(tmp_path / "run", rank)
    return tmp_path / "run"


def beat(run: Path, rank: int, phase: str = "step") -> None:
    facts = {
        "rank": rank, "world_size": RANKS, "host": f"node{rank // 8}", "pid": 100 + rank, "job": "107", "phase": phase,
        "time": time.time(),
    }  # fmt: skip
    (run / "heartbeats" / f"rank-{rank:04d}.json").write_text(json.dumps(sealed(facts)))


def test_the_load_of_all_ranks_together_is_bounded_and_every_rank_stays_fresh() -> None:
    assert [beat_interval_s(size) for size in (1, 8, 100, 128, 1000, 100_000)] == [2, 2, 2, 2.56, 20, 20]
    schedules = [BeatSchedule(rank, RANKS) for rank in range(RANKS)]
    beats: dict[int, list[int]] = {rank: [] for rank in range(RANKS)}
    for now in range(0, 5 * MINUTE, 2):
        for rank, schedule in enumerate(schedules):
            if schedule.due(float(now)):
                beats[rank].append(now)
    by_time = Counter(now for times in beats.values() for now in times)
    assert by_time[0] == RANKS, "all are seen from the start"
    later = [by_time[now] for now in range(20, 5 * MINUTE, 2)]
    assert max(later) <= 1.2 * 2 * alive.BEATS_PER_S, "and then take turns"
    assert min(later) >= 0.8 * 2 * alive.BEATS_PER_S
    gaps = [after - before for times in beats.values() for before, after in pairwise(times)]
    assert max(gaps) <= alive.FRESH_S / 2
    assert all(times[-1] >= 5 * MINUTE - 24 for times in beats.values())


def test_a_thousand_watchdogs_write_fifty_files_a_second_after_the_start(tmp_path, operations, monkeypatch) -> None:
    """The real files of a minute, on a clock of the test's: each beat is one file made and one renamed."""
    clock = [0.0]
    monkeypatch.setattr("tarflow.trainer.resilience.watchdog.time.monotonic", lambda: clock[0])
    (tmp_path / "heartbeats").mkdir()
    dogs = [Watchdog(tmp_path, rank, RANKS, ParallelConfig()) for rank in range(RANKS)]
    for dog in dogs:
        dog._path = tmp_path / "heartbeats" / f"rank-{dog.rank:04d}.json"
    for now in range(0, MINUTE, 2):
        clock[0] = float(now)
        for dog in dogs:
            dog.beat()
    made = operations()
    assert made["os.rename"] == made["open"] <= RANKS + MINUTE * alive.BEATS_PER_S * 1.1
    assert made["os.rename"] >= 3 * RANKS, "each rank three times"
    assert len(read_heartbeats(tmp_path)) == RANKS


@pytest.mark.parametrize(("world_size", "least", "most"), [(2, 8, 40), (RANKS, 2, 3)])
def test_the_thread_of_a_watchdog_keeps_to_it(tmp_path, operations, world_size, least, most) -> None:
    """In one second, with a look every 0.05 s; the last beat says how it ended, whenever that is."""
    limits = ParallelConfig(step_timeout_s=0.2)
    with Watchdog(tmp_path, 1, world_size, limits) as dog:
        for _ in range(20):
            dog.phase("step")
            time.sleep(0.05)
    assert least <= operations()["os.rename"] <= most
    (last,) = read_heartbeats(tmp_path)
    assert last["phase"] == alive.GONE


def test_a_row_of_the_status_table_reads_each_heartbeat_once(large: Path, operations) -> None:
    operations()
    (row,) = status.rows([large])
    assert row.state == "running"
    assert operations()["open"] == RANKS
    for rank in range(RANKS):
        beat(large, rank, phase=alive.HUNG if rank == 7 else alive.FAILED)
    operations()
    (row,) = status.rows([large])
    assert row.state == "failed (hung)"
    assert operations()["open"] == RANKS
    assert last_words(large, read_heartbeats(large)) == alive.HUNG
    assert living_writer(large, beats=read_heartbeats(large)) is None


def test_a_job_that_waits_for_a_thousand_dead_ranks_does_not_read_them_all_the_time(
    large, operations, monkeypatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(writer.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    operations()
    writer.wait_for_writer(large, "108", lambda _: None)
    assert clock[0] >= beat_interval_s(RANKS), "a living rank would have been heard"
    assert operations()["open"] <= RANKS * (2 + clock[0] * 2 / (RANKS / writer.READS_PER_S))


def test_one_living_rank_of_a_thousand_is_heard(large, monkeypatch) -> None:
    """It beats every 20 s, longer than a small run is watched."""
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] >= 18:
            beat(large, 999)

    monkeypatch.setattr(writer.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(writer.time, "sleep", sleep)
    with pytest.raises(writer.RunInUseError, match="node0, pid 100, Slurm job 107"):
        writer.wait_for_writer(large, "108", lambda _: None)


def test_the_comparison_of_ranks_reads_them_less_often_in_a_large_run(tmp_path: Path) -> None:
    assert Watchdog(tmp_path, 0, 8, ParallelConfig())._look_s == 30
    assert Watchdog(tmp_path, 0, RANKS, ParallelConfig())._look_s == 100
