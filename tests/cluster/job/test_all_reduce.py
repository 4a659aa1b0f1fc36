"""The check of all ranks before the first step, by real processes: who has what device, who answers, over which backend."""

import json
import os
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from tarflow.cluster.job import all_reduce
from tarflow.cluster.job.all_reduce import DEVICE_FAILED, silent_node, unlike_versions
from tarflow.cluster.job.preflight import Here, all_reduce_command
from tarflow.records import save_record
from tests.helpers.warm import warm

ROOT = Path(__file__).parents[3]
PROGRAM = "tests.helpers.programs.check_devices"


def new_store() -> TCPStore:
    """What the launcher of rank 0 keeps open."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@pytest.fixture
def store() -> TCPStore:
    return new_store()


def start(
    store: TCPStore, folder: Path, rank: int, size: int, limit_s: float = 60, fake: str = "", **env: str
) -> subprocess.Popen[str]:
    """A rank of its own node. `fake`: its device, without touching one."""
    save_record(folder / f"here-{rank}.json", Here(rank=rank, node=f"n{rank}", time=time.time()), shared=False)
    command = all_reduce_command("auto", limit_s, folder, 1, f"n{rank}")
    module = "tarflow.cluster.job.all_reduce"
    command = warm(PROGRAM if fake else module, *command[command.index(module) + 1 :])
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "FAKE_DEVICE": fake,
        **{k: str(v) for k, v in place.items()},
        **env,
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, text=True)


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, what it printed, the last line of its errors) of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        found.append((process.returncode, out, err.strip().splitlines()[-1] if err.strip() else ""))
    return found


def test_two_ranks_sum_a_number_and_rank_0_says_what_there_is(store, tmp_path: Path) -> None:
    first, second = ended([start(store, tmp_path, rank, 2) for rank in range(2)])
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert f"preflight: 2 ranks on 2 nodes: cpu; torch {torch.__version__}; gloo summed over all of them in" in first[1]
    assert second[1] == ""


def test_a_rank_that_was_promised_gpus_and_sees_none_blames_its_node_and_names_both_versions(store, tmp_path) -> None:
    """For real: this torch has CUDA, and this machine no driver for it."""
    process = start(store, tmp_path, 0, 2, TARFLOW_GPUS="8")
    ((code, _, said),) = ended([process])
    assert code == DEVICE_FAILED
    assert "the job asked for 8 GPUs on each node, but on node" in said
    assert f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU: " in said


def test_alone_there_is_nobody_to_meet_and_the_device_counts_all_the_same(store, tmp_path) -> None:
    good, bad = ended([start(store, tmp_path, 0, 1), start(store, tmp_path, 0, 1, TARFLOW_GPUS="1")])
    assert good[:2] == (0, f"preflight: one process on cpu; torch {torch.__version__}\n")
    assert bad[0] == DEVICE_FAILED


@pytest.mark.parametrize(
    ("alone", "seen", "broken", "said"),
    [
        (True, 4, None, ""),
        (True, 3, None, "torch sees 3 of the 4 GPUs that the job asked for (CUDA_VISIBLE_DEVICES: 0,1,2,3)"),
        (True, 4, 2, "a GPU does not work: CUDA error: an illegal instruction was encountered"),
        (False, 4, 2, ""),  # that is the affair of rank 2
    ],
)
def test_the_only_process_of_a_job_tries_every_gpu(alone, seen, broken, said, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation starts a worker for each, after the check."""
    tried: list[int] = []

    def ones(size: int, device: torch.device) -> torch.Tensor:
        tried.append(device.index)
        if device.index == broken:
            raise RuntimeError("CUDA error: an illegal instruction was encountered\nCompile with ...")
        return torch.full((size,), 1.0)

    def leave(code: int, text: str) -> None:
        raise SystemExit(f"{code} {text}")

    monkeypatch.setenv("TARFLOW_GPUS", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(all_reduce, "leave", leave)
    for name, value in {"is_available": True, "device_count": seen, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    if said:
        with pytest.raises(SystemExit) as caught:
            all_reduce.working_device("auto", 0, alone)
        assert str(caught.value) == f"{DEVICE_FAILED} {said}"
        return
    assert all_reduce.working_device("auto", 0, alone) == torch.device("cuda", 0)
    assert tried == (list(range(seen)) if alone else [0])


def test_a_node_that_does_not_answer_is_named_within_the_limit(store, tmp_path: Path) -> None:
    """Its task has started, and its process hangs before it can say anything: in an import, say."""
    save_record(tmp_path / "here-2.json", Here(rank=2, node="n2", time=time.time()), shared=False)
    limit_s = 3.0
    processes = [start(store, tmp_path, rank, 3, limit_s, "cpu") for rank in range(2)]
    began = time.monotonic()
    first, second = ended(processes)
    assert (first[0], second[0]) == (1, 1)
    assert first[2].startswith("no answer in the stage 'devices' after ")
    assert first[2].endswith("; rank 2 did not reach it, on node n2")
    assert "the log of rank 0 says who has not reached it" in second[2]
    assert silent_node(tmp_path) == "n2"
    assert time.monotonic() - began < 60


def test_without_rank_0_the_others_say_that_it_is_the_one(store, tmp_path: Path) -> None:
    save_record(tmp_path / "here-0.json", Here(rank=0, node="n0", time=time.time()), shared=False)
    ((code, _, said),) = ended([start(store, tmp_path, 1, 2, 2.0, "cpu")])
    assert code == 1
    assert said.endswith("; rank 0 did not reach it, on node n0")
    assert silent_node(tmp_path) == "", "only rank 0 accuses"


def test_unlike_devices_are_named_and_the_node_without_a_gpu_is_blamed(store, tmp_path: Path) -> None:
    """Nobody asked for GPUs here, so no rank can know alone that it should have one."""
    first, second = ended([start(store, tmp_path, 0, 2, fake="cuda GPU-1"), start(store, tmp_path, 1, 2, fake="cpu")])
    assert (first[0], second[0]) == (1, DEVICE_FAILED)
    assert first[2] == second[2]
    assert "cuda on rank 0 (node n0); cpu on rank 1 (node n1)" in first[2]


def test_two_ranks_of_a_node_with_one_gpu_between_them_are_named(store, tmp_path: Path) -> None:
    first, second = ended([start(store, tmp_path, rank, 2, fake="cuda GPU-1") for rank in range(2)])
    assert (first[0], second[0]) == (1, 1)
    assert (
        "ranks 0 and 1 on node n1 share one GPU (GPU-1): start as many processes on each node as it has GPUs"
        in first[2]
    )


def test_whoever_waits_inside_nccl_is_ended_at_the_limit_with_the_stage_and_the_cause(tmp_path) -> None:
    """No error comes from there in time: a timer of the check's own. A rank that hangs, and beside it a network that does not."""
    causes = {
        "NCCL": "; rank 1 did not reach it, on node n1",
        "": "; all 2 ranks have reached it: check the network between the nodes, GLOO_SOCKET_IFNAME=(unset), "
            "NCCL_SOCKET_IFNAME==ib0",
    }  # fmt: skip
    network = {"NCCL_SOCKET_IFNAME": "=ib0"}
    stores, jobs = [], []
    for number, hang in enumerate(causes):
        stores.append(new_store())
        folder = tmp_path / str(number)
        folder.mkdir()
        jobs.append([
            start(stores[-1], folder, 0, 2, 4.0, "cuda GPU-0", **network),
            start(stores[-1], folder, 1, 2, 4.0, "cuda GPU-1", FAKE_HANG=hang, **network),
        ])  # fmt: skip
    try:
        firsts = ended([job[0] for job in jobs])
    finally:
        for process in [process for job in jobs for process in job]:
            process.kill()
            process.wait()
    for (code, _, last), said in zip(firsts, causes.values(), strict=True):
        assert code == 1
        assert last.startswith("no end in the stage 'NCCL' after ")
        assert last.endswith(said)


def test_an_interface_that_is_not_there_fails_over_the_backend_that_takes_it(store, tmp_path: Path) -> None:
    first, second = ended(
        [start(store, tmp_path, 0, 2, 8.0, "cpu"), start(store, tmp_path, 1, 2, 8.0, "cpu", GLOO_SOCKET_IFNAME="nope9")]
    )
    assert (first[0], second[0]) == (1, 1)
    assert "nope9" in second[2]
    assert "in the stage 'gloo'" in second[2]
    assert "in the stage 'gloo'" in first[2]
    assert "all 2 ranks have reached it: check the network between the nodes, GLOO_SOCKET_IFNAME=(unset)" in first[2]


def test_versions_that_differ_are_an_error_and_drivers_a_note(store, tmp_path: Path) -> None:
    same = {"torch": "2.11", "CUDA": "13.0", "driver": "550"}
    assert unlike_versions([same] * 3) == ("", "")
    assert unlike_versions([same, same | {"driver": "535"}]) == ("", "driver 550 on ranks 0; 535 on ranks 1")
    ranks = [
        start(store, tmp_path, rank, 2, fake="cpu", FAKE_VERSIONS=json.dumps(same | {"torch": torch_}))
        for rank, torch_ in enumerate(("2.11", "2.10"))
    ]
    first, second = ended(ranks)
    assert (first[0], second[0]) == (1, 1)
    assert first[2] == "the ranks differ in torch 2.11 on ranks 0; 2.10 on ranks 1"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_found_added_up_on_and_reported_with_its_versions(store, tmp_path: Path) -> None:
    ((code, said, _),) = ended([start(store, tmp_path, 0, 1, TARFLOW_GPUS="1")])
    assert code == 0
    assert said.startswith(
        f"preflight: one process on cuda; torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL "
    )
    assert ", driver " in said
