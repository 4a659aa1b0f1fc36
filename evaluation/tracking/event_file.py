"""The evaluation's metrics and pictures for TensorBoard: one event file per run, whatever the number of workers.

It has a folder of its own, RUN/tensorboard/evaluation: TensorBoard reads the files of a folder one after the other and
never returns to one, so that a second file beside that of a running training would end the training's curves.
"""

import io
import os
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tarflow.files import make_folder, open_own, open_to_read
from tarflow.trainer.tracking.picture import NO_PICTURE, opened
from tarflow.trainer.tracking.tracker import Point, Tracker

FOLDER = "evaluation"
_LENGTH, _CHECKS = struct.Struct("<Q"), 8  # a record: length, two checksums of four bytes, data
_HEAD = struct.Struct("<QI")  # the length, and the first of the checksums, which is the length's


class EventFile(Tracker):
    """Appends the results of an evaluation to the event file of their run."""

    name, switch = "TensorBoard", "log.tensorboard=false turns it off"

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def log(self, point: Point) -> None:
        """Add a result."""
        values = {tag: value for tag, value in point.values.items() if value is not None}
        append_events(self._run_dir, point.images_seen, values, point.pictures, point.time)


def append_events(
    run_dir: Path, images_seen: int, scalars: Mapping[str, float], pictures: Mapping[str, Path], wall_time: float
) -> None:
    """Add scalars and PNG files, by tag, at a number of images seen. Missing and damaged pictures are skipped."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    for tag, path in pictures.items():
        with suppress(*NO_PICTURE):
            values.append(Summary.Value(tag=tag, image=_image(path)))
    path = _intact_file(run_dir / "tensorboard" / FOLDER)
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    if not path.exists():
        writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
    event = Event(wall_time=wall_time, step=images_seen, summary=Summary(value=values))
    writer.write(event.SerializeToString())
    descriptor = open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, buffer.getvalue())  # in one write: other workers append, too
    finally:
        os.close(descriptor)


def _image(path: Path) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    picture, buffer = opened(path), io.BytesIO()
    picture.save(buffer, "PNG")
    return Summary.Image(
        width=picture.width, height=picture.height, colorspace=len(picture.getbands()),
        encoded_image_string=buffer.getvalue(),
    )  # fmt: skip


def _intact_file(folder: Path) -> Path:
    """The newest event file, or the next one if a crash truncated it: no reader gets past a truncated record."""
    make_folder(folder.parent.parent, folder.parent.name, folder.name)
    number = 0
    while True:
        path = folder / f"events.out.tfevents.{number:010d}.{FOLDER}"
        if not os.path.lexists(path) or _is_intact(path):
            return path
        number += 1


def _is_intact(path: Path) -> bool:
    """Whether a file's records are complete up to its end. Each length has a checksum, which shows a damaged one."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    if path.is_symlink() or not path.is_file():
        return False
    size, end = path.stat().st_size, 0
    with open_to_read(path) as file:
        while end < size:
            file.seek(end)
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return False
            length, check = _HEAD.unpack(head)
            if check != masked_crc32c(head[:8]):
                return False
            end += _LENGTH.size + _CHECKS + length
    return end == size
