"""The device of a rank: the GPU that is its own, and no CPU where a GPU was asked for."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tarflow import devices
from tarflow.data_pipeline.loading.prefetch import Prefetched
from tarflow.devices import asked_for_gpus, device_index, keep_device, visible_devices
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.weights_source import resolve_device
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel import device as rank_devices
from tarflow.trainer.parallel.device import RankDevice, check_devices, disagreement, idle_gpu, pick_device
from tarflow.trainer.resilience.exit_codes import USAGE
from tarflow.trainer.saving.async_writer import AsyncWriter
from tests.helpers.ranks import launch_ranks, tarflow

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch):
    """`fake_cuda(count)`: torch with so many GPUs, of which each thread has a current one, as in CUDA."""

    def make(count: int, error: str = "") -> SimpleNamespace:
        mine = threading.local()
        made = SimpleNamespace(set_in=[], current=lambda: getattr(mine, "device", 0))

        def set_device(device: Any) -> None:
            mine.device = torch.device(device).index if isinstance(device, torch.device) else device
            made.set_in.append((threading.current_thread().name, mine.device))

        def init() -> None:
            if error:
                raise RuntimeError(f"{error}\nPlease update it.")

        for name, value in {
            "is_available": lambda: count > 0, "device_count": lambda: count, "set_device": set_device, "init": init,
            "current_device": made.current, "is_initialized": lambda: count > 0,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(devices, "driver_version", lambda: "470.57.02")
        monkeypatch.setattr(rank_devices, "driver_version", lambda: "470.57.02")
        return made

    return make


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"TARFLOW_GPUS": "8"}, "the job asked for 8 GPUs on each node"),
        ({"TARFLOW_GPUS": "0", "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "CUDA_VISIBLE_DEVICES=2,3"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "2"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),
        ({"SLURM_GPUS_ON_NODE": "2"}, "Slurm gave this job GPUs (SLURM_GPUS_ON_NODE=2)"),
        ({"SLURM_JOB_GPUS": "0,1"}, "Slurm gave this job GPUs (SLURM_JOB_GPUS=0,1)"),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({}, ""),
    ],
)
def test_what_asks_for_gpus(env: dict[str, str], said: str) -> None:
    assert asked_for_gpus(env) == said


def test_the_entries_of_cuda_visible_devices() -> None:
    assert visible_devices({}) is None
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "0,GPU-8a,-1,3"}) == ["0", "GPU-8a"]


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    "env", [{"TARFLOW_GPUS": "8"}, {"CUDA_VISIBLE_DEVICES": "0"}, {"SLURM_GPUS_ON_NODE": "8"}], ids=str
)
def test_where_gpus_were_asked_for_a_driver_too_old_is_an_error_and_not_the_cpu(name, env, fake_cuda) -> None:
    fake_cuda(0, error=TOO_OLD)
    with pytest.raises(TrainerError) as caught:
        pick_device(name, 0, env)
    for said in (
        asked_for_gpus(env),
        torch.__version__,
        "CUDA 13.0",
        TOO_OLD,
        "NVIDIA driver 470.57.02",
        "train.device=cpu",
    ):
        assert said in str(caught.value)
    assert pick_device("cpu", 0, env).type == "cpu", "who says so gets it"


def test_the_evaluation_has_the_same_guard(fake_cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARFLOW_GPUS", "1")
    fake_cuda(0, error=TOO_OLD)
    for name in ("auto", "cuda"):
        with pytest.raises(EvaluationError, match=r"the job asked for 1 GPU on each node, but .* is too old .*470\.57"):
            resolve_device(name)
    assert resolve_device("cpu").type == "cpu"
    monkeypatch.setenv("TARFLOW_GPUS", "0")
    assert resolve_device("auto").type == "cpu"


def test_a_gpu_that_nobody_asked_for_is_said_to_stay_idle(fake_cuda) -> None:
    fake_cuda(0, error=TOO_OLD)
    cpu = torch.device("cpu")
    assert TOO_OLD in idle_gpu(cpu, "auto", {})
    assert idle_gpu(cpu, "cpu", {}) == idle_gpu(cpu, "auto", {"CUDA_VISIBLE_DEVICES": ""}) == ""
    assert idle_gpu(torch.device("cuda", 0), "auto", {}) == ""


def test_training_itself_refuses_the_cpu_before_anything_is_made(tiny_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TARFLOW_GPUS", "4")
    run = tmp_path / "run"
    ended = tarflow("train", tiny_config, "--run-dir", run)
    assert ended.returncode == USAGE
    assert "the job asked for 4 GPUs on each node, but on node" in ended.stderr
    assert f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU: " in ended.stderr
    assert "set train.device=cpu" in ended.stderr
    assert not run.exists()


def test_a_task_that_is_shown_one_gpu_takes_that_one(fake_cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto", 3, {"CUDA_VISIBLE_DEVICES": "5"}) == torch.device("cuda", 0)
    assert cuda.current() == 0
    import os

    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed takes its device by it"
    fake_cuda(8)
    assert pick_device("cuda", 3, {}) == torch.device("cuda", 3)
    assert cuda.set_in == [("MainThread", 0)]


def test_a_process_without_a_gpu_of_its_own_is_an_error_that_names_what_it_sees() -> None:
    assert [device_index(rank, 4, {}) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"process 4 of node .* it sees 2 GPUs \(CUDA_VISIBLE_DEVICES=0,1\)"):
        device_index(4, 2, {"CUDA_VISIBLE_DEVICES": "0,1"})
    with pytest.raises(ValueError, match=r"process 0 .* it sees no GPU\. .*--gpus-per-task=1"):
        device_index(0, 0, {})


def test_unlike_devices_and_shared_gpus_are_named() -> None:
    good = [RankDevice(f"n{rank // 8}", "cuda", "H100", f"GPU-{rank}") for rank in range(1000)]
    assert disagreement(good) == ""
    assert disagreement([RankDevice("laptop", "cpu")] * 4) == "", "ranks share a CPU"
    mixed = [RankDevice("n7", "cpu") if one.host == "n7" else one for one in good]
    said = disagreement(mixed)
    assert "cuda on ranks 0, 1, 2, 3, 4, 5, 6, 7 ... (nodes n0, n1," in said
    assert "cpu on ranks 56, 57, 58, 59, 60, 61, 62, 63 (node n7)" in said
    good[5] = RankDevice("n0", "cuda", "H100", "GPU-2")
    assert "ranks 2 and 5 on node n0 share one GPU (GPU-2)" in disagreement(good)


def join_unlike_ranks() -> str:
    """A rank of two, as `process_group` starts them on a node that sees GPUs (the last) and on one that does not."""
    import os

    from tarflow.trainer.parallel.world import process_group, world_from_env

    world = world_from_env()
    kind = ("cpu", "cuda")[world.rank]

    def fake(device: torch.device, host: str | None = None) -> RankDevice:
        return RankDevice(host or f"node{world.rank}", device.type)

    rank_devices.rank_device = fake
    started = dist.init_process_group
    # There is no NCCL here; what the group is joined by is gloo on both.
    dist.init_process_group = lambda backend, **how: started(backend.replace("nccl", "gloo"), **how)
    with process_group(world, torch.device(kind), 30):
        try:
            check_devices(torch.device(kind))
        except TrainerError as error:
            dist.barrier()
            os.environ.clear()
            return str(error)
    return ""


def test_ranks_that_join_on_unlike_devices_all_learn_of_it() -> None:
    first, second = launch_ranks(join_unlike_ranks, 2, patience_s=60).values
    assert first == second
    assert "cpu on rank 0 (node node0)" in first
    assert "cuda on rank 1 (node node1)" in first


def test_threads_that_feed_and_save_have_the_device_of_the_one_that_started_them(fake_cuda, tmp_path) -> None:
    """Data is drawn by a thread that starts another one."""
    cuda = fake_cuda(8)
    seen: list[tuple[str, int]] = []

    def here(*_: object) -> None:
        seen.append((threading.current_thread().name, cuda.current()))

    def inner():
        here()
        yield 1

    def outer():
        here()
        yield from Prefetched(inner(), 1)

    cuda_thread = threading.Thread(target=here)
    torch.cuda.set_device(torch.device("cuda", 5))
    cuda_thread.start()
    cuda_thread.join()
    assert seen.pop()[1] == 0, "what a thread has otherwise"
    assert list(Prefetched(outer(), 1)) == [1]
    writer = AsyncWriter.__new__(AsyncWriter)
    writer.write = here  # type: ignore[method-assign,assignment]
    save = SimpleNamespace(thread=None)
    writer.start(save, {}, lambda: ("", {}))  # type: ignore[arg-type]
    save.thread.join()
    assert [device for _, device in seen] == [5, 5, 5]
    assert [name for name, _ in seen] == ["tarflow-data", "tarflow-data", "save"]


def test_without_a_gpu_in_use_nothing_is_wrapped(fake_cuda) -> None:
    fake_cuda(0)
    assert keep_device(test_what_asks_for_gpus) is test_what_asks_for_gpus


def test_every_thread_of_the_data_and_of_saves_keeps_the_device() -> None:
    """A thread that is added later must be thought of: those that touch no tensor are listed here."""
    import re
    from pathlib import Path

    root = Path(devices.__file__).resolve().parents[1]
    without = {
        "data_pipeline/loading/stream/shards.py", "data_pipeline/storage/changed_shards.py", "trainer/resilience/watchdog.py",
        "data_pipeline/storage/fetch_ahead.py", "data_pipeline/prepare/encode.py", "data_pipeline/index/processes.py",
        "trainer/resilience/signals.py", "trainer/outbox.py", "trainer/checkpoint/waiting.py", "trainer/tracking/wandb_process.py",
    }  # fmt: skip
    makes = re.compile(r"threading\.(Thread|Timer)\(|ThreadPoolExecutor\(")
    found = {
        str(path.relative_to(root)): path.read_text()
        for room in ("trainer", "data_pipeline")
        for path in (root / room).rglob("*.py")
        if makes.search(path.read_text())
    }
    assert {name for name, text in found.items() if "keep_device(" not in text} <= without
