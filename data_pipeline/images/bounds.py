"""Bounds on an image: its pixels, checked before any is decoded, its bytes, and the scans of a JPEG."""

from __future__ import annotations

from tarflow.data_pipeline.errors import BadSampleError

MAX_SIDE = 16_384  # pixels of the side of the squares that images are cut to
MAX_PIXELS = 180_000_000  # 13,400 x 13,400: half a gigabyte in colour

MAX_BYTES = 2 << 30  # of a file, read whole: more than MAX_PIXELS need in any uncompressed format
_MAX_SCANS = 20  # of an image of MAX_PIXELS, which take about ten seconds; a smaller one may have more accordingly


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise BadSampleError (`too_large`) for an image of more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise BadSampleError(
            "too_large",
            f"the image is {width} x {height}, {width * height:,} pixels, and at most {max_pixels:,} are decoded "
            "(data.max_image_pixels, --max-pixels)",
        )


def check_bytes(size: int) -> None:
    """Raise BadSampleError (`too_large`) for a file too large to read into memory."""
    if size > MAX_BYTES:
        raise BadSampleError("too_large", f"the file has {size:,} bytes, an image at most {MAX_BYTES:,}")


def check_scans(jpeg: bytes, pixels: int) -> None:
    """Raise BadSampleError (`too_large`) for a JPEG of more scans than writers make: each takes as long as a whole image."""
    scans = jpeg.count(b"\xff\xda")  # the marker of a scan, which cannot occur inside one
    if scans > _MAX_SCANS and scans * pixels > _MAX_SCANS * MAX_PIXELS:
        raise BadSampleError(
            "too_large", f"the JPEG of {pixels:,} pixels has {scans:,} scans: decoding would take minutes"
        )
