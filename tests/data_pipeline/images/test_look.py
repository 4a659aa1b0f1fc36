"""A quick look at an image: the size as shown, and whether it has colours, whatever its file stores."""

import io

import numpy as np
import pytest
from PIL import Image

from tarflow.data_pipeline.images.look import Look, look_at

RNG = np.random.default_rng(0)
GREY = np.repeat(RNG.integers(0, 256, (20, 30, 1), dtype=np.uint8), 3, axis=2)
COLOUR = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize(("pixels", "grey"), [(GREY, True), (COLOUR, False)])
@pytest.mark.case("N02")
def test_colours_are_told_by_the_pixels(kind: str, pixels: np.ndarray, grey: bool) -> None:
    assert look_at(encoded(Image.fromarray(pixels), kind)) == Look(30, 20, grey)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16", "P"])
def test_grey_modes(mode: str) -> None:
    image = Image.fromarray(GREY).convert("L")
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    assert look_at(encoded(image, "PNG")) == Look(30, 20, True)


def test_sizes_are_as_shown() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert look_at(encoded(Image.fromarray(COLOUR), "JPEG", exif=exif)) == Look(20, 30, False)


def test_a_spot_of_colour_counts_and_noise_of_rounding_does_not() -> None:
    spot = GREY.copy()
    spot[5:15, 5:15] = (250, 10, 10)
    assert look_at(encoded(Image.fromarray(spot), "PNG")) == Look(30, 20, False)
    nearly = np.clip(GREY.astype(int) + RNG.integers(-3, 4, GREY.shape), 0, 255).astype(np.uint8)
    assert look_at(encoded(Image.fromarray(nearly), "PNG")) == Look(30, 20, True)


@pytest.mark.parametrize(
    "data", [b"", b"no image", encoded(Image.fromarray(COLOUR), "PNG")[:60]], ids=["empty", "text", "cut"]
)
def test_what_cannot_be_told_is_none(data: bytes) -> None:
    assert look_at(data) is None


def test_metadata_that_pillow_refuses_costs_no_look() -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", "a" * (2 << 20), zip=True)
    assert look_at(encoded(Image.fromarray(COLOUR), "PNG", pnginfo=info)) == Look(30, 20, False)
