"""A folder of samples: exactly those requested, named by index, with the settings that made them.

    DIR/settings.json       every setting, the weights' hash, what is missing
    DIR/images/000000.png   sample 0; this folder holds nothing but samples
    DIR/grid.png            the first ones at a glance

Files are written atomically, so a killed run resumes where it was: only missing samples are drawn. A damaged or replaced
picture counts as missing: `settings.json` holds the checksum of every one. A folder made with other settings, with more
samples than requested, or holding other images is refused, never mixed.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.png_check import flaw_of_file
from tarflow.files import crc32, listed, make_folder, open_to_read, write_atomic
from tarflow.records import read_object, write_object
from tarflow.terminal import plain

_NAME = re.compile(r"(\d{6,})\.png")
# May differ between two calls that fill one folder: these do not change the images.
_FREE = ("num", "nonfinite", "missing", "complete", "provenance", "code", "crc32", "chosen")
_LIMIT = 1 << 30  # bytes of settings.json, which has a checksum for every picture


class SampleFolder:
    """Samples 0 .. num-1 of one model with fixed settings."""

    def __init__(
        self, root: Path, settings: dict[str, Any], num: int, shape: tuple[int, int, int] | None = None
    ) -> None:
        """Open or create the folder. Raises EvaluationError naming anything in it that does not belong to these settings.

        `shape`: (channels, height, width) of the images; None = any.
        """
        self.root, self.num, self.settings = root, num, settings
        self.images = root / "images"
        if root.exists() and not root.is_dir():
            raise EvaluationError(f"--out {root} is a file; give a directory")
        self._check_settings()
        self._check_names()
        self.damaged = self._damaged(shape)  # sample -> what is wrong with its file
        make_folder(root, self.images.name)
        kept = {name: value for name, value in self._sums.items() if name not in map(self._name, self.damaged)}
        self._write_settings([], kept, complete=False)

    def path(self, index: int) -> Path:
        """The path of sample `index`, existing or not."""
        return self.images / self._name(index)

    @staticmethod
    def _name(index: int) -> str:
        return f"{index:06d}.png"

    def missing(self, chosen: bool = False) -> list[int]:
        """Samples that are not there yet, ascending; if they are `chosen` among others, those of unknown choice, too."""
        there = {i for i in range(self.num) if i not in self.damaged and self.path(i).exists()}
        if chosen:
            there = {i for i in there if self._name(i) in self._chosen}
        return [i for i in range(self.num) if i not in there]

    def save(self, index: int, pixels: Tensor) -> None:
        """uint8 [C, H, W] -> its PNG."""
        save_png(self.path(index), pixels)
        self.damaged.pop(index, None)

    def finish(self, nonfinite: Sequence[int], chosen: dict[int, Any] | None = None) -> None:
        """Record completion and the non-finite samples; damaged files of those are removed.

        `chosen`: what is recorded of samples that were chosen among others; that of earlier calls stays.
        """
        self._chosen |= {self._name(index): value for index, value in (chosen or {}).items()}
        for index in set(nonfinite) & self.damaged.keys():
            self.path(index).unlink(missing_ok=True)
        there = [path for i in range(self.num) if (path := self.path(i)).exists()]
        self._write_settings(nonfinite, {path.name: crc32(path) for path in there}, complete=True)

    def _write_settings(self, nonfinite: Sequence[int], sums: dict[str, int], complete: bool) -> None:
        state = {"num": self.num, "complete": complete, "nonfinite": list(nonfinite), "crc32": sums}
        if self._chosen:
            state["chosen"] = self._chosen
        write_object(self.root / "settings.json", self.settings | state)

    def _check_settings(self) -> None:
        path = self.root / "settings.json"
        self._sums: dict[str, int] = {}  # checksums of the pictures as they were written
        self._chosen: dict[str, Any] = {}  # of samples that were chosen among others
        if not os.path.lexists(path):
            if self.root.exists() and any(self.root.iterdir()):
                raise EvaluationError(
                    f"--out {self.root} is not empty and not a folder of samples (no settings.json); give a new directory"
                )
            return
        stored = read_object(path, what="settings of samples", way_out="give a new --out directory", limit=_LIMIT)
        if isinstance(sums := stored.get("crc32"), dict):
            self._sums = sums
        if isinstance(chosen := stored.get("chosen"), dict):
            self._chosen = chosen

        # Compared as JSON stores them: a tuple comes back as a list.
        there = {k: v for k, v in stored.items() if k not in _FREE}
        asked = {k: v for k, v in json.loads(json.dumps(self.settings)).items() if k not in _FREE}
        differ = [
            f"{k}: {plain(repr(there.get(k)))} there, {asked.get(k)!r} asked"
            for k in asked | there
            if there.get(k) != asked.get(k)
        ]
        if differ:
            raise EvaluationError(
                f"--out {self.root} holds samples drawn with other settings ({'; '.join(differ)}); "
                "give a new directory, or the same settings to add what is missing"
            )

    def _damaged(self, shape: tuple[int, int, int] | None) -> dict[int, str]:
        there = [index for index in range(self.num) if self.path(index).exists()]
        flaws = {index: flaw_of_file(self.path(index), shape) or self._other(self.path(index)) for index in there}
        return {index: flaw for index, flaw in flaws.items() if flaw}

    def _other(self, path: Path) -> str | None:
        known = self._sums.get(path.name)
        return None if known in (None, crc32(path)) else "not the picture that was drawn"

    def _check_names(self) -> None:
        for path in listed(self.images):
            match = _NAME.fullmatch(path.name)
            if path.name.startswith(".") and path.name.endswith(".tmp"):
                path.unlink()  # a killed run's half-written image
            elif match is None:
                raise EvaluationError(
                    f"--out {self.root} holds {path.name}, which is not a sample; give a new directory"
                )
            elif int(match[1]) >= self.num:
                raise EvaluationError(
                    f"--out {self.root} already holds sample {int(match[1])}, beyond the {self.num} requested; "
                    f"ask for --num {int(match[1]) + 1} or more, or give a new directory"
                )


def save_png(path: Path, pixels: Tensor) -> None:
    """Write uint8 [C, H, W] (C = 1 or 3) as a PNG, atomically."""
    write_atomic(path, lambda temporary: to_picture(pixels).save(temporary, "PNG"))


def to_picture(pixels: Tensor) -> Image.Image:
    """uint8 [C, H, W], C = 1 or 3 -> a picture."""
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def load_png(path: Path) -> Tensor:
    """Read what `save_png` wrote, as uint8 [C, H, W]."""
    with open_to_read(path) as file:
        return from_png(file)


def from_png(file: BinaryIO) -> Tensor:
    """The same from an open file."""
    import torch

    array = np.array(Image.open(file, formats=["PNG"]))
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
