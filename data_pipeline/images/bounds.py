"""The bounds on an image: its pixels, checked before any of them is decoded, its bytes, and the work that a JPEG makes."""

from __future__ import annotations

from tarflow.data_pipeline.errors import BadSampleError

MAX_SIDE = 16_384  # pixels of the side of a square that images are brought to, as of a model's images
MAX_PIXELS = 180_000_000  # 13,400 x 13,400: half a gigabyte in colour

MAX_BYTES = 2 << 30  # of a file, read whole: more than MAX_PIXELS take in any format without compression
_MAX_SCANS = 20  # passes over an image of MAX_PIXELS, which take about ten seconds; over a smaller one, as many more


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise BadSampleError (`too_large`) for an image of more pixels than are decoded."""
    if width * height > max_pixels:
        raise BadSampleError(
            "too_large",
            f"the image is {width} x {height}, {width * height:,} pixels, and at most {max_pixels:,} are decoded "
            "(data.max_image_pixels, --max-pixels)",
        )


def check_bytes(size: int) -> None:
    """Raise BadSampleError (`too_large`) for a file that is not read into memory."""
    if size > MAX_BYTES:
        raise BadSampleError("too_large", f"the file has {size:,} bytes, an image at most {MAX_BYTES:,}")


def check_scans(jpeg: bytes, pixels: int) -> None:
    """Raise BadSampleError (`too_large`) for a JPEG of more passes than any is written with: each takes an image's time."""
    scans = jpeg.count(b"\xff\xda")  # the marker of a scan, which occurs nowhere inside one
    if scans > _MAX_SCANS and scans * pixels > _MAX_SCANS * MAX_PIXELS:
        raise BadSampleError(
            "too_large", f"the JPEG of {pixels:,} pixels has {scans:,} scans: decoding would take minutes"
        )
