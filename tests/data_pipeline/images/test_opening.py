"""Files as they are in the wild: large metadata, damaged metadata, more pixels than are wanted, many formats."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, PngImagePlugin

from tarflow.data_pipeline.errors import BadSampleError
from tarflow.data_pipeline.images.decode import decode
from tarflow.data_pipeline.images.formats import FORMATS, IMAGE_EXTENSIONS, UNREAD_PICTURES, cause_of, extension_of
from tarflow.data_pipeline.images.opening import png_without_metadata, size_of

LARGE = 3 << 20


def picture(mode: str = "RGB", width: int = 12, height: int = 9) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunk(png: bytes, *chunks: bytes, last: bool = False) -> bytes:
    """The PNG with more chunks: after its header, or before its end."""
    at = len(png) - 12 if last else 33
    return png[:at] + b"".join(chunks) + png[at:]


METADATA = {
    "zTXt": b"note\0\0" + zlib.compress(bytes(LARGE)),
    "tEXt": b"note\0" + b"x" * LARGE,
    "iTXt": b"note\0\1\0\0\0" + zlib.compress(b"y" * LARGE),
    "XMP": b"XML:com.adobe.xmp\0\0\0\0\0" + b"<x/>" * (LARGE // 4),
    "iCCP": b"profile\0\0" + zlib.compress(bytes(LARGE)),
    "bomb": b"note\0\0" + zlib.compress(bytes(64 << 20)),
    "many": b"note\0\0" + zlib.compress(bytes(1 << 20)),
    "cut": b"profile\0\0" + zlib.compress(bytes(1000))[:20],
}
NAMES = {"XMP": b"iTXt", "bomb": b"zTXt", "many": b"zTXt", "cut": b"iCCP"}


@pytest.mark.parametrize("what", METADATA)
@pytest.mark.case("F09")
def test_metadata_of_a_png_cost_no_image(what: str) -> None:
    extra = [chunk(NAMES.get(what, what[:4].encode()), METADATA[what])] * (70 if what == "many" else 1)
    for mode in (
        ("RGB", "RGBA", "P", "I;16") if len(b"".join(extra)) < 1 << 20 and what not in ("bomb", "many") else ("RGB",)
    ):
        plain = encoded(
            Image.fromarray(np.arange(99, dtype=np.uint16)[None] * 600) if mode == "I;16" else picture(mode)
        )
        for last in (False, True) if what not in ("iCCP", "cut") else (False,):  # a profile stands before the pixels
            assert np.array_equal(decode(with_chunk(plain, *extra, last=last), 3), decode(plain, 3)), (mode, last)


@pytest.mark.case("F09")
def test_a_wrong_checksum_in_metadata_costs_no_image_and_one_in_pixels_does() -> None:
    plain = encoded(picture())
    bad = bytearray(chunk(b"tEXt", b"note\0hello"))
    bad[-1] ^= 1
    assert np.array_equal(decode(with_chunk(plain, bytes(bad)), 3), decode(plain, 3))
    damaged = bytearray(plain)
    damaged[plain.index(b"IDAT") + 20] ^= 1
    for data in (bytes(damaged), with_chunk(bytes(damaged), bytes(bad))):
        with pytest.raises(BadSampleError):
            decode(data, 3)


@pytest.mark.case("F09")
def test_what_pixels_need_is_kept() -> None:
    """Orientation, transparency and palette survive when the rest is passed over; a cut file stays an error."""
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = picture("RGBA")
    clear.putalpha(40)
    for image, options in ((picture(), {"exif": exif}), (clear, {}), (picture("P"), {"transparency": 3})):
        plain = encoded(image, **options)
        large = with_chunk(plain, chunk(b"zTXt", METADATA["zTXt"]))
        assert np.array_equal(decode(large, 3), decode(plain, 3))
        with pytest.raises(BadSampleError) as caught:
            decode(large[:-30], 3)
        assert caught.value.cause == "undecodable"
    interlaced = encoded(picture(), interlace=1)
    assert np.array_equal(decode(with_chunk(interlaced, chunk(b"zTXt", METADATA["zTXt"])), 3), decode(interlaced, 3))
    assert png_without_metadata(encoded(picture(), "JPEG")) is None
    assert png_without_metadata(encoded(picture())) is None


@pytest.mark.case("F09")
def test_the_first_frame_of_an_animation_with_large_metadata() -> None:
    frames = [picture(width=5), picture(width=5).rotate(180)]
    for format in ("PNG", "GIF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        alone = encoded(frames[0], format, **options)
        assert np.array_equal(decode(data, 3), decode(alone, 3)), format
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(with_chunk(data, chunk(b"iCCP", METADATA["iCCP"])), 3), np.asarray(frames[0]))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "TIFF", "CMYK"])
@pytest.mark.case("F09")
def test_large_exif_xmp_and_profiles_of_other_formats(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x010E] = "x" * 60_000
    image = picture("CMYK" if format == "CMYK" else "RGB")
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    format = "JPEG" if format == "CMYK" else format
    plain = encoded(image, format, **options)
    large = encoded(image, format, exif=exif, icc_profile=bytes(1 << 20), **options)
    assert len(large) > len(plain) + (1 << 20)
    turned = decode(plain, 3)[::-1, ::-1] if format != "TIFF" else decode(large, 3)
    assert np.array_equal(decode(large, 3), turned)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM\0*\0\0\xff\xff" + bytes(20)]
)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG", "CMYK"])
@pytest.mark.case("F09")
def test_damaged_exif_costs_no_image(format: str, exif: bytes) -> None:
    image = picture("CMYK" if format == "CMYK" else "RGB")
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    format = "JPEG" if format == "CMYK" else format
    plain = decode(encoded(image, format, **options), 3)
    assert np.array_equal(decode(encoded(image, format, exif=exif, **options), 3), plain)


@pytest.mark.case("F09")
def test_the_size_of_an_image_is_told_from_its_head_whatever_its_metadata() -> None:
    large = with_chunk(encoded(picture()), chunk(b"zTXt", METADATA["zTXt"]), chunk(b"iCCP", METADATA["iCCP"]))
    assert size_of(large) == (12, 9)
    assert size_of(large[: len(large) - 5]) == (12, 9)
    assert size_of(encoded(picture(), "JPEG")[:-9]) == size_of(encoded(picture(), "AVIF")) == (12, 9)
    assert size_of(b"nothing") is None


# --- the bound on pixels -------------------------------------------------------------------------------------------


def huge_jpeg(width: int, height: int, progressive: bool = False) -> bytes:
    """A small JPEG whose header promises more."""
    data = bytearray(encoded(picture(), "JPEG", progressive=progressive))
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


@pytest.mark.case("F19")
def test_a_jpeg_of_16_000_pixels_a_side_is_bounded_as_a_png_is() -> None:
    header = struct.pack(">IIBBBBB", 16_000, 16_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    for data in (huge_jpeg(16_000, 16_000), png, huge_jpeg(16_000, 16_000, progressive=True)):
        with pytest.raises(
            BadSampleError, match=r"16000 x 16000, 256,000,000 pixels, .*data\.max_image_pixels"
        ) as caught:
            decode(data, 3)
        assert caught.value.cause == "too_large"


@pytest.mark.parametrize(
    "format",
    ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "MPO", "AVIF", "JPEG2000", "ICO", "TGA", "CMYK", "QOI"],
)
@pytest.mark.case("F19")
def test_one_bound_for_all_formats(format: str) -> None:
    image = picture("CMYK" if format == "CMYK" else "RGB", 32, 32)
    options: dict[str, Any] = {"sizes": [(32, 32)]} if format == "ICO" else {}
    if format == "QOI":
        data = qoi(32, 32)
    elif format == "MPO":
        data = encoded(image, "MPO", save_all=True, append_images=[image])
    else:
        data = encoded(image, "JPEG" if format == "CMYK" else format, **options)
    assert decode(data, 3, None, 1024).shape == (32, 32, 3)
    before = Image.MAX_IMAGE_PIXELS or 0
    for most in (1023, 500, 1):
        with pytest.raises(BadSampleError, match=r"max_image_pixels") as caught:
            decode(data, 3, None, most)
        assert caught.value.cause == "too_large"
    assert (Image.MAX_IMAGE_PIXELS or 0) >= before  # others in this process open images, too


def qoi(width: int, height: int) -> bytes:
    pixels = b"\xfe\x10\x20\x30" * (width * height)
    return b"qoif" + struct.pack(">IIBB", width, height, 3, 0) + pixels + bytes(7) + b"\1"


@pytest.mark.case("F19")
def test_of_a_jpeg_the_reduced_size_counts_unless_it_is_progressive() -> None:
    image = picture("RGB", 160, 120)
    assert decode(encoded(image, "JPEG"), 3, 15, 400).shape == (15, 20, 3)
    assert decode(encoded(image, "JPEG", progressive=True), 3, 15, 160 * 120).shape == (15, 20, 3)
    for data, at_least in ((encoded(image, "JPEG"), None), (encoded(image, "JPEG", progressive=True), 15)):
        with pytest.raises(BadSampleError, match="160 x 120, 19,200 pixels, and at most 400"):
            decode(data, 3, at_least, 400)
    with pytest.raises(BadSampleError, match="20 x 15, 300 pixels, and at most 299"):
        decode(encoded(image, "JPEG"), 3, 15, 299)
    assert simplejpeg.is_jpeg(encoded(image, "JPEG"))


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.case("F11")
def test_what_the_decoder_reads_counts_as_an_image() -> None:
    kinds = {
        "avif": "AVIF",
        "jp2": "JPEG2000",
        "ico": "ICO",
        "tga": "TGA",
        "mpo": "MPO",
        "dib": "DIB",
        "apng": "PNG",
        "pcx": "PCX",
    }
    for extension, format in kinds.items():
        assert extension in IMAGE_EXTENSIONS
        options = {"sizes": [(12, 9)]} if format == "ICO" else {}
        assert decode(encoded(picture(), format, **options), 3).shape == (9, 12, 3), format
    assert {
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "bmp",
        "gif",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
    } <= IMAGE_EXTENSIONS
    assert not IMAGE_EXTENSIONS & {
        "eps",
        "ps",
        "h5",
        "hdf",
        "mpg",
        "wmf",
        "pdf",
        "txt",
        "json",
        "cls",
        "npy",
        "fits",
        "rgb",
    }


@pytest.mark.case("F11")
def test_pictures_that_are_not_read_are_called_so() -> None:
    assert {"heic", "heif", "jxl", "svg", "cr2", "exr"} <= UNREAD_PICTURES
    assert not UNREAD_PICTURES & IMAGE_EXTENSIONS
    assert (cause_of("heic"), cause_of("txt")) == ("unreadable_heic", "not_an_image")
    names = ("a/b.c/X.HEIC", "noending", "dir.png/noending", "two.tar.gz")
    assert [extension_of(name) for name in names] == ["heic", "", "", "gz"]


@pytest.mark.case("F11")
def test_no_other_program_is_started_for_an_image() -> None:
    """Pillow gives EPS files to Ghostscript, whatever their names are."""
    assert "EPS" not in FORMATS
    eps = io.BytesIO()
    picture().save(eps, "EPS")
    with pytest.raises(BadSampleError, match="not an image"):
        decode(eps.getvalue(), 3)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20  # nothing was loosened for the whole process
