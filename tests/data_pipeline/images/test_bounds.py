"""Every format passes the bounds before its pixels are there; what a file claims of itself costs neither memory nor minutes."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images import bounds, opening
from tarflow.data_pipeline.images.decode import decode, decode_into
from tarflow.data_pipeline.images.formats import FORMATS
from tarflow.data_pipeline.images.look import look_at
from tarflow.data_pipeline.images.opening import read_image, size_of
from tarflow.data_pipeline.index.index import Rows
from tarflow.data_pipeline.loading.sample_reader import SampleReader
from tarflow.data_pipeline.loading.shape import ImageShape


def written(name: str, side: int) -> bytes:
    """An image of this format; of those that Pillow does not write, made by hand."""
    if name == "PSD":
        return b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, side, side, 8, 3) + bytes(14 + 3 * side * side)
    if name == "CUR":
        head = struct.pack("<IiiHHIIiiII", 40, side, 2 * side, 1, 24, 0, 0, 0, 0, 0, 0)
        bitmap = head + bytes(3 * side * side + side * side // 8)
        return struct.pack("<HHHBBBBHHII", 0, 2, 1, side, side, 0, 0, 0, 0, len(bitmap), 22) + bitmap
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, name, **({"sizes": [(side, side)]} if name == "ICO" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.case("H10")
def test_more_pixels_than_allowed_are_refused_before_they_are_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(name, 128)
    with Image.open(io.BytesIO(data)) as image:
        kind, (width, height) = type(image), image.size
    assert kind.format == name
    assert decode(data, 3, None, width * height).shape == (height, width, 3)
    loaded: list[bool] = []
    real = kind.load

    def load(self: ImageFile.ImageFile, *arguments: object) -> object:
        loaded.append(True)
        return real(self, *arguments)

    monkeypatch.setattr(kind, "load", load)
    with pytest.raises(
        BadSampleError, match=f"{width * height:,} pixels, and at most {width * height - 1:,}"
    ) as caught:
        decode(data, 3, None, width * height - 1)
    assert caught.value.cause == "too_large"
    assert not loaded or name == "ICO", "an icon, of 256 pixels at most, is loaded as it is opened"


def animated_webp(side: int) -> bytes:
    """A WebP of one small frame on a canvas of this side."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", lossless=True)
    still = buffer.getvalue()[12:]
    frame = bytes(6) + (7).to_bytes(3, "little") * 2 + bytes(4) + still
    canvas = b"\x02\0\0\0" + (side - 1).to_bytes(3, "little") * 2
    chunks = [(b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", frame)]
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(part)) + part + bytes(len(part) % 2) for name, part in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.case("H10")
def test_the_canvas_of_a_webp_is_not_made_before_its_size_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(animated_webp(64), 3).shape == (64, 64, 3)
    assert size_of(animated_webp(64)) == (64, 64)
    data = animated_webp(60_000)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(opening.Image, "open", never)
    with pytest.raises(BadSampleError, match="60000 x 60000"):
        decode(data, 3)
    assert look_at(data) is None
    assert size_of(data) == (60_000, 60_000)


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


@pytest.mark.case("H10")
def test_a_jpeg_of_thousands_of_scans_is_refused_at_once() -> None:
    data = many_scans(3000, 4000)
    assert len(data) < 64 << 20
    out = np.empty((3000, 3000, 3), dtype=np.uint8)
    began = time.process_time()
    assert not decode_into(data, out)
    with pytest.raises(BadSampleError, match=r"9,000,000 pixels has 4,010 scans") as caught:
        decode(data, 3)
    assert caught.value.cause == "too_large"
    assert time.process_time() - began < 2
    assert decode(many_scans(100, 0), 3).shape == (100, 100, 3)


@pytest.mark.case("H10")
def test_metadata_of_a_png_that_unpacks_to_much_costs_nothing() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    data = buffer.getvalue()

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    bomb = zlib.compress(bytes(64 << 20), 9)
    for extra in (
        chunk(b"zTXt", b"key\0\0" + bomb),
        chunk(b"iCCP", b"key\0\0" + bomb),
        chunk(b"iTXt", b"key\0\1\0\0\0" + bomb),
        chunk(b"eXIf", b"II*\0\x08\0\0\0" + b"\xff" * 65536),
    ):
        tracemalloc.start()
        assert (decode(data[:33] + extra + data[33:], 3) == (1, 2, 3)).all()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20


@pytest.mark.parametrize("name", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_many_frames_one_is_decoded(name: str) -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(5)]
    frames[0].save(
        buffer, name, save_all=True, append_images=frames[1:], **({"lossless": True} if name == "WEBP" else {})
    )
    pixels = decode(buffer.getvalue(), 3, None, 256)
    assert pixels.shape == (16, 16, 3)
    assert pixels.max() == 0


class _Files:
    def read(self, shard: int, offset: int, size: int) -> bytes:
        raise AssertionError("it was read")

    def close(self) -> None:
        pass


class _Index:
    root, num_samples = "a", 1
    shard_starts = np.array([0, 1])

    def rows(self, shard: int) -> Rows:
        return Rows(np.array([512]), np.array([bounds.MAX_BYTES + 1]), np.array([0]))

    def where(self, sample: int) -> str:
        return "shard a.tar, sample '0'"


@pytest.mark.case("H10")
def test_a_file_of_gigabytes_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(bounds.MAX_BYTES + 1)  # a hole
    with pytest.raises(BadSampleError, match="2,147,483,649 bytes, an image at most") as caught:
        read_image(path)
    assert caught.value.cause == "too_large"
    with pytest.raises(BadSampleError, match=r"a\.tar, sample '0': the file has 2,147,483,649 bytes"):
        SampleReader(_Index(), ImageShape(8), _Files()).read(0)  # type: ignore[arg-type]
