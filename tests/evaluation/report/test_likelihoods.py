"""Likelihoods measured below a run are on its page, and side by side on a page of several; a damaged one is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.likelihood.measure import LikelihoodRequest, measure_likelihoods
from tarflow.evaluation.report.build import write_report
from tarflow.evaluation.report.compare import write_comparison
from tarflow.evaluation.samples.png_folder import load_png
from tarflow.records import read_object, write_object
from tarflow.trainer.run_dir import load_run_config


def measure(run: Path, data: Path, name: str = "val", **options: Any) -> Path:
    out = run / "likelihoods" / name
    measure_likelihoods(LikelihoodRequest(source=run, data=data, out=out, **options), lambda _: None)
    return out


def page(run: Path) -> tuple[str, list[str]]:
    lines: list[str] = []
    return write_report(run, log=lines.append).read_text(), [line for line in lines if line.startswith("left out")]


@pytest.fixture
def run(make_run: Any) -> Path:
    return Path(make_run(steps=(20,))[0])


def test_a_measurement_is_a_section_with_its_histogram_and_both_ends(run: Path, digit_like: Path) -> None:
    out = measure(run, digit_like / "val")
    table = pq.read_table(out / "likelihood.parquet").to_pydict()
    order = np.argsort(table["bits_per_dim"], kind="stable")
    summary = json.loads((out / "likelihood.json").read_text())
    assert sum(summary["histogram"]["counts"]) == len(order) == 12
    assert [number for number, _ in summary["most_likely"]] == order[:6].tolist()
    assert [number for number, _ in summary["least_likely"]] == order[::-1][:6].tolist()
    # The pictures stand in the grid in the order that the summary says.
    grid, factor = load_png(out / "likelihood.least.png"), 7
    assert grid.shape == (1, 12 * factor, (6 * 10 + 2) * factor)
    first = grid[:, 2 * factor : 10 * factor : factor, 2 * factor : 10 * factor : factor]
    pixels = measured_pixels(run, digit_like)
    assert torch.equal(first, pixels[order[-1]])

    text, left_out = page(run)
    assert left_out == []
    assert "<h2>Likelihoods: val</h2>" in text
    assert f"{summary['bits_per_dim']:.4f} ± {summary['stderr']:.4f} bits per dimension over 12 images" in text
    assert 'aria-label="12 images"' in text
    number, bits = summary["least_likely"][0]
    assert f"least likely, in bits per dimension: {number} ({bits:.3f}), " in text
    assert len(re.findall(r"<img alt='(?:most|least) likely", text)) == 2


def measured_pixels(run: Path, digit_like: Path) -> torch.Tensor:
    images = ImageSet(DataSettings.of(digit_like / "val"), load_run_config(run).model)
    return torch.cat([pixels for pixels, _, _ in images.batches(False)])


def cut(out: Path) -> str:
    path = out / "likelihood.json"
    path.write_bytes(path.read_bytes()[:200])
    return r"likelihood\.json .* is damaged"


def changed(out: Path) -> str:
    path = out / "likelihood.json"
    path.write_text(path.read_text().replace('"measured": 12', '"measured": 13'))
    return r"likelihood\.json .* is damaged"


def of_another_run(out: Path) -> str:
    values = read_object(out / "likelihood.json")
    values["provenance"]["run"] = "f" * 32
    write_object(out / "likelihood.json", values)
    return f"was measured under the run {'f' * 32}, and this is [0-9a-f]{{32}}"


def broken_picture(out: Path) -> str:
    path = out / "likelihood.most.png"
    path.write_bytes(path.read_bytes()[:-30])
    return r"likelihood\.most\.png is "


def lost_picture(out: Path) -> str:
    (out / "likelihood.least.png").unlink()
    return r"likelihood\.least\.png is missing"


@pytest.mark.parametrize("damage", [cut, changed, of_another_run, broken_picture, lost_picture])
def test_a_damaged_one_is_named_and_the_others_stand(
    run: Path, digit_like: Path, damage: Callable[[Path], str]
) -> None:
    measure(run, digit_like / "val")
    problem = damage(measure(run, digit_like / "val", "bad", labels="none"))
    text, left_out = page(run)
    assert len(left_out) == 1
    assert re.search(problem, left_out[0]), left_out
    assert "<h2>Damaged files, not shown</h2>" in text
    assert "<h2>Likelihoods: val</h2>" in text
    assert ("<h2>Likelihoods: bad</h2>" in text) == (damage in (broken_picture, lost_picture))


def test_one_that_an_earlier_version_wrote_has_its_mean(run: Path, digit_like: Path) -> None:
    out = measure(run, digit_like / "val")
    values = read_object(out / "likelihood.json")
    for name in ("histogram", "most_likely", "least_likely"):
        del values[name]
    write_object(out / "likelihood.json", values)
    text, left_out = page(run)
    assert left_out == []
    assert f"{values['bits_per_dim']:.4f} ± " in text
    assert "An earlier version measured them" in text


def test_runs_are_held_against_each_other_on_the_same_images(make_run: Any, digit_like: Path, tmp_path: Path) -> None:
    one = Path(make_run(steps=(20,))[0])
    two = one.with_name("two")
    shutil.copytree(one, two)
    for run in (one, two):
        measure(run, digit_like / "val")
    measure(two, digit_like / "val", "unlabelled", labels="none")
    (one / "likelihoods/val/likelihood.most.png").unlink()
    lines: list[str] = []
    text = write_comparison([one, two], tmp_path / "page.html", lines.append).read_text()
    assert text.count('aria-label="Likelihood of val"') == 2, "labels are a part of what was measured"
    assert text.count(f"<img alt='{two.name}, val: least likely") == 2
    assert [line.rpartition("/")[2] for line in lines] == ["likelihood.most.png is missing"]
