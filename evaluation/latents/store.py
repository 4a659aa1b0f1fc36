"""A folder of latents, as `tarflow encode` writes it.

    DIR/latents.json                        what the latents depend on, and how many are in each shard; written last
    DIR/latents-00000-of-00010.npz          z float32 [n, T, D], ids int64 [n], labels int64 [n] (-1 = none),
                                            pixels uint8 [n, C, H, W] as they were read, energy float64 [n]
    DIR/latents.parquet (or .csv)           a row per image: number, name, label, shard, energy
    DIR/work/                               who is at which shard, until all are there

Every shard carries a checksum and all that `latents.json` says of its origin: one of other weights, images or noise is never
taken for one of these. Nothing in them is pickled. `energy` is the mean of z^2 / (variance of the prior), which is near 1
for what the flow was trained on.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings
from tarflow.evaluation.worker.chunk_file import Chunk, Form, is_valid, read_chunk
from tarflow.models.config import TarFlowConfig
from tarflow.records import DamagedFileError, Record, load_record

FORMAT, RECORD = 1, "latents.json"
SHARD_BYTES, MOST_IMAGES = 64 << 20, 1024  # of a shard, which memory holds at once
FORM: Form = {
    "z": (np.float32, "n t d"), "ids": (np.int64, "n"), "labels": (np.int64, "n"), "pixels": (np.uint8, "n c h w"),
    "energy": (np.float64, "n"),
}  # fmt: skip
_WAY_OUT = "the same `tarflow encode` writes it again"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Images = Annotated[int, Field(ge=0, le=1 << 40)]


class Noise(Record):
    """The noise that was added to 8-bit images before they were encoded."""

    kind: Literal["gaussian", "uniform"]
    std: float = Field(ge=0, le=100)
    seed: int

    @property
    def settings(self) -> NoiseSettings:
        """For adding it again."""
        return NoiseSettings(self.kind, self.std, self.seed)


class Latents(Record):
    """DIR/latents.json. `identity` stands in every shard, too."""

    what: ClassVar[str] = "a record of latents"
    way_out: ClassVar[str] = _WAY_OUT
    must_be_sealed: ClassVar[bool] = True

    identity: dict[str, Any]
    weights_sha256: Sha256
    noise: Noise | None
    noise_level: float | None = Field(None, gt=0, le=100)  # that the model was told
    shards: Annotated[list[Images], Field(min_length=1, max_length=1 << 20)]  # images in each
    nonfinite: Images
    table: Literal["latents.parquet", "latents.csv"]
    data: str
    origin: str
    provenance: dict[str, Any]
    code: dict[str, Any] | None

    @property
    def encoded(self) -> int:
        """How many images, those whose latents are not finite included."""
        return sum(self.shards)


def images_of_a_shard(model: TarFlowConfig) -> int:
    """As many as fit into SHARD_BYTES."""
    numbers = model.num_tokens * model.token_dim
    return max(1, min(SHARD_BYTES // (5 * numbers), MOST_IMAGES))  # 4 bytes of z and 1 of the pixel


def shard(folder: Path, identity: dict[str, Any], part: int, parts: int) -> Chunk:
    """One of `parts` shards, which need not exist yet."""
    name = f"latents-{part:05d}-of-{parts:05d}.npz"
    return Chunk(folder / name, {**identity, "shard": part, "of": parts})


def is_whole(chunk: Chunk) -> bool:
    """Whether a shard is there and undamaged."""
    return chunk.path.is_file() and is_valid(chunk, FORM)


def open_latents(folder: Path) -> Latents:
    """The record of a folder of latents. Raises EvaluationError where there is none, or encoding has not ended."""
    if not folder.is_dir():
        raise EvaluationError(f"LATENTS {folder}: there is no such folder; `tarflow encode` makes one")
    try:
        return load_record(folder / RECORD, Latents)
    except FileNotFoundError:
        begun = (folder / "work").is_dir() or any(folder.glob("latents-*.npz"))
        why = "its encoding has not ended: the same `tarflow encode` goes on" if begun else "`tarflow encode` makes one"
        raise EvaluationError(f"LATENTS {folder} holds no {RECORD}; {why}") from None


def read_shard(folder: Path, latents: Latents, part: int) -> dict[str, NDArray[Any]]:
    """The arrays of a shard. Raises DamagedFileError where it is not the one that was encoded."""
    chunk = shard(folder, latents.identity, part, len(latents.shards))
    try:
        arrays, _ = read_chunk(chunk, FORM)
    except DamagedFileError as error:
        raise DamagedFileError(chunk.path, error.problem, _WAY_OUT, what="a shard of latents") from None
    except FileNotFoundError:
        raise DamagedFileError(chunk.path, "it is missing", _WAY_OUT, what="a shard of latents") from None
    if len(arrays["ids"]) != latents.shards[part]:
        problem = f"it holds {len(arrays['ids'])} images, and {RECORD} says {latents.shards[part]}"
        raise DamagedFileError(chunk.path, problem, _WAY_OUT, what="a shard of latents")
    return arrays
