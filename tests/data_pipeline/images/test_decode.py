"""Odd image encodings through the one decoder, and the square and the flip that follow."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.decode import decode, from_pixels
from tarflow.data_pipeline.images.transform import fit, flips
from tarflow.errors import UserError


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours, like a photograph."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.case("D08")
def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 512).astype(np.uint16)[None].repeat(4, 0)
    for channels in (1, 3):
        image = decode(encoded(Image.fromarray(ramp), "PNG"), channels)
        assert image.shape == (4, 512, channels)
        row = image[0, :, 0].astype(int)
        assert (np.diff(row) >= 0).all()
        assert len(set(row.tolist())) >= 200
        assert (row[0], row[-1]) == (0, 255)
        assert np.abs(row - np.linspace(0, 255, 512)).max() <= 0.51


@pytest.mark.case("D08")
def test_sixteen_bit_colour_keeps_its_levels() -> None:
    """A hand-made 16-bit RGB PNG: Pillow cannot write one."""
    import zlib

    ramp = np.linspace(0, 65535, 256).astype(">u2")
    line = b"\0" + np.stack([ramp, ramp[::-1], ramp], axis=1).tobytes()
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 256, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(line)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    image = decode(data, 3)
    assert image.shape == (1, 256, 3)
    assert (np.diff(image[0, :, 0].astype(int)) >= 0).all()
    assert len(set(image[0, :, 0].tolist())) >= 200


@pytest.mark.case("D08")
def test_cmyk_is_converted() -> None:
    image = decode(encoded(Image.new("CMYK", (20, 10), (0, 255, 255, 0)), "JPEG"), 3)
    assert image.shape == (10, 20, 3)
    assert np.abs(image.astype(int) - [254, 0, 0]).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P with RGBA palette", "RGB keyed", "WEBP", "1 keyed"])
@pytest.mark.case("D08")
def test_transparency_is_composited_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (2, 0, 4, 2))
    if mode == "LA":
        data = encoded(image.convert("LA"), "PNG")
    elif mode == "P":
        flat = Image.new("P", (4, 2), 0)
        flat.putpalette([255, 0, 0, 0, 0, 255])
        flat.paste(1, (2, 0, 4, 2))
        data = encoded(flat, "PNG", transparency=0)
    elif mode == "P with RGBA palette":
        data = encoded(image.quantize(4), "PNG")
    elif mode == "RGB keyed":
        data = encoded(image.convert("RGB"), "PNG", transparency=(255, 0, 0))
    elif mode == "1 keyed":
        bits = Image.new("1", (4, 2), 1)
        bits.paste(0, (2, 0, 4, 2))
        data = encoded(bits, "PNG", transparency=1)
    elif mode == "WEBP":
        data = encoded(image, "WEBP", lossless=True, exact=True)
    else:
        data = encoded(image, "PNG")
    pixels = decode(data, 3)
    assert (pixels[:, :2] == 255).all(), "what is fully transparent must be white"
    opaque = {"LA": [29, 29, 29], "1 keyed": [0, 0, 0]}.get(mode, [0, 0, 255])
    assert np.abs(pixels[:, 2:].astype(int) - opaque).max() <= 1
    assert (decode(data, 1)[:, :2] == 255).all()


@pytest.mark.case("D08")
def test_half_transparency_is_blended() -> None:
    half = decode(encoded(Image.new("RGBA", (2, 2), (0, 100, 255, 128)), "PNG"), 3)
    assert half[0, 0].tolist() == [127, 177, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.case("D08")
def test_exif_orientation_is_applied_on_every_path(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(picture(20, 10), format, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    image = decode(data, 3)
    assert image.shape == ((20, 10, 3) if orientation >= 5 else (10, 20, 3))
    assert np.array_equal(image, expected)
    assert decode(data, 1).shape[:2] == image.shape[:2]


@pytest.mark.case("D08")
def test_grey_palette_one_pixel_and_first_frame() -> None:
    grey = encoded(picture(9, 7).convert("L"), "PNG")
    image = decode(grey, 3)
    assert (image[..., 0] == image[..., 2]).all()
    assert (decode(grey, 1) == image[..., :1]).all()
    assert decode(encoded(picture(9, 7).convert("L"), "JPEG"), 3).shape == (7, 9, 3)
    for mode in ("RGB", "L", "1", "P"):
        assert decode(encoded(picture(1, 1).convert(mode), "PNG"), 3).shape == (1, 1, 3)
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    assert decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 3)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.case("D08")
def test_a_file_cut_in_half_is_refused(format: str) -> None:
    data = encoded(picture(200, 150), format)
    with pytest.raises(BadSampleError) as caught:
        decode(data[: len(data) // 2], 3)
    assert caught.value.cause == "undecodable"
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("data", [b"", b"x", b"no image at all", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
@pytest.mark.case("D08")
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadSampleError):
        decode(data, 3)


@pytest.mark.case("D08")
def test_floats_and_32_bit_are_refused_by_name() -> None:
    for image in (Image.new("F", (2, 2), 0.5), Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32))):
        with pytest.raises(BadSampleError) as caught:
            decode(encoded(image, "TIFF"), 3)
        assert caught.value.cause == "unsupported"


def test_the_fast_path_equals_the_general_one() -> None:
    for colour in ("RGB", "L"):
        for subsampling in (0, 2):
            data = encoded(picture(97, 61).convert(colour), "JPEG", quality=85, subsampling=subsampling)
            general = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            assert np.array_equal(decode(data, 3), general)
            luma = np.asarray(Image.open(io.BytesIO(data)).convert("L")).astype(int)
            assert np.abs(decode(data, 1)[..., 0] - luma).max() <= 2


@pytest.mark.parametrize("target", [50, 64, 100, 200, 256, 399, 400, 500])
def test_scaled_decoding_keeps_the_shorter_side_and_the_picture(target: int) -> None:
    data = encoded(picture(640, 400), "JPEG", quality=95)
    scaled = decode(data, 3, at_least=target)
    assert scaled.shape[0] >= min(target, 400)
    assert scaled.shape[0] < max(2 * target, 401)
    full = fit(decode(data, 3), target).astype(int)
    assert np.abs(fit(scaled, target) - full).mean() < 1.5


def test_fit_cuts_the_centre() -> None:
    image = np.zeros((10, 21, 3), dtype=np.uint8)
    image[:, 5:15] = 200
    assert (fit(image, 10) == 200).all()
    for size in (1, 4, 10, 16):
        for channels in (1, 3):
            assert fit(image[..., :channels], size).shape == (size, size, channels)


@pytest.mark.case("S04")
def test_shrinking_is_antialiased() -> None:
    """A one-pixel checkerboard becomes an even grey, not a pattern."""
    board = ((np.indices((256, 256)).sum(0) % 2) * 255).astype(np.uint8)[..., None].repeat(3, 2)
    small = fit(board, 64)
    assert small[4:-4, 4:-4].std() < 2
    assert abs(float(small.mean()) - 127.5) < 2


def test_pixels_follow_the_same_rules_as_files() -> None:
    see_through = np.zeros((2, 2, 4), dtype=np.uint8)
    assert (from_pixels(see_through, 3) == 255).all()
    assert from_pixels(np.full((3, 2, 1), 9, dtype=np.uint8), 3).tolist() == np.full((3, 2, 3), 9).tolist()


@pytest.mark.case("D13")
def test_flips_are_keyed_by_seed_and_position_only() -> None:
    positions = np.arange(10_000)
    first = flips(0, positions)
    assert abs(first.mean() - 0.5) < 0.02
    assert np.array_equal(flips(0, positions[5000:]), first[5000:])
    assert abs((flips(1, positions) == first).mean() - 0.5) < 0.02
    assert abs((flips(0, positions + 10_000) == first).mean() - 0.5) < 0.02
