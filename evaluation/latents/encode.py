"""`tarflow encode`: the latents of every image of a data set or a folder."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tarflow.code_version import code_version
from tarflow.evaluation.batches import named_cause
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.flow import Flow
from tarflow.evaluation.latents.store import (
    FORMAT,
    RECORD,
    Latents,
    Noise,
    images_of_a_shard,
    is_whole,
    open_latents,
    shard,
)
from tarflow.evaluation.likelihood.files import who_is_who, write_table
from tarflow.evaluation.likelihood.images import Images, open_images
from tarflow.evaluation.likelihood.out_folder import refuse_other_files, refuse_others
from tarflow.evaluation.log import Log
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings
from tarflow.evaluation.samples.request import SourceRequest, batches_of, open_request
from tarflow.evaluation.shared_work import SharedWork
from tarflow.evaluation.worker.chunk_file import Chunk, write_chunk
from tarflow.files import check_writable, create_empty, discarded, fill, put_once
from tarflow.leases import unique_name
from tarflow.npz import read_npz
from tarflow.records import save_record

LEASE_S = 120.0
UNGUIDED = {"guidance": 0.0, "denoise": 0.0}  # a flow and its inverse know neither


@dataclass(kw_only=True)
class EncodeRequest(SourceRequest):
    """Which images to encode, and where to."""

    measures: ClassVar[bool] = True
    data: Path
    out: Path
    num: int = 0  # images, 0 = all
    form: Literal["parquet", "csv"] = "parquet"  # of the table
    noisy: bool = False  # with the noise of training added
    seed: int | None = None  # of that noise; None: that of the sampling settings


def encode_images(request: EncodeRequest, log: Log = print) -> Latents:
    """Encode what is missing in `request.out`; the record of all. Raises EvaluationError where OUT holds something else."""
    label, request.labels = request.labels, None
    request.settings = request.settings | UNGUIDED
    source, sampling, batch_size = open_request(request, log)
    seed = sampling.settings.seed if request.seed is None else request.seed
    given = request.settings.get("noise_std")
    level = source.level(given) if source.told else None
    if given is not None and level is None and not request.noisy:
        raise EvaluationError(
            f"--noise-std {given:g} is about noise, and without --noisy none is added: give both or neither"
        )
    noise = source.training_noise(sampling.noise_std, seed, level=level) if request.noisy else None
    images = open_images(request.data, source, request.num, label, log)
    identity = {
        "format": FORMAT, **source.describe(), "noise": noise.describe() if noise else "none",
        "images": images.provenance(), "table": f"latents.{request.form}",
    } | ({} if level is None else {"noise_level": level})  # fmt: skip
    what = "without noise" if noise is None else f"with noise ({noise.describe()})"
    log(f"{images.num_images:,} images of {request.data}, {what}, weights {source.weights} of {source.origin}")
    flow = Flow(source, sampling, batch_size, batches_of(request, source, log))
    work = _Encoding(request, flow, noise, level, images, identity, log)
    if not work.is_there():
        refuse_other_files(request.out, "latents")
        check_writable(request.out if request.out.is_dir() else request.out.parent)
        with named_cause("encoding", source.model.var.device):
            work.run()
    found = open_latents(request.out)
    lost = f", {found.nonfinite} of them not finite" if found.nonfinite else ""
    number = len(found.shards)
    log(f"{found.encoded:,} latents in {number} shard{'s' * (number != 1)}{lost}\ntable: {request.out / found.table}")
    return found


@dataclass
class _Encoding:
    request: EncodeRequest
    flow: Flow
    noise: NoiseSettings | None
    level: float | None  # that the model is told
    images: Images
    identity: dict[str, Any]
    log: Log
    shards: dict[str, tuple[int, Chunk]] = field(default_factory=dict)  # by name: its number, its file

    def __post_init__(self) -> None:
        self.parts = max(1, -(-self.images.num_images // images_of_a_shard(self.flow.config)))
        for part in range(self.parts):
            chunk = shard(self.request.out, self.identity, part, self.parts)
            self.shards[chunk.path.name] = part, chunk

    def is_there(self) -> bool:
        """Whether OUT holds these very latents, whole. Raises EvaluationError where it holds others."""
        if not (self.request.out / RECORD).is_file():
            return False
        found = open_latents(self.request.out)
        refuse_others(self.request.out, "latents", found.identity, self.identity)
        return (self.request.out / found.table).is_file() and all(is_whole(chunk) for _, chunk in self.shards.values())

    def run(self) -> None:
        """Help until the record is there, by any process. A unit of the work says that its shard is in OUT."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        plan = {"batch_size": self.flow.batch_size, "shards": self.parts}
        work = SharedWork(self.request.out / "work" / digest, plan, LEASE_S)
        self.flow.batch_size = int(work.plan["batch_size"])
        work.give_back(list(self.shards), lambda path: is_whole(self.shards[path.name][1]))
        if work.work_through(list(self.shards), self._encode):
            work.work_through(["written"], lambda _name, path: self._write(path))
        work.remove()

    def _encode(self, name: str, done: Path) -> None:
        part, chunk = self.shards[name]
        if chunk.path.exists():
            if is_whole(chunk):
                fill(done, "")
                return
            self.log(f"  {chunk.path} is damaged and encoded again")
            chunk.path.unlink()
        config = self.flow.config
        arrays: dict[str, list[Tensor]] = {
            "z": [torch.empty(0, config.num_tokens, config.token_dim)], "ids": [torch.empty(0, dtype=torch.int64)],
            "labels": [torch.empty(0, dtype=torch.int64)], "pixels": [torch.empty(0, *config.image_shape, dtype=torch.uint8)],
            "energy": [torch.empty(0, dtype=torch.float64)],
        }  # fmt: skip
        var = self.flow.model.var.float().cpu()
        for pixels, labels, ids in self.images.batches(self.flow.batch_size, part, self.parts):
            x = self.noise.apply(pixels, ids.tolist()) if self.noise else pixels
            z = self.flow.encode(x, labels, noise_level=self.level)
            energy = (z.double().square() / var).mean(dim=(1, 2))
            for key, value in (("z", z), ("ids", ids), ("labels", labels), ("pixels", pixels), ("energy", energy)):
                arrays[key].append(value)
        temporary = chunk.path.with_name(f".{chunk.path.name}.{unique_name()}.tmp")
        with discarded(temporary):
            create_empty(temporary)
            joined = {key: torch.cat(values).contiguous().numpy() for key, values in arrays.items()}
            write_chunk(Chunk(temporary, chunk.identity), {}, **joined)
            put_once(temporary, chunk.path)
        fill(done, "")

    def _write(self, path: Path) -> None:
        """The table first: the record says that all is there."""
        columns: dict[str, list[Any]] = {}
        counts, nonfinite = [], 0
        for name, (_, chunk) in self.shards.items():
            found = read_npz(chunk.path, names=("ids", "labels", "energy")).arrays
            rows = dict(
                who_is_who(found["ids"].tolist(), found["labels"].tolist(), self.images.name, self.flow.classes)
            )
            rows |= {"shard": [name] * len(found["ids"]), "row": range(len(found["ids"]))}
            rows["energy"] = found["energy"].tolist()
            for key, values in rows.items():
                columns.setdefault(key, []).extend(values)
            counts.append(len(found["ids"]))
            nonfinite += int((~np.isfinite(found["energy"])).sum())
        table: Literal["latents.csv", "latents.parquet"] = (
            "latents.csv" if self.request.form == "csv" else "latents.parquet"
        )
        write_table(self.request.out / table, columns)
        noise, source = self.noise, self.flow.source
        record = Latents(
            identity=json.loads(json.dumps(self.identity)), weights_sha256=source.sha256, shards=counts, nonfinite=nonfinite,
            noise=Noise(kind=noise.kind, std=noise.std, seed=noise.seed) if noise else None, noise_level=self.level,
            table=table, data=str(self.request.data), origin=source.origin, provenance=source.describe_provenance(),
            code=code_version(),
        )  # fmt: skip
        save_record(self.request.out / RECORD, record)
        fill(path, "")
