"""What there is to read: images, a prepared set, two runs with everything that a run gathers, weights, samples."""

import json
import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.server import Ran, forked, load

MODEL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "channels": 16, "num_blocks": 2, "layers_per_block": 1,
         "head_channels": 8, "num_classes": 3}  # fmt: skip


class FakeFeatures:
    """Eight columns of an image in place of a network: instant, and different for different images."""

    sha256, preprocessing, dim, num_classes = "f00d", "none", 8, 0

    def __init__(self, name: str = "fake", device: str = "cpu", file: Path | None = None) -> None:
        self.name = name
        self.warnings: list[str] = []

    def __call__(self, images: Any) -> Any:
        return images.float().flatten(1)[:, 1::7][:, :8]


def set_up(seed: str = "") -> None:
    """In each child, before its command: one thread, an instant feature network, no two ids by chance."""
    import torch
    import torch.distributed.checkpoint.filesystem

    import tarflow.evaluation.networks.features
    import tarflow.evaluation.worker.make_reference
    import tarflow.evaluation.worker.real_images
    import tarflow.evaluation.worker.score_folder

    torch.set_num_threads(1)
    rng = random.Random(seed)
    uuid.uuid4 = lambda: uuid.UUID(int=rng.getrandbits(128), version=4)
    torch.distributed.checkpoint.filesystem._generate_uuid = lambda: "an id"
    for module in (
        tarflow.evaluation.networks.features,
        tarflow.evaluation.worker.make_reference,
        tarflow.evaluation.worker.real_images,
        tarflow.evaluation.worker.score_folder,
    ):
        module.Features = FakeFeatures  # type: ignore[attr-defined]


def make(folder: Path, seed: int, limit_s: float = 120) -> list[str]:
    """Make a home; the modules that its commands have loaded. Another seed: other data, other weights, another run."""
    folder.mkdir(parents=True)
    os.makedirs(folder / ".private")
    modules: list[str] = []

    def do(action: str | Callable[[], int]) -> Ran:
        ran = forked(
            action.split() if isinstance(action, str) else action,
            folder,
            limit_s,
            lambda: set_up(f"{seed} {action}"),
            None,
        )
        if ran.code != 0:
            raise RuntimeError(f"`{action}` ended with {ran.code}: {ran.err[-2000:]}")
        load(ran.modules)  # for the next
        modules.extend(ran.modules)
        return ran

    do(lambda: _inputs(seed))
    for command in COMMANDS:
        do(command)
    do(_jobs)
    return modules


COMMANDS = (
    "data prepare images set --size 8 --val-fraction 0.2",
    "train tiny.yaml --run-dir runs/one",
    "evaluate runs/one --images 32 --save shards",
    "evaluate runs/one --images 48 --save png",
    "sweep-guidance runs/one --guidance 0,1 --start 4 --final 8 --choose best",
    "train tiny.yaml --run-dir runs/two train.seed=5 train.max_images=16",
    "checkpoint export runs/one --out w.safetensors",
    "checkpoint export runs/one --out w.pth",
    "reference set/train --size 8 --channels 1 --out ref.npz",
    "sample runs/one --out drawn --num 2",
)


def _inputs(seed: int) -> int:
    import numpy as np
    import yaml
    from PIL import Image

    rng = np.random.default_rng(seed)
    for number in range(24):
        path = Path("images", "abc"[number % 3], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    tree = {
        "data": {"train": "set/train", "validation": "set/val"},
        "model": MODEL,
        "train": {"global_batch_size": 8, "max_images": 48, "noise_std": 0.1, "seed": seed},
        "optim": {"lr": 1e-3, "warmup_images": 32},
        "checkpoint": {"every_images": 16, "keep_latest": -1},
        "ema": {"relative_stds": [0.1], "snapshot_every_images": 16},
        "log": {"every_steps": 2, "tensorboard": False},
        "evaluation": {
            "num_samples": 8,
            "grid": [2, 2],
            "validation_images": 4,
            "neighbour_images": 8,
            "chunk_samples": 4,
        },
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(tree))
    Path("profile.yaml").write_text("time: 10\npartition: short\npreflight: 'off'\nsbatch:\n  comment: fuzz\n")
    Path("another.txt").write_text("another file\n")
    for name, answer in SLURM.items():
        tool = Path("bin", name)
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{answer}\n")
        tool.chmod(0o755)
    return 0


SLURM = {"sbatch": "echo Submitted batch job 7", "srun": "exit 0", "scontrol": "exit 0", "squeue": "exit 0",
         "sacct": "exit 0", "scancel": "exit 0", "sinfo": "exit 0"}  # fmt: skip


def _jobs() -> int:
    """What a submission leaves in a run."""
    from tarflow.cluster.job.chain import Chain
    from tarflow.cluster.job.record import note_job

    run = Path("runs/one")
    pins = run / "checkpoints" / "pins"
    pins.mkdir(exist_ok=True)
    (pins / "images-000000000016--held").write_text(json.dumps({"host": os.uname().nodename, "pid": 1}))
    logs = run / "slurm" / "logs"
    logs.mkdir(parents=True)
    for job in ("7", "8"):
        note_job(run, "train", job, logs)
        for stream in ("out", "err"):
            (logs / f"{job}_0_log.{stream}").write_text(f"what job {job} printed\n")
        chain = Chain.load(run / "slurm", job)
        chain.begin(0, 2, "node1")
        chain.begin(1, 4, "node2")
        chain.end(0, "finished at step 6 after 1 restart")
    return 0
