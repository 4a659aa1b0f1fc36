"""What a job's processes are told of their GPUs and CPUs, and that none computes on the CPU instead of a GPU."""

import os
from pathlib import Path

import pytest

from tarflow.cluster.job import failure_notes
from tarflow.cluster.job.chain import AttemptResult
from tarflow.cluster.job.environment import Place, poll_s, threads_per_process
from tarflow.cluster.job.failure_notes import TaskNotes


@pytest.fixture
def job(fake, fake_slurm, verb, config_file, tmp_path):
    """`job(profile, *words)`: a submitted run, whose training is the stub; nvidia-smi lists two GPUs on every node."""

    def make(profile: str, *words: object):
        path, run = tmp_path / "p.yaml", tmp_path / "run"
        path.write_text(profile)
        fake_slurm.command("nvidia-smi", 'echo "GPU 0: H"; echo "GPU 1: H"')
        assert verb("submit", config_file, *words, "--run", run, "--profile", path) == 0
        fake.use_stub(run)
        return run

    return make


def test_a_driver_too_old_for_torch_stops_the_job_although_nvidia_smi_lists_gpus(job, fake, fake_slurm) -> None:
    run = job("gpus: 1\n")
    assert fake_slurm.run() == 75
    said = fake.said(run)
    assert "preflight: rank 0 on fake1: exit code 90: the job asked for 1 GPU on each node, but on node" in said
    assert "sees no GPU: " in said
    assert "set train.device=cpu" in said
    assert fake.stub_calls(run) == [], "nothing has trained on the CPU"
    assert list(fake.chain(run)["bad_nodes"]) == ["fake1"]


def test_so_it_is_with_several_nodes_and_none_waits_for_the_others(job, fake, fake_slurm) -> None:
    run = job("gpus: 1\n", "--nodes", 2)
    assert fake_slurm.run(tasks=2) == 75
    assert "the job asked for 1 GPU on each node" in fake.said(run)
    assert fake.stub_calls(run, 0) == fake.stub_calls(run, 1) == []
    assert set(fake.chain(run)["bad_nodes"]) <= {"fake1", "fake2"}


def test_who_says_that_the_cpu_is_meant_gets_it_and_is_told_of_the_idle_gpus(job, fake, fake_slurm, capsys) -> None:
    run = job("gpus: 1\n", "train.device=cpu")
    assert (
        "note: train.device=cpu: the profile's gpus: 1 of each node stay idle, and are not checked"
        in capsys.readouterr().out
    )
    assert fake_slurm.run(CUDA_VISIBLE_DEVICES="0") == 0
    (call,) = fake.stub_calls(run)
    assert call["TARFLOW_GPUS"] == "0"


@pytest.mark.parametrize("gpus", [0, 2])
def test_training_is_told_what_the_job_asked_for(gpus, job, fake, fake_slurm, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    run = job(f"gpus: {gpus}\npreflight: files\n", "--tasks-per-node", 2, "--one-task-per-node")
    assert fake_slurm.run(SLURM_CPUS_PER_TASK="16") == 0
    for rank in range(2):
        (call,) = fake.stub_calls(run, rank)
        assert call["TARFLOW_GPUS"] == (str(gpus) if gpus else None)
        threads = max(1, min(16, len(os.sched_getaffinity(0))) // 2)
        assert call["OMP_NUM_THREADS"] == str(threads)
    said = fake.said(run)
    assert said.count(f"OMP_NUM_THREADS={threads} for each process") == 1


@pytest.mark.parametrize(
    ("place", "processes", "bound", "env", "threads"),
    [
        (Place(0, 2, 0, 1), 8, range(96), {}, 12),  # one task per node, the whole node
        (Place(0, 2, 0, 1), 8, range(64), {}, 8),  # a part of it
        (Place(0, 16, 0, 8), 1, range(96), {}, 12),  # a task per process, and no binding
        (Place(0, 16, 0, 8), 1, range(96), {"SLURM_CPUS_PER_TASK": "6"}, 6),
        (Place(0, 16, 0, 8), 1, range(12), {"SLURM_CPUS_PER_TASK": "12"}, 12),  # bound
        (Place(0, 2, 0, 1), 8, range(4), {}, 1),
        (Place(0, 2, 0, 1), 8, range(96), {"OMP_NUM_THREADS": "3"}, None),  # the user's own
        (Place(0, 1, 0, 1), 1, range(96), {}, None),  # it has them for itself
    ],
)
def test_processes_of_a_node_share_its_cpus(place, processes, bound, env, threads, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(bound))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    assert threads_per_process(place, processes, env) == threads


def test_a_thousand_tasks_look_at_shared_files_no_more_often_than_a_hundred() -> None:
    for tasks in (100, 1000, 5000):
        assert tasks / poll_s(tasks) <= 1000
        assert tasks / poll_s(tasks, 2.0, 50) <= 250
    assert (poll_s(1), poll_s(8, 2.0, 50)) == (0.1, 2.0)


def test_a_failure_is_seen_by_one_look_at_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task looks for as long as it waits; only when there is one are all names listed, to find the cause."""
    notes = [TaskNotes(tmp_path, Place(rank, 1000, 0, 1)) for rank in range(3)]
    listings: list[Path] = []

    def listed(folder: Path, pattern: str) -> list[Path]:
        listings.append(folder)
        return real(folder, pattern)

    real = failure_notes.listed
    monkeypatch.setattr(failure_notes, "listed", listed)
    assert not any(one.anyone_failed() for one in notes)
    notes[1].record(AttemptResult(0))
    notes[1].record(AttemptResult(75, "stopped", stopped=True))
    assert not notes[0].anyone_failed()
    for _ in range(2):
        notes[2].record(AttemptResult(1, "rank 2 on n2: exit code 1"))
    assert all(one.anyone_failed() for one in notes)
    assert listings == []
    failure = notes[0].failure()
    assert failure is not None
    assert failure.text == "rank 2 on n2: exit code 1"
