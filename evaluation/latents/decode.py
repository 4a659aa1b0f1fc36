"""`tarflow decode`: latents on disk -> images, each held against the one that was encoded.

OUT/images/00000012.png          the image of number 12, rounded to 8 bits
OUT/decoded.parquet (or .csv)    a row per image: number, label, round-trip errors
OUT/decoded.json                 what was decoded, and the largest errors; written last
OUT/work/                        chunks, until the table is written
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from torch import Tensor

from tarflow.code_version import code_version
from tarflow.evaluation.batches import named_cause
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.flow import Flow
from tarflow.evaluation.latents.encode import LEASE_S, UNGUIDED
from tarflow.evaluation.latents.store import Latents, open_latents, read_shard
from tarflow.evaluation.likelihood.files import who_is_who, write_table
from tarflow.evaluation.likelihood.out_folder import refuse_other_files, refuse_others
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.png_folder import save_png
from tarflow.evaluation.samples.request import SourceRequest, batches_of, open_request
from tarflow.evaluation.shared_work import SharedWork
from tarflow.evaluation.worker.chunk_file import Chunk, Form, is_valid, read_chunk, write_chunk
from tarflow.files import check_writable, fill, make_folder
from tarflow.models.noise import to_model_range, to_pixels
from tarflow.records import Record, load_record, write_object

FORMAT, RECORD = 1, "decoded.json"
ERRORS: Form = {
    "ids": (np.int64, "n"), "labels": (np.int64, "n"), "max_error": (np.float64, "n"), "rms_error": (np.float64, "n"),
    "grey_levels": (np.int64, "n"),
}  # fmt: skip
Error = float | None


class Decoded(Record):
    """What OUT/decoded.json must hold to be believed; the rest is compared with what is asked."""

    model_config = ConfigDict(extra="allow")
    what: ClassVar[str] = "a record of decoded images"
    way_out: ClassVar[str] = "give another --out"
    must_be_sealed: ClassVar[bool] = True

    table: Literal["decoded.parquet", "decoded.csv"]
    decoded: int = Field(ge=0)
    nonfinite: int = Field(ge=0)
    max_error: Error = Field(None, ge=0)
    rms_error: Error = Field(None, ge=0)
    worst: int | None = Field(None, ge=0)  # number of the image with the largest error


@dataclass(kw_only=True)
class DecodeRequest(SourceRequest):
    """Which latents to decode, and where to."""

    latents: Path
    out: Path
    form: str = "parquet"  # of the table: or csv


def decode_latents(request: DecodeRequest, log: Log = print) -> Decoded:
    """Decode what is missing in `request.out`; the summary. Raises EvaluationError for other weights than encoded them."""
    latents = open_latents(request.latents)
    request.settings = request.settings | UNGUIDED
    source, sampling, batch_size = open_request(request, log)
    if source.sha256 != latents.weights_sha256:
        raise EvaluationError(
            f"LATENTS {request.latents} were encoded with the weights {latents.weights_sha256[:12]} ({latents.origin}), and "
            f"those of {source.origin}, {source.weights}, are {source.sha256[:12]}: the inverse of another flow gives other "
            "images. Name the same weights (--images, --step, --weights)"
        )
    identity = {"format": FORMAT, "latents": latents.identity, "table": f"decoded.{request.form}"}
    log(f"{latents.encoded:,} latents of {request.latents}, weights {source.weights} of {source.origin}")
    record = request.out / RECORD
    if not _there(request.out, identity):
        refuse_other_files(request.out, "decoded.", "images")
        check_writable(request.out if request.out.is_dir() else request.out.parent)
        flow = Flow(source, sampling, batch_size, batches_of(request, source, log))
        with named_cause("decoding", flow.device):
            _Decoding(request, latents, flow, identity, log).run()
    found = load_record(record, Decoded)
    if found.max_error is not None:
        log(
            f"largest round-trip error {found.max_error:.2g} (image {found.worst}), root mean square {found.rms_error:.2g}, "
            "in [-1, 1]"
        )
    if found.nonfinite:
        log(f"{found.nonfinite} of {found.decoded:,} images are not finite, and have no picture")
    log(f"images: {request.out / 'images'}\ntable: {request.out / found.table}")
    return found


def picture(out: Path, number: int) -> Path:
    """Where an image's PNG is."""
    return out / "images" / f"{number:08d}.png"


def _there(out: Path, identity: dict[str, Any]) -> bool:
    """Whether OUT holds these very images. Raises EvaluationError where it holds others, or has lost some."""
    if not (out / RECORD).is_file():
        return False
    found = load_record(out / RECORD, Decoded)
    refuse_others(out, "images", found.model_dump(), identity)
    pictures = sum(path.suffix == ".png" for path in (out / "images").iterdir()) if (out / "images").is_dir() else 0
    if pictures != found.decoded - found.nonfinite or not (out / found.table).is_file():
        raise EvaluationError(
            f"--out {out}: its {RECORD} is there, but its table is not, or not all of its images are ({pictures} of "
            f"{found.decoded - found.nonfinite}): give another folder"
        )
    return True


@dataclass
class _Decoding:
    request: DecodeRequest
    latents: Latents
    flow: Flow
    identity: dict[str, Any]
    log: Log

    def run(self) -> None:
        """Help until the record is there, by any process: a chunk for each shard of latents."""
        self.chunks = {f"decoded-{part:05d}": part for part in range(len(self.latents.shards))}
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        plan = {"batch_size": self.flow.batch_size, "shards": len(self.chunks)}
        self.work = SharedWork(self.request.out / "work" / digest, plan, LEASE_S)
        self.flow.batch_size = int(self.work.plan["batch_size"])
        make_folder(self.request.out, "images")
        for name in self.work.give_back(list(self.chunks), lambda path: is_valid(self._chunk(path.name, path), ERRORS)):
            self.log(f"  {self.work.path(name)} is damaged and computed again")
        if self.work.work_through(list(self.chunks), self._decode):
            self.work.work_through(["written"], lambda _name, path: self._write(path))
        self.work.remove()

    def _chunk(self, name: str, path: Path) -> Chunk:
        return Chunk(path, {**self.identity, "chunk": name})

    def _decode(self, name: str, path: Path) -> None:
        arrays = read_shard(self.request.latents, self.latents, self.chunks[name])
        errors: dict[str, list[NDArray[Any]]] = {key: [np.zeros(0, ERRORS[key][0])] for key in list(ERRORS)[2:]}
        for start in range(0, len(arrays["ids"]), self.flow.batch_size):
            part = slice(start, start + self.flow.batch_size)
            z, labels = (torch.from_numpy(arrays[key][part].copy()) for key in ("z", "labels"))
            images = self.flow.decode(z, labels, noise_level=self.latents.noise_level)
            ids = arrays["ids"][part].tolist()
            pixels = torch.from_numpy(arrays["pixels"][part].copy())
            finite = torch.isfinite(images).flatten(1).all(dim=1)
            for number, image, good in zip(ids, images, finite.tolist()):
                if good:
                    save_png(picture(self.request.out, number), to_pixels(image))
            for key, values in self._errors(images, pixels, ids, finite).items():
                errors[key].append(values)
        joined = {key: np.concatenate(values) for key, values in errors.items()}
        write_chunk(self._chunk(name, path), {}, ids=arrays["ids"], labels=arrays["labels"], **joined)

    def _errors(self, images: Tensor, pixels: Tensor, ids: list[int], finite: Tensor) -> dict[str, NDArray[Any]]:
        """[n] each: against what was encoded, noise included, in model range; and against the picture, in grey levels."""
        noise = self.latents.noise
        off = images - (to_model_range(pixels) if noise is None else noise.settings.apply(pixels, ids))
        off = off.double().flatten(1)
        levels = (to_pixels(images.nan_to_num()).int() - pixels.int()).abs().flatten(1).amax(1)
        return {
            "max_error": off.abs().amax(1).numpy(), "rms_error": off.square().mean(1).sqrt().numpy(),
            "grey_levels": levels.long().where(finite, 255).numpy(),
        }  # fmt: skip

    def _write(self, path: Path) -> None:
        """The table first: the record says that all is there."""
        read = [read_chunk(self._chunk(name, self.work.path(name)), ERRORS)[0] for name in self.chunks]
        found = {key: np.concatenate([arrays[key] for arrays in read]) for key in ERRORS}
        columns = dict(who_is_who(found["ids"].tolist(), found["labels"].tolist(), lambda _: "", self.flow.classes))
        for key in ("max_error", "rms_error", *(["grey_levels"] if self.latents.noise is None else [])):
            columns[key] = found[key].tolist()
        table = write_table(self.request.out / f"decoded.{self.request.form}", columns)
        finite = np.isfinite(found["max_error"])
        summary = {**self.identity, "table": table.name, "decoded": len(finite), "nonfinite": int((~finite).sum())}
        if finite.any():
            worst = int(np.where(finite, found["max_error"], -1).argmax())
            summary |= {"max_error": float(found["max_error"][worst]), "worst": int(found["ids"][worst])}
            summary["rms_error"] = math.sqrt(math.fsum(found["rms_error"][finite] ** 2) / int(finite.sum()))
        source = self.flow.source
        summary |= {"origin": source.origin, "provenance": source.describe_provenance(), "code": code_version()}
        write_object(self.request.out / RECORD, summary)
        fill(path, "")
