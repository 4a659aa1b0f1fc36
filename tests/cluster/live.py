"""What the tests on a live Slurm do and look at, beside the product's own verbs."""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tarflow.cluster.submission import snapshot
from tests.helpers.waiting import PATIENCE_S, until


def run(*words: str) -> str:
    """One of Slurm's commands."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@contextmanager
def urgent_job(*options: str) -> Iterator[None]:
    """Submit a job that takes others' nodes. Left when it is over: late, it would take those of the next test."""
    run("sbatch", "-J", "urgent", "-p", "high", "-o", "/dev/null", *options)
    yield
    until("the end of the urgent job", lambda: not run("squeue", "-h", "-n", "urgent"))


def job_of(run_dir: Path, kind: str = "train") -> str:
    """The newest job of a run."""
    lines = (run_dir / "slurm" / "jobs.jsonl").read_text().splitlines()
    return [e["job"] for e in map(json.loads, lines) if e["kind"] == kind][-1]


def log(run_dir: Path, kind: str = "train", rank: int = 0) -> str:
    """What a rank of the newest job has printed."""
    from tarflow.cluster.logs import log_text

    try:
        return "".join(log_text(run_dir, rank, kind)[1])
    except ValueError:
        return ""


def last_line(run_dir: Path, kind: str = "train") -> str:
    """The last line of the first task's log."""
    job = job_of(run_dir, kind)
    (file,) = [p for f in (run_dir, run_dir.parent) for p in f.glob(f"slurm/jobs/{job}_0_log.out")]
    return file.read_text().splitlines()[-1]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, but for one that is just being written."""
    from tarflow.records import read_lines

    return list(read_lines(run_dir / "metrics.jsonl").rows)


def at_step(run_dir: Path, step: int) -> None:
    """Wait until training has passed a step."""

    def there() -> bool:
        return max((row.get("step", 0) for row in metrics(run_dir)), default=-1) >= step

    until(f"step {step} of {run_dir}\n{log(run_dir)[-2000:]}", there)


def ended(run_dir: Path, kind: str = "train", patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """Wait until a job's chain has ended and Slurm has let go of the job; the chain's record."""
    job = job_of(run_dir, kind)
    chain = run_dir / "slurm" / f"chain-{job}.json"
    until(
        f"the end of job {job}",
        lambda: chain.exists() and json.loads(chain.read_text())["ended"] and not run("squeue", "-h", "-j", job)
        if run("squeue", "-h", "-o", "%i") else chain.exists() and json.loads(chain.read_text())["ended"],
        patience_s,
    )  # fmt: skip
    return dict(json.loads(chain.read_text()))


def accounted(job: str) -> str:
    """Accounting's final word: STATE exit:signal."""

    def final() -> str:
        record = run("sacct", "-n", "-P", "-X", "-o", "state,exitcode", "-j", job).splitlines()
        return record[-1] if record and not record[-1].startswith(("RUNNING", "PENDING", "REQUEUED")) else ""

    return str(until(f"the record of job {job}", final, 30))


def committed_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    from tarflow.trainer.checkpoint.find import committed

    return [checkpoint.step for checkpoint in committed(run_dir)]


def final_tensors(run_dir: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint: weights, averages, moments."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from tarflow.trainer.checkpoint.find import find
    from tarflow.trainer.checkpoint.tensors import read_tensors

    checkpoint = find(run_dir)
    stored = FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    into = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in stored.items()
        if isinstance(facts, TensorStorageMetadata)
    }
    read_tensors(checkpoint, into)
    return into


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Bitwise the same state after the same number of images."""
    import torch

    ours, theirs = final_tensors(run_dir), final_tensors(reference)
    assert len(ours) > 10
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ, e.g. {different[0]}"


def step_losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step; what a restart repeats counts once."""
    return {row["step"]: row["train/loss"] for row in metrics(run_dir) if "train/loss" in row}


def rank_pids(run: Path) -> dict[int, int]:
    """Processes that train a run, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            env = dict(v.split(b"=", 1) for v in (process / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:
            continue
        if b"train" in words and str(run).encode() in words and b"RANK" in env:
            found[int(env[b"RANK"])] = int(process.name)
    return found


def as_if_torch_saw_what_nvidia_smi_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the jobs submitted from here on train on the CPU although they asked for GPUs, which are names here."""
    take = snapshot.take

    def changed(slurm_dir: Path) -> Path:
        code = take(slurm_dir)
        with open(code / "tarflow" / "devices.py", "a") as file:
            file.write("\n\ndef asked_for_gpus(env=None):\n    return ''\n")
        return code

    monkeypatch.setattr(snapshot, "take", changed)


def with_broken_images(data: Path, to: Path) -> Path:
    """A copy of a data set in whose shards every image is zeros."""
    shutil.copytree(data, to)
    for shard in to.rglob("*.tar"):
        content = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    content[member.offset_data : member.offset_data + member.size] = bytes(member.size)
        shard.write_bytes(content)
    return to
