"""Checkpoints of a few bytes, for tests of names, markers and retention, which look at no tensor."""

import json
import pickle
import zlib
from functools import cache
from pathlib import Path
from typing import Any

WEIGHTS = "__0_0.distcp"


@cache
def metadata(*shapes: int, file: str = WEIGHTS, length: int = 1) -> bytes:
    """A `.metadata` as torch writes it: of one tensor, whose bytes are the first `length` of a file."""
    import torch
    import torch.distributed.checkpoint.metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    size = torch.Size(shapes)
    start = torch.Size([0] * len(shapes))
    tensor = dcp.TensorStorageMetadata(
        dcp.TensorProperties(torch.float32), size, [dcp.ChunkStorageMetadata(start, size)]
    )
    places = {dcp.MetadataIndex("model/w", start, 0): _StorageInfo(file, 0, length)}
    return pickle.dumps(dcp.Metadata({"model/w": tensor}, {"model/w": ("model/w",)}, places, dcp.StorageMeta("x")))


def fill(folder: Path, content: str = "w") -> None:
    """The files of a checkpoint; `content` stands for its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_text(content)
    (folder / "config.yaml").write_text("")
    (folder / ".metadata").write_bytes(metadata())


def facts(folder: Path) -> dict[str, dict[str, int]]:
    """What a marker says of the files in a folder."""
    return {
        p.name: {"size": p.stat().st_size, "crc32": zlib.crc32(p.read_bytes())}
        for p in sorted(folder.iterdir())
        if p.name != "COMMITTED"
    }


def by_step(run: Path, step: int, images: int, content: str = "w") -> Path:
    """A checkpoint as version 0.1 named and marked it."""
    from tarflow.trainer.run_dir import run_id

    path = run / "checkpoints" / f"step-{step:08d}"
    fill(path, content)
    record = {"step": step, "images_seen": images, "run": run_id(run), "files": facts(path)}
    (path / "COMMITTED").write_text(json.dumps(record))
    return path


def tell(folder: Path, **said: Any) -> None:
    """Let a marker say something else, under a seal that fits."""
    from tarflow.records import SEAL, sealed

    marker = json.loads((folder / "COMMITTED").read_text())
    marker.pop(SEAL, None)
    (folder / "COMMITTED").write_text(json.dumps(sealed(marker | said)))


def forge(folder: Path) -> None:
    """Make a marker say what its files are now: what whoever forges a checkpoint does."""
    tell(folder, files=facts(folder))
