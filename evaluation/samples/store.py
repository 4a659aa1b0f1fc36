"""Stores the samples of an evaluation as WebDataset shards, also with one array of all, or as PNGs.

    SAMPLES/settings.json                       the weights' hash and every setting that determines the images
    SAMPLES/samples-00000000-00000999.tar       shards: 00000123.png and, with a label, 00000123.cls
    SAMPLES/samples.npz                         `npz`: shards, and in the end all samples as one array
    SAMPLES/samples-00000000-00000999.json      PNGs: marks this range as done; the images are in SAMPLES/images/

A file's name is the range of samples that were drawn for it, so names alone tell what is missing: the same command adds
that and no more, also when it asks for more samples than before. Samples that are not finite are in no file; in the end
`settings.json` lists them. Exactly the requested number of samples is covered, or it is an error. Incomplete files are
reported, removed and drawn again.
"""

import hashlib
import io
import json
import os
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.draw import Drawn, Sampler
from tarflow.evaluation.samples.png_folder import to_picture
from tarflow.evaluation.samples.store_check import Shape
from tarflow.evaluation.samples.store_files import ARRAY, RANGE_NAME, SETTINGS, load_settings
from tarflow.evaluation.samples.store_formats import FORMATS, Encoded, write_samples
from tarflow.evaluation.samples.weights_source import WeightsSource
from tarflow.evaluation.shared_work import SharedWork
from tarflow.files import listed, make_folder
from tarflow.records import DamagedFileError, write_object
from tarflow.trainer.checkpoint.names import leading_name

_OURS = re.compile(r"settings\.json|samples\.npz|images|index|\..*")  # users may add an index of the shards


class SampleStore:
    """Stores samples 0 .. num-1 of one model with fixed settings, drawn by any number of workers."""

    def __init__(
        self, folder: Path, kind: str, about: dict[str, Any], num: int, shape: Shape | None = None, log: Log = print
    ) -> None:
        """Open or create the folder. Raises EvaluationError naming anything in it that does not belong there.

        `shape`: (channels, height, width) of the images; None = any.
        """
        self.folder, self.format, self.num = folder, FORMATS[kind], num
        self.about = json.loads(json.dumps({"kind": kind, **about}))
        self.shape, self.log = shape, log
        self._waiting: dict[int, Encoded] = {}
        self._remove_damaged(self._check(), shape, log)
        make_folder(folder.parent.parent, folder.parent.name, folder.name)
        if not os.path.lexists(folder / SETTINGS):
            write_object(folder / SETTINGS, self.about)

    @classmethod
    def of(
        cls, kind: str, root: Path, source: WeightsSource, sampler: Sampler, num: int, log: Log = print
    ) -> "SampleStore | None":
        """The store of these weights and settings below ROOT/samples/; None if `kind` is empty: nothing is stored."""
        if not kind:
            return None
        about = source.describe() | {"sampling": sampler.sampling.describe()}
        folder = _folder(root, kind, about, source.checkpoint)
        return cls(folder, kind, about, num, source.model.config.image_shape, log)

    @staticmethod
    def complete_for(kind: str, root: Path, result: dict[str, Any]) -> bool:
        """Whether all samples of a result are stored, with the sizes that they were written with."""
        about = {key: result[key] for key in ("weights", "weights_sha256", "step", "images_seen")}
        folder = _folder(root, kind, about | {"sampling": result["settings"]["sampling"]}, leading_name(result["name"]))
        try:
            state = load_settings(folder)
            whole = all((folder / name).stat().st_size == size for name, size in state["files"].items())
            stamp = (folder / SETTINGS).stat().st_mtime_ns
            pictures = state["picture_bytes"]
            whole = whole and (not pictures or _picture_bytes_once(folder, stamp) == pictures)
            whole = whole and (not FORMATS[kind].array or (folder / ARRAY).stat().st_size == state["array_bytes"])
            return bool(whole and state["num"] >= result["samples"]["asked"])
        except (OSError, DamagedFileError):  # opening the store to complete it will report what is wrong
            return False

    def missing(self, within: range | None = None) -> list[range]:
        """Ranges of samples that no file covers, ascending."""
        wanted = range(self.num) if within is None else within
        gaps, start = [], wanted.start
        for covered in self._covered():
            if covered.start > start:
                gaps.append(range(start, min(covered.start, wanted.stop)))
            start = max(start, covered.stop)
        return [gap for gap in [*gaps, range(start, wanted.stop)] if len(gap)]

    def add(self, drawn: Drawn) -> None:
        """Buffer a batch until `flush`."""
        labels = drawn.labels[drawn.finite].tolist()
        for index, pixels, label in zip(drawn.finite_indices(), drawn.pixels(), labels):
            buffer = io.BytesIO()
            to_picture(pixels).save(buffer, "PNG")
            self._waiting[index] = Encoded(buffer.getvalue(), label)

    def flush(self, indices: range) -> None:
        """Write the buffered samples of this range, all of which were drawn; existing files are left as they are."""
        for gap in self.missing(indices):
            path = self.folder / f"samples-{gap.start:08d}-{gap.stop - 1:08d}{self.format.suffix}"
            self.format.write(path, {index: self._waiting[index] for index in gap if index in self._waiting})
        self._waiting.clear()

    def complete(self, sampler: Sampler, batch_size: int, chunk: int, lease_s: float) -> None:
        """Draw what is missing, together with any other workers, and record completion."""
        work = SharedWork(self.folder / ".work", {}, lease_s)
        pieces = {
            f"{start}-{min(start + chunk, gap.stop)}": range(start, min(start + chunk, gap.stop))
            for gap in self.missing()
            for start in range(gap.start, gap.stop, chunk)
        }

        def draw(name: str, path: Path) -> None:
            for drawn in sampler.draw_all(pieces[name], batch_size):
                self.add(drawn)
            self.flush(pieces[name])
            path.touch()

        work.work_through(list(pieces), draw, over=lambda: not self.missing())

        # Recorded only when no range is missing, by every worker that finds it so: all of them write the same.
        if not self.missing():
            stored = set(self.format.stored(self.folder))
            lost = [i for i in range(self.num) if i not in stored]
            state = {"num": self.num, "images": len(stored), "nonfinite": lost}
            state |= {"files": _sizes(self.folder), "picture_bytes": _picture_bytes(self.folder)}
            if self.format.array:
                state["array_bytes"] = self._write_array(work, len(stored))
            write_object(self.folder / SETTINGS, self.about | state)
            work.remove()

    def _write_array(self, work: SharedWork, number: int) -> int:
        """Make the array of all samples from the ranges, one worker for all; its size in bytes."""
        path, sizes = self.folder / ARRAY, _sizes(self.folder)
        known = load_settings(self.folder)
        if known["files"] == sizes and path.is_file() and path.stat().st_size == known["array_bytes"]:
            return int(known["array_bytes"])
        assert self.shape is not None
        shape = self.shape

        def write(_name: str, place: Path) -> None:
            write_samples(place, self.folder, number, shape)  # in the folder of the work: a kill leaves nothing here
            os.replace(place, path)
            place.touch()

        # Named after the ranges: what an interrupted command made of fewer samples does not count.
        unit = f"array-{zlib.crc32(json.dumps(sizes, sort_keys=True).encode()):08x}"
        work.give_back([unit], lambda _: path.is_file())
        work.work_through([unit], write)
        self.log(f"array: {path} (arr_0, uint8 [{number}, {shape[1]}, {shape[2]}, 3])")
        return path.stat().st_size

    def _covered(self) -> list[range]:
        names = (RANGE_NAME.fullmatch(path.name) for path in listed(self.folder))
        return sorted((range(int(n[1]), int(n[2]) + 1) for n in names if n), key=lambda r: (r.start, r.stop))

    def _remove_damaged(self, sizes: dict[str, int], shape: Shape | None, log: Log) -> None:
        """Remove incomplete files: their samples are then missing, and so they are drawn again."""
        for path, reason in self.format.damaged(self.folder, sizes, shape).items():
            if path.parent == self.folder:
                log(f"samples in {path} are drawn again: {reason}")
            path.unlink(missing_ok=True)

    def _check(self) -> dict[str, int]:
        """Raise EvaluationError for what does not belong here; returns bytes of the files recorded as complete, by name."""
        for path in listed(self.folder):
            match = RANGE_NAME.fullmatch(path.name)
            if match is None and not _OURS.fullmatch(path.name):
                raise EvaluationError(f"{self.folder} holds {path.name}, which no evaluation wrote; move it away")
            if match and int(match[2]) >= self.num:
                raise EvaluationError(
                    f"{self.folder} holds samples up to {int(match[2])}, beyond the {self.num} requested: set "
                    f"evaluation.num_samples={int(match[2]) + 1} or more, or move the folder away"
                )
        try:
            stored = load_settings(self.folder)
        except FileNotFoundError:
            return {}
        differ = [key for key, value in self.about.items() if stored.get(key) != value]
        if differ:
            raise EvaluationError(f"{self.folder} holds samples drawn with other {', '.join(differ)}; move it away")
        sizes: dict[str, int] = stored["files"]
        return sizes


def _folder(root: Path, kind: str, about: dict[str, Any], checkpoint: str | None) -> Path:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return root / "samples" / f"{checkpoint or 'weights'}-{digest}-{kind}"


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files that cover ranges of samples, by name."""
    return {path.name: path.stat().st_size for path in listed(folder) if RANGE_NAME.fullmatch(path.name)}


def _picture_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in listed(folder / "images"))


@cache
def _picture_bytes_once(folder: Path, stamp: int) -> int:  # noqa: ARG001  (a key of the cache)
    """`_picture_bytes`, counted once per completion (`stamp`): a worker that follows a run asks every few seconds."""
    return _picture_bytes(folder)
