"""What the report shows of samples and likelihoods: a strip for each class, grids over a setting, histograms."""

import base64
import io
import math
import re

import pytest
from PIL import Image

from tarflow.evaluation.metrics.bits_per_dim import BINS, BitsPerDim, NoiseSettings
from tarflow.evaluation.report.build import write_report
from tarflow.evaluation.report.history import read_history
from tarflow.evaluation.report.plots import outline
from tarflow.evaluation.samples.grid import make_grid
from tarflow.evaluation.samples.png_folder import save_png
from tests.helpers.results import write_result

HISTOGRAM = {"from": 3.0, "to": 5.0, "counts": [1, 2, 4, 1]}


def add_result(run_dir, config, images, levels, own=True, guidance=None, **more):
    """A result whose grid has a row of two 8 px images for each grey level."""
    import torch

    if guidance is not None:
        config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"guidance": guidance})})
    path = write_result(
        run_dir, config, f"images-{images:012d}", own, fd_efficientnet_lite0=9.0, bits_per_dim=4.0, **more
    )
    rows = [torch.full((1, 8, 8), level, dtype=torch.uint8) for level in levels for _ in range(2)]
    save_png(path.parent / "grid.png", make_grid(rows, 2))


def figures(text, title):
    """(caption, picture) of each figure of a section."""
    (body,) = re.findall(f"<h2>{title}</h2>(.*?)</section>", text, re.DOTALL)
    found = re.findall(r"base64,([^']*)'><figcaption>([^<]*)<", body)
    return [(caption, Image.open(io.BytesIO(base64.b64decode(data)))) for data, caption in found]


def test_each_class_has_its_rows_of_the_newest_grid_under_its_name(make_run) -> None:
    run_dir, config = make_run(steps=())
    add_result(run_dir, config, 160, [10, 20], grid_rows=["old", "older"])
    add_result(run_dir, config, 320, [50, 100, 150, 60, 110], grid_rows=["cat & dog", "1", "owl", "cat & dog", "1"])
    shown = figures(write_report(run_dir).read_text(), "Samples by class")
    assert [caption for caption, _ in shown] == ["cat &amp; dog", "1", "owl"]
    levels = [{level for _, level in picture.getcolors()} - {255} for _, picture in shown]
    assert levels == [{50, 60}, {100, 110}, {150}], "whole rows, and nothing of their neighbours"
    pixels = [sum(n for n, level in picture.getcolors() if level != 255) for _, picture in shown]
    assert pixels[0] == pixels[1] == 2 * pixels[2], "no row is cut"


def test_without_classes_or_with_a_damaged_grid_there_are_no_strips(make_run) -> None:
    run_dir, config = make_run(steps=())
    add_result(run_dir, config, 160, [10, 20])
    assert "Samples by class" not in write_report(run_dir).read_text()
    add_result(run_dir, config, 320, [50, 100], grid_rows=["a", "b"])
    (run_dir / "evals/images-000000000320/grid.png").write_bytes(b"no picture")
    text = write_report(run_dir).read_text()
    assert "Samples by class" not in text
    assert "Damaged files, not shown" in text


def test_grids_that_differ_in_guidance_alone_stand_beside_each_other(make_run) -> None:
    run_dir, config = make_run(steps=())
    for guidance, level in ((2.0, 20), (0.0, 40), (1.0, 60)):
        add_result(run_dir, config, 320, [level], own=guidance == 1.0, guidance=guidance)
    text = write_report(run_dir).read_text()
    (title,) = re.findall("<h2>(Samples over guidance weight, [^<]*)</h2>", text)
    shown = figures(text, title)
    assert [caption for caption, _ in shown] == ["guidance weight 0", "guidance weight 1", "guidance weight 2"]
    assert [picture.getpixel((20, 20)) for _, picture in shown] == [40, 60, 20]
    assert "Samples over denoising multiplier" not in text


def test_likelihoods_are_drawn_as_histograms_over_training(make_run) -> None:
    run_dir, config = make_run(steps=())
    for images in range(16, 16 * 8, 16):
        add_result(run_dir, config, images, [10], likelihood={"histogram": HISTOGRAM})
    text = write_report(run_dir).read_text()
    (plot,) = re.findall('aria-label="Likelihood of held-out images"(.*?)</svg>', text, re.DOTALL)
    assert re.findall(r">(\d+) images seen<", plot) == ["16", "48", "80", "112"]
    assert "likelihood.histogram" not in text, "no row of numbers in the tables"
    assert read_history(run_dir).results[0].histogram == (3.0, 5.0, [0.125, 0.25, 0.5, 0.125])


@pytest.mark.parametrize(
    "damage",
    [
        {"counts": []},
        {"counts": [-1, 3]},
        {"counts": "12"},
        {"from": 6.0},
        {"to": None},
        {"counts": [0, 0]},
        {"from": "x"},
    ],
)
def test_a_histogram_that_is_none_is_left_out(make_run, damage) -> None:
    run_dir, config = make_run(steps=())
    add_result(run_dir, config, 16, [10], likelihood={"histogram": HISTOGRAM | damage})
    assert read_history(run_dir).results[0].histogram is None or damage == {"counts": "12"}
    assert "</html>" in write_report(run_dir).read_text()


def test_the_histogram_counts_every_finite_image_once() -> None:
    bits = BitsPerDim(NoiseSettings("gaussian", 0.1, draws=2))
    assert bits.histogram() is None
    bits.put([0, 1, 2, 3], [[2.0, 4.0], [5.0, 5.0], [3.9, 4.1], [math.inf, 3.0]], 12)
    found = bits.histogram()
    assert found is not None
    assert (found["from"], found["to"], sum(found["counts"])) == (3.0, pytest.approx(5.0), 3)
    assert [place for place, count in enumerate(found["counts"]) if count] == [0, BINS // 2, BINS - 1]
    one = BitsPerDim(NoiseSettings("gaussian", 0.1))
    one.put([7], [[3.5]], 12)
    assert one.histogram() == {"from": 3.5, "to": 4.5, "counts": [1] + [0] * (BINS - 1)}
    assert outline(0.0, 2.0, [3, 1]) == [(0.0, 0.0), (0.0, 3.0), (1.0, 3.0), (1.0, 1.0), (2.0, 1.0), (2.0, 0.0)]
