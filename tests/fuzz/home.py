"""What there is to read: pictures in every form, prepared sets, two runs with everything that a run gathers, weights, samples."""

import json
import os
import pickle
import random
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.decisions import DESCRIPTION, DIGEST, START
from tests.fuzz.server import HEAVY, Action, forked, load
from tests.helpers.features import NoSpatial

MODEL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "channels": 16, "num_blocks": 2, "layers_per_block": 1,
         "head_channels": 8, "num_classes": 3}  # fmt: skip
CLASSES = ("a", "b", "c")
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "ppm": "PPM", "avif": "AVIF",
           "jp2": "JPEG2000", "ico": "ICO", "tga": "TGA", "pcx": "PCX", "dds": "DDS"}  # fmt: skip
SLURM = {
    "sbatch": "echo Submitted batch job 9", "srun": "exit 0", "scontrol": 'echo "UserId=me($(id -u)) StdOut=$PWD/runs/one/slurm/jobs/$3_0_log.out"', "sacct": "exit 0", "scancel": "exit 0",
    "squeue": "echo '8|PENDING|Priority|'", "sinfo": "exit 0",
}  # fmt: skip


class FakeFeatures(NoSpatial):
    """Eight columns of an image in place of a network: instant, and different for different images."""

    sha256, preprocessing, dim, num_classes = "f00d", "none", 8, 0

    def __init__(self, name: str = "fake", device: str = "cpu", file: Path | None = None) -> None:
        self.name = name
        self.warnings: list[str] = []

    def __call__(self, images: Any) -> Any:
        return images.float().flatten(1)[:, 1::7][:, :8]


def set_up_light(seed: str = "") -> None:
    """The same for a command that does not load torch."""
    # By caller: how many ids the libraries draw depends on what is loaded already.
    rngs: dict[str, random.Random] = {}

    def uuid4() -> uuid.UUID:
        caller = sys._getframe(1).f_globals["__name__"]
        rng = rngs.setdefault(caller, random.Random(f"{seed} {caller}"))
        return uuid.UUID(int=rng.getrandbits(128), version=4)

    uuid.uuid4 = uuid4


def set_up(seed: str = "") -> None:
    """In a child, before its command: no two ids by chance, one thread, an instant feature network."""
    set_up_light(seed)
    import torch
    import torch.distributed.checkpoint.filesystem

    import tarflow.evaluation.networks.features
    import tarflow.evaluation.references.make
    import tarflow.evaluation.worker.real_images
    import tarflow.evaluation.worker.score_folder

    torch.set_num_threads(1)
    torch.distributed.checkpoint.filesystem._generate_uuid = lambda: "an id"
    for module in (
        tarflow.evaluation.networks.features,
        tarflow.evaluation.references.make,
        tarflow.evaluation.worker.real_images,
        tarflow.evaluation.worker.score_folder,
    ):
        module.Features = FakeFeatures  # type: ignore[attr-defined]


def make(folder: Path, seed: int, limit_s: float = 120) -> None:
    """Make a home. Another seed: other data, other weights, another run."""
    (folder / ".private").mkdir(parents=True)
    load(HEAVY)

    def do(action: Action) -> None:
        ran = forked(action, folder, limit_s, lambda: set_up(f"{seed} {action}"), None)
        if ran.code != 0:
            raise RuntimeError(f"`{action}` ended with {ran.code}: {ran.err[-2000:]}")
        load(ran.modules)  # for the next

    def inputs() -> int:
        return _inputs(seed)

    steps: list[str | Callable[[], int]] = [
        inputs,
        "data prepare images set --size 8 --val-fraction 0.2",
        "data prepare images mds --size 8 --container mds",
        "train tiny.yaml --run-dir runs/one",
        "sweep-guidance runs/one --guidance 0,1 --start 4 --final 8 --choose best",
        "evaluate runs/one --images 32 --save shards",
        "evaluate runs/one --images 48 --save png",
        _half_an_evaluation,
        _half_an_evaluation_by_plan,
        "train tiny.yaml --run-dir runs/two train.seed=5 train.max_images=16",
        "checkpoint export runs/one --out w.safetensors",
        "checkpoint export runs/one --out w.pth",
        "checkpoint export runs/one --out hub --format hf",
        "reference set/train --size 8 --channels 1 --out ref.npz",
        "sample runs/one --out drawn --num 2",
        "likelihood runs/one set/val --out lik",
        "likelihood runs/one set/val --out runs/one/likelihoods/val",
        "encode runs/one set/val --out lat",
        "decode runs/one lat --out dec",
        _jobs,
    ]
    for step in steps:
        do(step.split() if isinstance(step, str) else step)


def _inputs(seed: int) -> int:
    import numpy as np
    import pyarrow as pa
    import torch
    import yaml
    from PIL import Image
    from pyarrow import parquet

    rng = np.random.default_rng(seed)
    labels = np.arange(24) % 3
    pixels = rng.integers(0, 255, (24, 8, 8), dtype=np.uint8)
    pictures = []
    for number, (image, label) in enumerate(zip(pixels, labels)):
        path = Path("images", CLASSES[label], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        pictures.append(path.read_bytes())
    for place in ("sources", "formats", "edm/00000", "idx", "raw", "bin"):
        Path(place).mkdir(parents=True)
    np.savez("sources/arrays.npz", images=pixels, labels=labels)
    parquet.write_table(pa.table({"image": pictures, "label": labels}), "sources/table.parquet")
    for number in range(6):
        Path(f"edm/00000/img{number:08d}.png").write_bytes(pictures[number])
    listed = [[f"00000/img{number:08d}.png", number % 3] for number in range(6)]
    Path("edm/dataset.json").write_text(json.dumps({"labels": listed}, indent=1))
    head = b"".join(size.to_bytes(4, "big") for size in (24, 8, 8))
    Path("idx/train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + head + pixels.tobytes())
    Path("idx/train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + head[:4] + labels.astype(np.uint8).tobytes())
    big = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    for extension, name in FORMATS.items():
        if name in Image.SAVE:
            big.save(f"formats/picture.{extension}", name)
    np.savez("array.npz", arr_0=np.repeat(pixels[..., None], 3, axis=3))
    rows = rng.normal(size=(40, 8))
    moments = {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)}
    np.savez("theirs.npz", mu_s=moments["mu"], sigma_s=moments["sigma"], **moments)
    Path("theirs.pkl").write_bytes(pickle.dumps({"fid": moments}))
    torch.save(moments, "theirs.pt")
    sums = {"sum": rows.sum(axis=0), "cov_sum": rows.T @ rows, "num_samples": np.array(len(rows))}
    torch.save({f"real_features_{name}": torch.from_numpy(array) for name, array in sums.items()}, "theirs.pth")
    Path("rows").mkdir()
    planes: dict[str, Any] = {"data": np.repeat(pixels[:6].reshape(6, -1), 3, axis=1), "labels": [1, 2, 3, 1, 2, 3]}
    Path("rows/val_data").write_bytes(pickle.dumps(planes))
    np.savez("rows/train_data_batch_1.npz", **planes)
    Path("names.json").write_text(json.dumps(list(CLASSES), indent=1))
    tree = {
        "data": {"train": "set/train", "validation": "set/val"},
        "model": MODEL,
        "train": {"global_batch_size": 8, "max_images": 48, "noise_std": 0.1, "seed": seed},
        "optim": {"lr": 1e-3, "warmup_images": 32},
        "checkpoint": {"every_images": 16, "keep_latest": -1},
        "ema": {"relative_stds": [0.1], "snapshot_every_images": 16},
        "log": {"every_steps": 2, "tensorboard": False},
        "evaluation": {"num_samples": 8, "grid": [2, 2], "validation_images": 4, "neighbour_images": 8, "chunk_samples": 4,
                       "lease_s": 0.5},
    }  # fmt: skip
    Path("tiny.yaml").write_text(yaml.safe_dump(tree))
    Path("profile.yaml").write_text("time: 10\npartition: short\npreflight: 'off'\nsbatch:\n  comment: fuzz\n")
    Path("another.txt").write_text("another file\n")
    for name, answer in SLURM.items():
        tool = Path("bin", name)
        tool.write_text(f"#!/bin/sh\n{answer}\n")
        tool.chmod(0o755)
    return 0


def _half_an_evaluation_by_plan() -> int:
    """The same where the way of sampling was measured: a plan of sampling is left, too."""
    return _half_an_evaluation("sampling.method=auto")


def _half_an_evaluation(*words: str) -> int:
    """A worker that dies after its first chunk of samples: a plan, a chunk and claims are left."""
    import tarflow.cli
    from tarflow.evaluation import shared_work

    put_once = shared_work.put_once

    def put_and_die(temporary: Path, final: Path) -> None:
        put_once(temporary, final)
        if final.name.startswith("samples"):
            os._exit(0)

    shared_work.put_once = put_and_die
    tarflow.cli.main(["evaluate", "runs/one", "--images", "16", *words])
    return 1


def _jobs() -> int:
    """What submissions and their starts leave in a run: job 7 has ended, job 8 waits to be started again."""
    import torch

    from tarflow.cluster.job.chain import Chain, Limits
    from tarflow.cluster.job.description import Job, save_description
    from tarflow.cluster.job.failure_notes import FailureNote
    from tarflow.cluster.job.preflight import Here
    from tarflow.cluster.job.record import note_job
    from tarflow.cluster.job.rendezvous import MeetingFile
    from tarflow.evaluation.batches import Fitted, device_name
    from tarflow.interpreter import HOME
    from tarflow.records import save_record
    from tarflow.trainer.checkpoint.pins import Pin
    from tarflow.trainer.run_dir import run_id

    run, submission = Path("runs/one"), "ab" * 16
    pins, logs = run / "checkpoints" / "pins", DESCRIPTION.parent
    for folder in (pins, logs, START):
        folder.mkdir(parents=True, exist_ok=True)
    save_record(pins / "images-000000000016.held", Pin(host=os.uname().nodename, pid=1))
    for job in ("7", "8"):
        note_job(run, "train", job, logs, submission)
        for stream in ("out", "err"):
            (logs / f"{job}_0_log.{stream}").write_text(f"what job {job} printed\n")
        chain = Chain.load(run / "slurm", job)
        chain.submission = submission
        chain.begin(0, 2, "node1")
    Chain.load(run / "slurm", "7").end(0, "finished at step 6 after 1 restart")
    for rank in (0, 1):
        save_record(START / f"here-{rank}.json", Here(rank=rank, node=f"node{rank + 1}", time=time.time()))
    save_record(START / "rendezvous.json", MeetingFile(host="127.0.0.1", check_port=4001, port=4002))
    save_record(START / "failed-1.json", FailureNote(code=1, text="rank 1 on node2: exit code 1"))
    save_record(run / "evals" / "batches.json", Fitted(devices={device_name(torch.device("cpu")): {"likelihood": 4}}))
    work = Job(kind="train", run_dir="runs/one", run=run_id(run), submission=submission, code=str(HOME.resolve()),
               arguments=(), resubmit="tarflow submit", limits=Limits())  # fmt: skip
    DIGEST.write_text(save_description(DESCRIPTION, (work,)))
    return 0
