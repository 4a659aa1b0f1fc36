"""`tarflow likelihood`: the likelihoods of all images, by any number of processes together.

    OUT/likelihood.json      what was measured under which settings, mean and quantiles; written last
    OUT/likelihood.parquet   a row per image (or .csv)
    OUT/likelihood.html      histogram, blocks, the most and the least likely images
    OUT/likelihood.most.png  those images as grids, for the report of the run; and likelihood.least.png
    OUT/work/                chunks, until the table is written

A chunk's numbers follow from the settings alone, so the files are the same for any number of processes.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tarflow.code_version import code_version
from tarflow.evaluation.batches import named_cause
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.likelihood.extremes import Extremes
from tarflow.evaluation.likelihood.files import BINS, columns_of, write_page, write_table
from tarflow.evaluation.likelihood.images import Images, open_images
from tarflow.evaluation.likelihood.out_folder import refuse_other_files, refuse_others
from tarflow.evaluation.likelihood.per_image import ImageLikelihoods, likelihoods
from tarflow.evaluation.log import Log
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings
from tarflow.evaluation.report.likelihoods import headline
from tarflow.evaluation.result_file import LIKELIHOOD_PICTURES, LikelihoodFile
from tarflow.evaluation.samples.grid import make_grid
from tarflow.evaluation.samples.png_folder import save_png
from tarflow.evaluation.samples.request import SourceRequest, batches_of, open_request
from tarflow.evaluation.samples.weights_source import WeightsSource
from tarflow.evaluation.shared_work import SharedWork
from tarflow.evaluation.worker.chunk_file import Chunk, Form, is_valid, read_chunk, write_chunk
from tarflow.files import check_writable, fill
from tarflow.models.float32 import TRUE_FLOAT32
from tarflow.records import load_record, write_object

FORMAT, CHUNK, LEASE_S = 1, 256, 120.0
FORM: Form = {
    "ids": (np.int64, "n"), "labels": (np.int64, "n"), "bits": (np.float64, "n k"), "parts": (np.float64, "n b"),
    "extremes": (np.int64, "e"), "pixels": (np.uint8, "e * * *"),
}  # fmt: skip
COLUMNS = 6  # of the grids
SHOWN = 12  # most and least likely images on the page, each


@dataclass(kw_only=True)
class LikelihoodRequest(SourceRequest):
    """Which images to measure, and where to write."""

    measures: ClassVar[bool] = True
    data: Path
    out: Path
    form: str = "parquet"  # of the table: or csv
    num: int = 0  # images, 0 = all
    draws: int = 1  # of the noise, per image
    seed: int | None = None  # of the noise; None: that of the sampling settings, as evaluations have it


def measure_likelihoods(request: LikelihoodRequest, log: Log = print) -> dict[str, Any]:
    """Measure, and write the files; the summary. Raises EvaluationError where OUT holds something else."""
    label, request.labels = request.labels, None
    source, sampling, batch_size = open_request(request, log)
    seed = sampling.settings.seed if request.seed is None else request.seed
    level = request.settings.get("noise_std") if source.told else None
    noise = source.training_noise(sampling.noise_std, seed, request.draws, level)
    images = open_images(request.data, source, request.num, label, log)
    identity = {
        "format": FORMAT, **source.describe(), "noise": noise.describe(), "images": images.provenance(), "form": request.form,
    }  # fmt: skip
    summary = request.out / "likelihood.json"
    log(
        f"{images.num_images:,} images of {request.data}, weights {source.weights} of {source.origin}, {noise.describe()}"
    )
    # The same request again only shows what is there; another one refuses the folder.
    if not _there(summary, identity):
        refuse_other_files(request.out, "likelihood.")
        check_writable(request.out if request.out.is_dir() else request.out.parent)
        with named_cause("likelihood", source.model.var.device):
            _Measurement(request, source, noise, images, identity, batch_size, log).run()
    result = load_record(summary, LikelihoodFile)
    log(headline(result.model_dump()).replace("±", "+-"))
    log(f"table: {request.out / result.table}\npage: {request.out / 'likelihood.html'}")
    return result.model_dump()


def _there(summary: Path, identity: dict[str, Any]) -> bool:
    """Whether OUT holds this very measurement, complete. Raises EvaluationError where it holds another one."""
    if not summary.is_file():
        return False
    found = load_record(summary, LikelihoodFile)
    if not (summary.parent / found.table).is_file():
        raise EvaluationError(
            f"--out {summary.parent}: its {summary.name} is there, but {found.table} is not: give another folder"
        )
    refuse_others(summary.parent, "likelihoods", found.model_dump(), identity)
    return True


@dataclass
class _Measurement:
    request: LikelihoodRequest
    source: WeightsSource
    noise: NoiseSettings
    images: Images
    identity: dict[str, Any]
    batch_size: int
    log: Log

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.model.config.image_shape

    def run(self) -> None:
        """Help until the summary is there, by any process."""
        self.parts = max(1, -(-self.images.num_images // CHUNK))
        self.memory = batches_of(self.request, self.source, self.log)
        self.chunks = {f"likelihood-{part:06d}": part for part in range(self.parts)}
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        plan = {"batch_size": self.batch_size, "chunks": self.parts}
        self.work = SharedWork(self.request.out / "work" / digest, plan, LEASE_S)
        is_over: Callable[[], bool] = (self.request.out / "likelihood.json").is_file
        for name in self.work.give_back(list(self.chunks), lambda path: is_valid(self._chunk(path.name, path), FORM)):
            self.log(f"  {self.work.path(name)} is damaged and computed again")
        if self.work.work_through(list(self.chunks), self._compute, is_over):
            self.work.work_through(["written"], lambda _name, path: self._write(path), is_over)
        self.work.remove()

    def _chunk(self, name: str, path: Path) -> Chunk:
        return Chunk(path, {**self.identity, "chunk": name, "of": self.parts})

    def _compute(self, name: str, path: Path) -> None:
        batches = self.images.batches(int(self.work.plan["batch_size"]), self.chunks[name], self.parts)
        found, extremes = [], Extremes(SHOWN)
        for batch in batches:
            found.append(likelihoods(self.source.model, [batch], self.noise, self.memory))
            extremes.add(found[-1], batch[0].numpy())
        arrays = vars(ImageLikelihoods.joined(found)) | {
            "extremes": extremes.numbers,
            "pixels": extremes.stacked(self.shape),
        }
        write_chunk(self._chunk(name, path), {}, **arrays)

    def _write(self, path: Path) -> None:
        """Table and page first: the summary says that both are there."""
        parts, extremes = [], Extremes(SHOWN)
        for name in self.chunks:
            arrays, _ = read_chunk(self._chunk(name, self.work.path(name)), FORM)
            numbers, pixels = arrays.pop("extremes"), arrays.pop("pixels")
            parts.append(ImageLikelihoods(**arrays))
            extremes.add(parts[-1].only(numbers), pixels)
        found = ImageLikelihoods.joined(parts)
        if not len(found.ids):
            raise EvaluationError(f"{self.request.data} holds no images")
        dims, classes = math.prod(self.shape), self.source.provenance.classes
        columns = columns_of(found, self.images.name, dims, self.noise.kind == "uniform", classes)
        table = write_table(self.request.out / f"likelihood.{self.request.form}", columns)
        summary = {**self.identity, **_summary(found, self.noise, dims), "table": table.name}
        summary |= {"data": str(self.request.data), "origin": self.source.origin, "code": code_version()}
        summary["float32"] = TRUE_FLOAT32
        summary["provenance"] = self.source.describe_provenance()
        summary |= self._pictures(found, extremes)
        write_page(self.request.out / "likelihood.html", found, extremes.pictures, summary)
        write_object(self.request.out / "likelihood.json", summary)
        fill(path, "")

    def _pictures(self, found: ImageLikelihoods, extremes: Extremes) -> dict[str, list[tuple[int, float]]]:
        """Write the grids of both ends, likeliest or least likely first; what the summary says of them."""
        bits, shown = dict(zip(found.ids.tolist(), found.mean.tolist())), extremes.pictures
        ordered = [(int(number), bits[number]) for number in extremes.numbers.tolist()]
        half = len(ordered) // 2
        ranked = {"most": ordered[:half] or ordered, "least": ordered[::-1][:half]}
        for end, name in LIKELIHOOD_PICTURES.items():
            if ranked[end]:
                grid = make_grid([shown[number] for number, _ in ranked[end]], min(COLUMNS, len(ranked[end])))
                save_png(self.request.out / name, grid)
        return {f"{end}_likely": numbers for end, numbers in ranked.items()}


def _summary(found: ImageLikelihoods, noise: NoiseSettings, dims: int) -> dict[str, Any]:
    """Mean and quantiles of the images whose likelihood is finite, and how many are not."""
    every = found.mean
    finite = np.isfinite(every)
    bits = every[finite]
    about: dict[str, Any] = {"measured": len(every), "nonfinite": int((~finite).sum()), "bits_per_dim": None}
    if not len(bits):
        return about
    about["bits_per_dim"] = float(bits.mean())
    about["stderr"] = float(bits.std(ddof=1) / np.sqrt(len(bits))) if len(bits) > 1 else None
    about["log_prob"] = float((7 - bits).mean() * dims * np.log(2))
    quantiles = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    about["quantiles"] = {f"{q:g}": float(value) for q, value in zip(quantiles, np.quantile(bits, quantiles))}
    counts, edges = np.histogram(bits, bins=min(BINS, len(bits)))
    about["histogram"] = {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
    about["parts"] = dict(zip(part_names(found), found.parts[finite].mean(axis=0).tolist()))
    if noise.kind == "uniform":
        about["importance_weighted"] = float(found.importance_weighted(dims)[finite].mean())
    return about


def part_names(found: ImageLikelihoods) -> list[str]:
    """Names of the columns of `parts`."""
    return ["prior", *(f"block_{number}" for number in range(found.parts.shape[1] - 1))]
