"""Before the first step: where tasks meet, what a node must have, and which node is to blame."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tarflow.cluster.errors import ClusterError
from tarflow.cluster.job.environment import Place
from tarflow.cluster.job.preflight import BadNodeError, check_node, check_shared
from tarflow.cluster.job.rendezvous import meet
from tests.helpers.ranks import launch_ranks

HERE = {"MASTER_ADDR": "127.0.0.1", "SLURM_JOB_NODELIST": "node1"}


def reduce_within_a_job(folder: Path, jobs: dict[str, float]) -> tuple[float, str]:
    """One of two tasks of one of the jobs: meet the other, and sum up a number of the job's; the sum and the port."""
    number = int(os.environ["RANK"])
    job, rank = list(jobs)[number // 2], number % 2
    del os.environ["MASTER_PORT"]  # as if nobody had chosen one
    os.environ |= HERE
    place = Place(rank, 2, rank, 2)
    meeting = meet(folder / job, place)
    assert meeting is not None
    os.environ |= meeting.variables(place)
    dist.init_process_group("gloo")
    value = torch.tensor([jobs[job]])
    dist.all_reduce(value)
    dist.barrier()
    return value.item(), os.environ["MASTER_PORT"]


@pytest.mark.case("C06")
def test_two_jobs_on_a_node_meet_apart_although_their_ids_end_alike(tmp_path: Path) -> None:
    """Job ids 1500 and 2500 (equal modulo 1000), and a second array element: three worlds at once."""
    jobs = {"1500-0": 1.0, "2500-0": 10.0, "1500_1-0": 100.0}
    for job in jobs:
        (tmp_path / job).mkdir()
    found = launch_ranks(reduce_within_a_job, 6, tmp_path, jobs).values
    said = {job: found[2 * number : 2 * number + 2] for number, job in enumerate(jobs)}
    for job, value in jobs.items():
        assert [total for total, _ in said[job]] == [2 * value] * 2
        assert said[job][0][1] == said[job][1][1], "both ranks agree on the port"
    assert len({pair[0][1] for pair in said.values()}) == 3


@pytest.mark.case("C06")
def test_a_busy_port_set_by_hand_is_an_error_at_once_that_names_it(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ClusterError, match=f"MASTER_PORT={port} is in use"):
            meet(tmp_path, Place(0, 2), {**HERE, "MASTER_PORT": str(port)})
    assert not (tmp_path / "rendezvous.json").exists()
    meeting = meet(tmp_path, Place(0, 2), HERE)
    assert meeting is not None
    assert json.loads((tmp_path / "rendezvous.json").read_text())["port"] == meeting.port


def test_a_rank_whose_first_never_comes_says_so_and_one_that_is_stopped_leaves(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"rank 1 waited 0 s for .*rendezvous\.json"):
        meet(tmp_path, Place(1, 2), HERE, wait_s=0.2)
    assert meet(tmp_path, Place(1, 2), HERE, stopped=lambda: True) is None


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "slurm").mkdir()
    return tmp_path


def test_a_sound_node_passes_and_leaves_nothing_behind(run: Path) -> None:
    check_node(run, "node1", 0, 0.0)
    assert list((run / "slurm").iterdir()) == []


def test_a_node_that_cannot_write_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadNodeError, match=r"node node7: the run directory .* cannot be written") as caught:
        check_node(tmp_path / "missing", "node7", 0, 0.0)
    assert caught.value.node == "node7"


def test_too_little_room_is_no_nodes_fault(run: Path) -> None:
    with pytest.raises(ClusterError, match="min_free_gb=1000000") as caught:
        check_node(run, "node1", 0, 1e6)
    assert not isinstance(caught.value, BadNodeError)


@pytest.mark.parametrize(
    ("script", "good"),
    [('echo "GPU 0: H"; echo "GPU 1: H"', True), ('echo "GPU 0: H"', False), ("exit 9", False), ("", False)],
)
def test_missing_gpus_are_a_nodes_fault(run: Path, fake_slurm, script: str, good: bool) -> None:
    fake_slurm.command("nvidia-smi", script)
    if good:
        check_node(run, "node1", 2, 0.0)
        return
    with pytest.raises(BadNodeError, match=r"node node1: (1|no) of its 2 GPUs answer"):
        check_node(run, "node1", 2, 0.0)


@pytest.mark.parametrize(
    ("visible", "listed", "said"),
    [
        ("3", 1, ""),  # bound by --gpus-per-task and a cgroup
        ("3", 8, ""),  # bound by a variable alone
        ("3", 0, r"node node1: no of its 1 GPUs that were given to this task \(CUDA_VISIBLE_DEVICES=3\) answer"),
        ("0,1,2,3,4,5,6,7", 7, "node node1: 7 of its 8 GPUs answer"),
        (None, 7, "node node1: 7 of its 8 GPUs answer"),
        (
            "",
            8,
            r"asks for gpus: 8 on each node, but Slurm gave this task 0 \(CUDA_VISIBLE_DEVICES=''\) for its 1 process:",
        ),
        ("NoDevFiles", 8, "gave this task 0"),
    ],
)
def test_a_site_that_binds_one_gpu_to_each_task(run: Path, fake_slurm, visible, listed, said) -> None:
    fake_slurm.command("nvidia-smi", "\n".join(f'echo "GPU {n}: H"' for n in range(listed)))
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    if not said:
        check_node(run, "node1", 8, 0.0, 1, env)
        return
    with pytest.raises(ClusterError, match=said):
        check_node(run, "node1", 8, 0.0, 1, env)


def test_a_bound_gpu_is_too_few_for_a_task_that_starts_all_processes_of_its_node(run: Path, fake_slurm) -> None:
    fake_slurm.command("nvidia-smi", 'echo "GPU 0: H"')
    with pytest.raises(
        ClusterError, match=r"this task 1 .* for its 8 processes: .*without --one-task-per-node"
    ) as caught:
        check_node(run, "node1", 8, 0.0, 8, {"CUDA_VISIBLE_DEVICES": "0"})
    assert not isinstance(caught.value, BadNodeError)


def test_a_clock_that_is_off_is_a_nodes_fault(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr("tarflow.cluster.job.preflight.time.time", lambda: now() - 100)
    with pytest.raises(BadNodeError, match=r"node node1: its clock is \+100 s off"):
        check_node(run, "node1", 0, 0.0)


def test_every_task_must_see_the_others_files(tmp_path: Path) -> None:
    threads = [threading.Thread(target=check_shared, args=(tmp_path, Place(r, 3), f"n{r}")) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    # A second task of a node looks for itself and the first: the first task of each node looks for all.
    check_shared(tmp_path, Place(1, 99, 1, 2), "n0", wait_s=0.3)
    other = tmp_path / "not-shared"
    other.mkdir()
    with pytest.raises(ClusterError, match=r"rank 2 on node n2 cannot see here-0.json, here-1.json in .*start"):
        check_shared(other, Place(2, 3), "n2", wait_s=0.3)


@pytest.mark.parametrize(
    ("before", "after"), [("(null)", "node2,node9"), ("bad[1-2]", "bad1,bad2,node2,node9"), ("node9", "node9,node2")]
)
def test_bad_nodes_are_excluded_beside_those_that_the_job_avoids_already(fake_slurm, before: str, after: str) -> None:
    from tarflow.cluster.slurm import exclude_nodes

    fake_slurm.command(
        "scontrol", f'[ "$1" = update ] || echo "JobId=5 NodeList=x ReqNodeList=(null) ExcNodeList={before} z=1"'
    )
    assert exclude_nodes("5_1", ["node2", "node9"])
    assert fake_slurm.calls("scontrol") == ["show job 5_1 -o", f"update JobId=5_1 ExcNodeList={after}"]


@pytest.mark.parametrize(("script", "timeout_s"), [("exit 1", 60.0), ("exec sleep 600", 2.0)])
def test_an_exclusion_that_cannot_be_made_is_told_soon(fake_slurm, script: str, timeout_s: float) -> None:
    from tarflow.cluster.slurm import exclude_nodes

    fake_slurm.command("scontrol", script)
    assert not exclude_nodes("5", ["node2"], timeout_s=timeout_s)
    assert len(fake_slurm.calls("scontrol")) == 3


def test_a_node_that_a_later_rank_finds_bad_is_excluded_at_once(fake, fake_slurm, verb, config_file, tmp_path) -> None:
    """Rank 0 waits for the others' files meanwhile: it must not wait in vain."""
    profile, run = tmp_path / "p.yaml", tmp_path / "run"
    profile.write_text("gpus: 1\npreflight: full\n")
    fake_slurm.command("nvidia-smi", '[ "$SLURMD_NODENAME" = fake2 ] || echo "GPU 0: H"')
    assert verb("submit", config_file, "--run", run, "--nodes", 2, "--profile", profile) == 0
    fake.use_stub(run)
    began = time.monotonic()
    assert fake_slurm.run(tasks=2) == 75
    assert time.monotonic() - began < 60
    assert [c for c in fake_slurm.calls("scontrol") if not c.startswith(("show node", "show config"))] == [
        "requeue 107", "show job 107 -o", "update JobId=107 ExcNodeList=fake2",
    ]  # fmt: skip
    assert "node fake2: no of its 1 GPUs answer" in fake.said(run)
    assert "bad nodes fake2 are excluded" in fake.said(run).splitlines()[-1]
    assert list(fake.chain(run)["bad_nodes"]) == ["fake2"]
    assert fake.stub_calls(run) == []
