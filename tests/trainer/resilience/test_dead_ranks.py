"""One rank dies, hangs or cannot save: all ranks leave, the cause is in log.txt, the same command goes on. Real processes.

Includes errors on one rank that must reach all ranks.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.marker import damage
from tarflow.trainer.resilience.exit_codes import FAILED, FINISHED, HUNG, NO_PROGRESS, USAGE
from tarflow.trainer.run_dir import create_run
from tests.trainer.conftest import tiny_yaml

# Three ranks, twelve steps, a save at every third. Limits of time that a crowded machine keeps; who hangs has shorter ones.
SETTINGS = ("train.global_batch_size=12", "train.max_images=144", "checkpoint.every_images=36", "log.every_steps=1",
            "parallel.start_timeout_s=100", "parallel.step_timeout_s=50")  # fmt: skip
HANGING = ("parallel.start_timeout_s=20", "parallel.step_timeout_s=5")
EXIT = 3  # of the injected os._exit
CODE = {"raise": FAILED, "exit": EXIT, "kill": -9}


@dataclass(frozen=True)
class Patient:
    """A start that somebody has to wait for: a rank hangs until a limit, or is slow."""

    ranks: int
    fault: str
    settings: tuple[str, ...] = HANGING
    steps: int = 0  # of rank 0 until then
    full: tuple[str, ...] = ()


FULL = ("log.txt", "metrics.jsonl", "logs/rank-0001.log")
PATIENT = {
    "hangs at a step": Patient(3, "step@8/1=hang", steps=7),
    "hangs during a save": Patient(3, "save.written@2/1=hang", steps=6),
    "spins first thing": Patient(2, "step@1/1=spin"),  # before the watchdog's first look
    "spins later": Patient(2, "step@5/1=spin", steps=4),  # and after it
    "hangs on a full disk": Patient(2, "step@3/1=hang", steps=2, full=FULL),
    "rank 0 never joins": Patient(2, "join/0=kill", ("parallel.start_timeout_s=2",)),
    "rank 1 never joins": Patient(2, "join/1=kill", ("parallel.start_timeout_s=2",)),
    # This limit is also the time between two comparisons of the ranks.
    "is slow": Patient(2, "step@1/1=slow:0.8", ("parallel.step_timeout_s=4",), steps=1),
}


@pytest.fixture(scope="module", autouse=True)
def patient(start, tiny_data, tmp_path_factory) -> dict[str, tuple[Path, Callable[[], dict[str, Any]]]]:
    """Run and end of each, begun before the first test: they wait while others train. Those who ask for them come last."""
    begun = {}
    for name, one in PATIENT.items():
        folder = tmp_path_factory.mktemp("patient")
        run, config = folder / "runs" / "run", tiny_yaml(folder / "tiny.yaml", tiny_data)
        if one.full:
            create_run(run)
        order = {"ranks": one.ranks, "fault": one.fault, "full": one.full, "wait_for_steps": one.steps}
        begun[name] = run, start.soon(config, run, *SETTINGS, *one.settings, **order)
    return begun


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


def log(run: Path) -> str:
    return (run / "log.txt").read_text()


def last_words(run: Path) -> list[str]:
    return [line for line in log(run).splitlines() if "FAILED: rank" in line or "HUNG: rank" in line]


@pytest.mark.parametrize("how", CODE)
@pytest.mark.parametrize("where", ["step@8", "save.written@2"], ids=["at a step", "during a save"])
@pytest.mark.case("C11")
def test_one_dead_rank_takes_all_with_it_and_the_log_says_why(start, tiny_config, run, where, how) -> None:
    end = start(tiny_config, run, *SETTINGS, ranks=3, fault=f"{where}/1={how}")
    assert end["by_themselves"]
    assert end["leftovers"] == []
    if how == "raise" and where != "step@8":  # a save that fails is no death: the run goes on and says so
        assert end["codes"] == [FINISHED] * 3
        assert "WARNING: saving step 6 failed" in log(run)
        assert "rank 1: RuntimeError: fault injected at save.written" in log(run)
        assert [c.step for c in committed(run)] == [9, 12]
        return
    assert end["codes"][1] == CODE[how]
    assert FINISHED not in end["codes"]
    said = last_words(run)
    if how == "raise":
        assert "FAILED: rank 1 of 3" in said[0]
        assert "RuntimeError: fault injected at step" in said[0]
    else:  # a rank without last words: those of its peers
        assert any("FAILED: rank 0 of 3" in line or "FAILED: rank 2 of 3" in line for line in said)
    assert find(run).step in ((3, 6) if where == "step@8" else (3,))  # a save under way may or may not have been done


@pytest.mark.case("C11")
def test_restart_after_a_death_forms_a_clean_world_of_another_size(start, tiny_config, run) -> None:
    end = start(tiny_config, run, *SETTINGS, ranks=3, fault="save.written@2/2=kill")
    assert end["codes"][2] == -9
    assert (run / "heartbeats" / "rank-0002.json").exists()  # what the dead left: heartbeats, a torn save, a lock
    assert (run / "checkpoints" / "images-000000000072.tmp").exists()
    end = start(tiny_config, run, *SETTINGS, ranks=2)
    assert end["codes"] == [FINISHED, FINISHED]
    assert "checkpoint images-000000000072.tmp is not used: a save was interrupted (removed)" in log(run)
    assert "resuming at 36 images (checkpoint images-000000000036)" in log(run)
    assert find(run).step == 12


@pytest.mark.case("C11")
def test_normal_end_with_workers_leaves_nothing_behind(start, tiny_config, run) -> None:
    end = start(tiny_config, run, *SETTINGS, "data.num_workers=2", ranks=2)
    assert end == {"codes": [FINISHED, FINISHED], "by_themselves": True, "leftovers": []}


@pytest.mark.case("C11")
def test_killed_rank_does_not_leave_its_workers_behind(start, tiny_config, run) -> None:
    end = start(tiny_config, run, *SETTINGS, "data.num_workers=2", ranks=2, fault="step@4=kill")
    assert end["codes"] == [-9, -9]
    assert end["leftovers"] == []


def test_restarts_without_progress_end_with_a_reason_and_a_way_out(start, tiny_config, run) -> None:
    settings = (*SETTINGS, "train.max_restarts_without_progress=2")
    for _ in range(3):  # the first start and two restarts
        assert start(tiny_config, run, *settings, ranks=1, fault="step@5=kill,step@2=kill")["codes"] == [-9]
    assert start(tiny_config, run, *settings, ranks=1)["codes"] == [NO_PROGRESS]
    last = log(run).splitlines()[-1]
    assert "no progress: 2 restarts from 0 images have committed no new checkpoint" in last
    assert "train.skip_images" in last
    (run / "restarts.json").unlink()
    end = start(tiny_config, run, *settings, "train.skip_images=[[12, 36]]", ranks=1)
    assert end["codes"] == [FINISHED]
    assert "skipped images 12 to 24: train.skip_images" in log(run)
    assert "skipped images 24 to 36: train.skip_images" in log(run)
    trained = [json.loads(line)[0] for line in (run.parent.parent / "run-trained.jsonl").read_text().splitlines()]
    assert trained[-10:] == [p for p in range(0, 144, 12) if p not in (12, 24)]


def test_progress_sets_the_count_of_restarts_back(start, tiny_config, run) -> None:
    settings = (*SETTINGS, "train.max_restarts_without_progress=1", "checkpoint.asynchronous=false")
    for _ in range(3):  # each commits one checkpoint and dies
        assert start(tiny_config, run, *settings, ranks=1, fault="save.begin@2=kill")["codes"] == [-9]
    assert start(tiny_config, run, *settings, ranks=1)["codes"] == [FINISHED]


def test_full_disk_costs_saves_and_after_max_failures_the_run_stops(start, tiny_config, run) -> None:
    fault = "save.written@2/1=nospace,save.written@3/1=nospace"
    settings = (*SETTINGS, "checkpoint.max_failures=2", "checkpoint.keep_latest=-1", "train.max_images=240")
    end = start(tiny_config, run, *settings, ranks=2, fault=fault)
    assert end["codes"] == [USAGE, USAGE]
    for path in (run / "log.txt", run / "logs" / "rank-0001.log"):  # every rank knows
        text = path.read_text()
        assert "saving step 6 failed (1 in a row; the run stops after checkpoint.max_failures=2)" in text
        assert "rank 1: No space left on device" in text
    assert "2 saves in a row failed" in log(run)
    assert "checkpoint.max_failures" in log(run).splitlines()[-1]
    steps = [c.step for c in committed(run)]
    assert steps[0] == 3
    assert 9 <= steps[-1] < 20  # it had room again for the last one
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_full_disk_costs_log_lines_but_not_the_run(start, tiny_config, run) -> None:
    create_run(run)
    end = start(tiny_config, run, *SETTINGS, ranks=2, full=FULL)
    assert end["codes"] == [FINISHED, FINISHED]
    assert find(run).step == 12
    assert not any((run / name).exists() for name in FULL), "nothing was written"


@pytest.mark.case("T01")
def test_pointer_is_never_ahead_of_the_data(start, tiny_config, run) -> None:
    """A slow disk, and SIGKILL while it writes: the pointer names a checkpoint whose every byte is there."""
    for number, point in enumerate(("save.written", "save.renamed"), 1):
        slow = "save.begin@2=slow:0.2,save.written@2=slow:0.2,save.renamed@2=slow:0.2"
        end = start(tiny_config, run, *SETTINGS, ranks=2, fault=f"{slow},{point}@2=kill")
        assert -9 in end["codes"]
        whole = {c.name: c for c in committed(run)}
        named = (run / "checkpoints" / "latest").read_text().strip()
        assert named in whole
        assert whole[named].step == 3 * number
        assert damage(whole[named]) is None


@pytest.mark.case("T15")
def test_damaged_newest_checkpoint_is_set_aside_and_the_one_before_goes_on(start, tiny_config, run) -> None:
    settings = (*SETTINGS, "train.max_images=72")
    assert start(tiny_config, run, *settings, ranks=1)["codes"] == [FINISHED]
    file = next((run / "checkpoints" / "images-000000000072").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    # Killed where the step is saved again, and not marked yet: the pointer must have gone back before.
    end = start(tiny_config, run, *settings, ranks=1, fault="save.renamed=kill")
    assert end["codes"] == [-9]
    assert (run / "checkpoints" / "latest").read_text().strip() == "images-000000000036"
    assert "checkpoint images-000000000072 is set aside as images-000000000072.damaged" in log(run)
    assert (run / "checkpoints" / "images-000000000072.damaged" / file.name).read_bytes() == content
    assert start(tiny_config, run, *settings, ranks=1)["codes"] == [FINISHED]
    assert [c.step for c in committed(run)] == [3, 6]


@pytest.mark.case("K03")
def test_changes_are_printed_and_those_of_the_order_are_flagged(start, tiny_config, run) -> None:
    assert start(tiny_config, run, *SETTINGS, "train.max_images=48", ranks=1)["codes"] == [FINISHED]
    changed = ("train.max_images=96", "train.global_batch_size=8", "train.seed=7", "optim.lr=2e-3")
    assert start(tiny_config, run, *SETTINGS, *changed, ranks=1)["codes"] == [FINISHED]
    said = log(run)
    assert "changed: train.max_images: 48 -> 96\n" in said
    assert "changed: train.global_batch_size: 12 -> 8\n" in said
    assert "changed: optim.lr: 0.001 -> 0.002\n" in said
    assert (
        "changed: train.seed: 0 -> 7 (the order of samples changes: some of this epoch are seen twice or not at all)"
        in said
    )
    assert find(run).images_seen == 96


@pytest.mark.parametrize("where", ["at a step", "during a save"])
@pytest.mark.case("C11")
def test_a_hanging_rank_is_ended_with_its_stacks_and_takes_all_with_it(patient, where: str) -> None:
    run, ended = patient[f"hangs {where}"]
    end = ended()
    assert end["by_themselves"]
    assert end["leftovers"] == []
    assert end["codes"][1] == HUNG
    assert FINISHED not in end["codes"]
    assert any(
        "HUNG: rank 1" in line and "parallel." in line and f"exit code {HUNG}" in line for line in last_words(run)
    )
    stacks = (run / "logs" / "rank-0001.log").read_text()
    assert "stacks of rank 1" in stacks
    assert "in fault_point" in stacks  # where it hangs
    assert stacks.count("Thread 0x") >= 2  # and what its other threads do
    assert find(run).step in ((3, 6) if where == "at a step" else (3,))


@pytest.mark.parametrize(("dead", "alive"), [(0, 1), (1, 0)])
@pytest.mark.case("C11")
def test_rank_that_dies_before_it_could_join_does_not_keep_the_other(patient, dead: int, alive: int) -> None:
    run, ended = patient[f"rank {dead} never joins"]
    end = ended()
    assert end["by_themselves"]
    said = (run.parent.parent / "run-output.txt").read_text()
    if end["codes"][alive] == HUNG:  # torch tries to connect again after its time is over; the deadline cut that short
        assert alive == 1
        assert "HUNG: rank 1" in said
        assert "was still joining the other ranks after 4 s (parallel.start_timeout_s)" in said
        assert "in init_process_group" in said
    else:  # torch's own error came first
        assert end["codes"][alive] == FAILED
        assert "1/2 clients joined" in said if alive == 0 else "DistNetworkError" in said


@pytest.mark.parametrize("when", ["first thing", "later"])
def test_hang_that_lets_no_other_thread_run_is_ended_too(patient, when: str) -> None:
    run, ended = patient[f"spins {when}"]
    end = ended()
    assert end["by_themselves"]
    assert end["codes"][1] == FAILED  # the clock without an interpreter knows no other code
    assert "in fault_point" in (run / "logs" / "rank-0001.log").read_text()


def test_straggler_is_named_with_its_times(patient) -> None:
    run, ended = patient["is slow"]
    assert ended()["codes"] == [FINISHED, FINISHED]
    lines = [line for line in log(run).splitlines() if "straggler: rank 1 needs " in line]
    assert lines
    assert all("all ranks wait for it" in line for line in lines)


def test_a_rank_that_hangs_is_ended_on_a_full_disk_too(patient) -> None:
    run, ended = patient["hangs on a full disk"]
    end = ended()
    assert not any((run / name).exists() for name in FULL), "nothing was written"
    assert end["codes"][1] == HUNG  # the watchdog does not need the disk, either
