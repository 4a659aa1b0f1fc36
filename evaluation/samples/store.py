"""The samples of an evaluation, kept: WebDataset shards or PNGs (case S02).

    SAMPLES/settings.json                       the weights' hash and every setting that decides the images
    SAMPLES/samples-00000000-00000999.tar       shards: 00000123.png and, with a label, 00000123.cls
    SAMPLES/samples-00000000-00000999.json      PNGs: that this stretch is done; the images lie in SAMPLES/images/

A file's name says which samples were drawn for it. So what is missing is known from names: the same command adds that and
no more, also when more samples are asked for than there were. Samples that are not finite are in no file, and
`settings.json` names them in the end. The number of samples asked for is exactly covered, or it is an error. Files that
are no longer whole are removed, said, and drawn again.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import Drawn, Sampler
from tarflow.evaluation.samples.png_folder import to_picture
from tarflow.evaluation.samples.store_check import Shape, damaged_pictures, damaged_shards
from tarflow.evaluation.samples.store_files import SETTINGS, STRETCH, Note, load_settings
from tarflow.evaluation.samples.weights_source import WeightsSource
from tarflow.evaluation.shared_work import SharedWork
from tarflow.files import create_empty, listed, make_folder, put_once, write_new
from tarflow.leases import unique_name
from tarflow.records import DamagedFileError, save_record, write_object
from tarflow.trainer.checkpoint.names import leading_name

Say = Callable[[str], None]
KINDS = {"shards": "tar", "png": "json"}
_PICTURE = re.compile(r"\d{8,18}\.png")
_OURS = re.compile(r"settings\.json|images|index|\..*")  # an index of the shards is welcome


class SampleStore:
    """Keeps the samples 0 .. num-1 of one model under one group of settings, whoever draws them."""

    def __init__(
        self, folder: Path, kind: str, about: dict[str, Any], num: int, shape: Shape | None = None, say: Say = print
    ) -> None:
        """Open or make the folder. Anything in it that does not belong there is an error that names it.

        `shape`: (channels, height, width) of the images; None: any.
        """
        self.folder, self.kind, self.num = folder, kind, num
        self.about = json.loads(json.dumps({"kind": kind, **about}))
        self._waiting: dict[int, tuple[bytes, int]] = {}
        self._check()
        self._remove_damaged(shape, say)
        make_folder(folder.parent.parent, folder.parent.name, folder.name)
        if not os.path.lexists(folder / SETTINGS):
            write_object(folder / SETTINGS, self.about)

    @classmethod
    def of(
        cls, kind: str, root: Path, source: WeightsSource, sampler: Sampler, num: int, say: Say = print
    ) -> "SampleStore | None":
        """Under ROOT/samples/, in a folder of their own for these weights and settings; None where nothing is kept."""
        if not kind:
            return None
        about = source.describe() | {"sampling": sampler.sampling.describe()}
        folder = _folder(root, kind, about, source.checkpoint)
        return cls(folder, kind, about, num, source.model.config.image_shape, say)

    @staticmethod
    def complete_for(kind: str, root: Path, result: dict[str, Any]) -> bool:
        """Whether the samples of a result lie there, all of them and with the sizes that they were written with."""
        about = {key: result[key] for key in ("weights", "weights_sha256", "step", "images_seen")}
        folder = _folder(root, kind, about | {"sampling": result["settings"]["sampling"]}, leading_name(result["name"]))
        try:
            state = load_settings(folder)
            whole = all((folder / name).stat().st_size == size for name, size in state["files"].items())
            stamp = (folder / SETTINGS).stat().st_mtime_ns
            pictures = state["picture_bytes"]
            whole = whole and (not pictures or _picture_bytes_once(folder, stamp) == pictures)
            return bool(whole and state["num"] >= result["samples"]["asked"])
        except (OSError, DamagedFileError):  # whoever opens it to complete it says what is wrong
            return False

    def missing(self, within: range | None = None) -> list[range]:
        """Stretches of samples that no file covers, ascending."""
        wanted = range(self.num) if within is None else within
        gaps, start = [], wanted.start
        for covered in self._covered():
            if covered.start > start:
                gaps.append(range(start, min(covered.start, wanted.stop)))
            start = max(start, covered.stop)
        return [gap for gap in [*gaps, range(start, wanted.stop)] if len(gap)]

    def add(self, drawn: Drawn) -> None:
        """Hold a batch until `flush`."""
        labels = drawn.labels[drawn.finite].tolist()
        for index, pixels, label in zip(drawn.finite_indices(), drawn.pixels(), labels):
            buffer = io.BytesIO()
            to_picture(pixels).save(buffer, "PNG")
            self._waiting[index] = (buffer.getvalue(), label)

    def flush(self, indices: range) -> None:
        """Write what was held of these samples, all of which were drawn; what is there already stays as it is."""
        for gap in self.missing(indices):
            write = self._write_shard if self.kind == "shards" else self._write_images
            write(gap, self.folder / f"samples-{gap.start:08d}-{gap.stop - 1:08d}.{KINDS[self.kind]}")
        self._waiting.clear()

    def complete(self, sampler: Sampler, batch_size: int, chunk: int, lease_s: float) -> None:
        """Draw what is missing, shared with whoever else is at it, and record that all is there."""
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
        if not self.missing():
            there = set(self._indices())
            lost = [i for i in range(self.num) if i not in there]
            state = {"num": self.num, "images": len(there), "nonfinite": lost}
            state |= {"files": _sizes(self.folder), "picture_bytes": _picture_bytes(self.folder)}
            write_object(self.folder / SETTINGS, self.about | state)
            work.remove()

    # --- files -----------------------------------------------------------------------------------------------------

    def _write_shard(self, indices: range, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.{unique_name()}.tmp")
        try:
            create_empty(temporary)
            with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as shard:
                for index in indices:
                    if index in self._waiting:
                        image, label = self._waiting[index]
                        _member(shard, f"{index:08d}.png", image)
                        if label >= 0:
                            _member(shard, f"{index:08d}.cls", str(label).encode())
            put_once(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_images(self, indices: range, path: Path) -> None:
        images = make_folder(self.folder, "images")
        for index in indices:
            if index in self._waiting:
                temporary = self.folder / f".{index}.{unique_name()}.tmp"
                write_new(temporary, self._waiting[index][0])
                put_once(temporary, images / f"{index:08d}.png")
        labels = {str(index): self._waiting[index][1] for index in indices if index in self._waiting}
        sizes = {index: (images / f"{int(index):08d}.png").stat().st_size for index in labels}
        temporary = path.with_name(f".{path.name}.{unique_name()}.tmp")
        save_record(temporary, Note.model_validate({"labels": labels, "sizes": sizes}))
        put_once(temporary, path)

    def _covered(self) -> list[range]:
        names = (STRETCH.fullmatch(path.name) for path in listed(self.folder))
        return sorted((range(int(n[1]), int(n[2]) + 1) for n in names if n), key=lambda r: (r.start, r.stop))

    def _indices(self) -> Iterator[int]:
        """Every sample that lies here, by reading what there is."""
        if self.kind == "png":
            yield from _numbers(path.name for path in listed(self.folder / "images", "*.png"))
            return
        for path in listed(self.folder, "samples-*.tar"):
            try:
                with tarfile.open(path, "r:") as shard:
                    yield from _numbers(shard.getnames())
            except tarfile.TarError as error:
                raise DamagedFileError(path, str(error), "remove it, and its samples are drawn again") from None

    def _remove_damaged(self, shape: Shape | None, say: Say) -> None:
        """What is removed is missing, and so it is drawn again."""
        if self.kind == "shards":
            damaged = damaged_shards(self.folder, self._complete_sizes, shape)
        else:
            damaged = damaged_pictures(self.folder, self._complete_sizes, shape)
        for path, reason in damaged.items():
            if path.parent == self.folder:
                say(f"samples in {path} are drawn again: {reason}")
            path.unlink(missing_ok=True)

    def _check(self) -> None:
        for path in listed(self.folder):
            match = STRETCH.fullmatch(path.name)
            if match is None and not _OURS.fullmatch(path.name):
                raise EvaluationError(f"{self.folder} holds {path.name}, which no evaluation put there; move it away")
            if match and int(match[2]) >= self.num:
                raise EvaluationError(
                    f"{self.folder} holds samples up to {int(match[2])}, beyond the {self.num} asked for: set "
                    f"evaluation.num_samples={int(match[2]) + 1} or more, or move the folder away"
                )
        self._complete_sizes: dict[str, int] = {}
        try:
            there = load_settings(self.folder)
        except FileNotFoundError:
            return
        self._complete_sizes = there["files"]
        differ = [key for key, value in self.about.items() if there.get(key) != value]
        if differ:
            raise EvaluationError(f"{self.folder} holds samples drawn with other {', '.join(differ)}; move it away")


def _folder(root: Path, kind: str, about: dict[str, Any], checkpoint: str | None) -> Path:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return root / "samples" / f"{checkpoint or 'weights'}-{digest}-{kind}"


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files that say which samples lie here, by name."""
    return {path.name: path.stat().st_size for path in listed(folder) if STRETCH.fullmatch(path.name)}


def _numbers(names: Iterable[str]) -> Iterator[int]:
    """The samples that pictures hold, by their names; of another name is none of ours."""
    return (int(name[:-4]) for name in names if _PICTURE.fullmatch(name))


def _picture_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in listed(folder / "images"))


@cache
def _picture_bytes_once(folder: Path, stamp: int) -> int:
    """The same, counted once for every completion: who follows a run asks every few seconds."""
    return _picture_bytes(folder)


def _member(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    shard.addfile(info, io.BytesIO(content))
