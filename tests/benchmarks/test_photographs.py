"""`benchmarks.photographs`: the split, the tiles, error bars, tables, and training in slices by the real verb."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.photographs import scores, training
from benchmarks.photographs.scores import Score, bits_of, clustered, difference
from benchmarks.photographs.sheet import MOST_BYTES, sheet
from benchmarks.photographs.sources import Photograph, webp_files
from benchmarks.photographs.tables import HEADER, Result, markdown, result_rows
from benchmarks.photographs.tiles import COUNTS, count_rows, cut, held_out, photograph_of, tile_name, write_tiles
from benchmarks.photographs.training import Taken, cost_of_image, images_for, taken_by, train_in_slices, write_config
from benchmarks.verbs import Ran, VerbFailedError, nested, overrides
from tests.helpers.data import prepared, spots
from tests.helpers.runs import write_config as a_config


def photo(name: str, kind: str = "land", width: int = 40, height: int = 24, flat: bool = False) -> Photograph:
    def read() -> Image.Image:
        noise = np.random.default_rng(len(name)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(noise // 255 if flat else noise)

    return Photograph("a-package", kind, name, read)


def test_a_tenth_of_the_photographs_of_each_kind_is_held_out_whatever_their_order() -> None:
    photos = [photo(f"land/{i}") for i in range(40)] + [photo(f"sky/{i}", "sky") for i in range(5)]
    held = held_out(photos)
    assert held == held_out(photos[::-1])
    assert sorted(name.split("/")[0] for name in held) == ["land"] * 4 + ["sky"]
    assert held != held_out(photos, seed=1)


def test_no_photograph_has_tiles_in_both_splits_and_the_counts_are_those_of_the_files(tmp_path: Path) -> None:
    photos = [*(photo(f"land/{i}-{i}") for i in range(6)), photo("sky/1", "sky"), photo("sky/22", "sky", flat=True)]
    held = held_out(photos)
    counts = write_tiles(photos, 8, held, tmp_path / "tiles")
    found = {split: [p.name for p in (tmp_path / "tiles" / split).rglob("*.png")] for split in ("train", "val")}
    assert found["train"]
    assert found["val"]
    apart = [{photograph_of(name) for name in names} for names in found.values()]
    assert apart[0].isdisjoint(apart[1])
    assert apart[1] <= {name.replace("/", "-") for name in held}
    rows = count_rows(counts, photos)
    assert [(row[1], row[2]) for row in rows] == [("land", 6), ("sky", 2)]
    for split, column in (("train", 3), ("val", 4)):
        assert sum(row[column] for row in rows) == len(found[split])
    assert rows[1][5] == 2, "a flat photograph of 40 x 24 pixels, two tiles across, leaves none"
    assert not list((tmp_path / "tiles").rglob("sky-22-*"))
    (tmp_path / "tiles" / COUNTS).write_text(json.dumps({"a-package land train": 1}))
    assert write_tiles(photos, 8, held, tmp_path / "tiles") == {"a-package land train": 1}, (
        "what is there is not cut again"
    )


def test_a_photograph_is_cut_at_each_scale_that_it_has_pixels_for() -> None:
    image = photo("x", width=100, height=60).read()
    places = [place for place, _ in cut(image, 8, (8, 4))]  # 64 x 38 pixels, then 32 x 19
    assert [place.split("-")[0] for place in places] == ["8"] * 8 * 4 + ["4"] * 4 * 2
    assert len(set(places)) == len(places)
    assert all(tile.size == (8, 8) for _, tile in cut(image, 8, (8, 4)))
    assert [place for place, _ in cut(image, 32, (8, 4))] == ["8-14-2", "8-14-34", "8-14-66"], "the same tiles twice"
    assert photograph_of(f"some/folder/{tile_name('sky/m-31', places[-1])}") == "sky-m-31"


def test_pictures_inside_a_larger_file_are_found_whole() -> None:
    pictures = []
    for colour in ("red", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 10), colour).save(buffer, "webp")
        pictures.append(buffer.getvalue())
    assert list(webp_files(b"head RIFFxxxxWAVE" + pictures[0] + b"between" + pictures[1])) == pictures


def test_the_error_bar_takes_photographs_as_independent_and_not_their_tiles() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    mean, alone = clustered(values, ["a", "b", "c", "d"])
    assert (mean, alone) == pytest.approx((3.75, np.std(values, ddof=1) / 2))
    assert clustered(values * 5, ["a", "b", "c", "d"] * 5) == pytest.approx((mean, alone)), (
        "five equal tiles tell no more"
    )
    assert np.isnan(clustered([1.0, 2.0], ["a", "a"])[1])
    bits = {tile_name(name, "4-0-0"): value for name, value in zip("abcd", values)}
    assert difference({name: value + 1 for name, value in bits.items()}, bits) == pytest.approx((1.0, 0.0))
    with pytest.raises(ValueError, match="1 tiles were measured"):
        difference({**bits, "e-4-0-0.png": 1.0}, bits)


def a_result(arm: str, distance: float | None, stderr: float) -> Result:
    bits = {tile_name(name, "4-0-0"): 3.0 for name in "ab"}
    return Result(arm, 64, 3200, Taken(3, 90.0, 50.0, True), [Score(3200, 320, distance, stderr, 11.5, "x")], bits)


def test_a_run_whose_samples_are_not_finite_has_results_without_a_distance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise VerbFailedError("exit code 1")

    measured = {"num_samples": 40, "neighbours": None}
    good = {"images_seen": 10, "fd_efficientnet_lite0": 90.0, "distance_stderr": 2.0, "problem": None}
    bad = {"images_seen": 20, "problem": "3 of 40 samples are not finite"}
    results: list[tuple[Path, dict[str, Any]]] = [(tmp_path / "a", good | measured), (tmp_path / "b", bad | measured)]
    monkeypatch.setattr(scores, "run_verb", fails)
    missing: list[str] = []
    monkeypatch.setattr(scores, "read_results", lambda _: results)
    monkeypatch.setattr(scores, "waiting", lambda *_: [("own", []), ("final", missing)])
    found = scores.evaluate(tmp_path / "run", tmp_path / "reference.npz")
    assert [(score.images, score.distance) for score in found] == [(10, 90.0), (20, None)]
    assert capsys.readouterr().out == "b: 3 of 40 samples are not finite\n"
    missing.append("images-000000000020")  # it failed for another reason, too
    with pytest.raises(VerbFailedError):
        scores.evaluate(tmp_path / "run", tmp_path / "reference.npz")


def test_a_likelihood_that_was_interrupted_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "bits", []

    def likelihood(words: list[object], log: Path) -> None:
        assert words[0] == "likelihood"
        calls.append(words)
        table = pa.table({"name": ["land/a-1", "sky/b-1"], "bits_per_dim": [5.0, 6.0]})
        pq.write_table(table, out / "likelihood.parquet")

    monkeypatch.setattr(scores, "run_verb", likelihood)
    (out / "work").mkdir(parents=True)  # what it leaves where it stood
    for _ in range(2):
        assert bits_of(tmp_path / "run", tmp_path / "tiles", out, 2, 1) == {"land/a-1": 5.0, "sky/b-1": 6.0}
    assert len(calls) == 1, "and what is there is not measured again"


def test_the_table_shows_what_was_measured_and_a_dash_for_what_was_not() -> None:
    rows = result_rows([a_result("plain", 100.0, 3.0), a_result("other", None, 4.0)])
    lines = markdown(HEADER, rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| 64 | plain | 3,200 | 1.5 | 3 | 3 | 0 | 2 | 100 | 3 | 320 | 11.5 |"
    assert "| - | 4 |" in lines[3]
    assert a_result("other", 90.0, 4.0).distance_from(a_result("plain", 100.0, 3.0)) == (-10.0, 5.0)


def test_a_budget_buys_whole_batches_and_settings_are_written_as_a_tree(tmp_path: Path) -> None:
    assert images_for(105.0, 0.25, 32) == 416
    assert images_for(0.0, 0.25, 32) == 32
    settings = {"model.channels": 8, "data.flip": True, "model.layers_per_block": [1, 2], "data.validation": None}
    assert nested(settings)["model"] == {"channels": 8, "layers_per_block": [1, 2]}
    assert overrides(settings)[1:] == ["data.flip=true", "model.layers_per_block=[1,2]", "data.validation=null"]
    path = write_config(tmp_path / "a.yaml", settings)
    assert write_config(path, settings) == path
    with pytest.raises(SystemExit, match="other settings"):
        write_config(path, settings | {"model.channels": 16})


def test_two_shells_that_measure_what_an_image_costs_keep_out_of_each_others_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def measure(name: str) -> float:
        return cost_of_image(tmp_path / f"{name}.yaml", tmp_path / "scratch", 32, tmp_path / f"{name}.json", (2, 6))

    def run(words: list[object], log: Path, limit_s: float | None = None) -> Ran:
        folder = Path(str(words[words.index("--run-dir") + 1]))
        folder.mkdir(parents=True)
        begun.append(folder.name)
        if len(begun) == 1:  # the other shell begins and ends in the midst of this one's first run
            assert measure("iterative-64") == 1 / 32
        assert folder.is_dir()
        return Ran(0, cpu_s=10.0 + (4.0 if folder.name.endswith("-6") else 0.0), wall_s=20.0)

    monkeypatch.setattr(training, "run_verb", run)
    assert measure("plain-64") == 1 / 32
    assert len(begun) == 4
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_sheet_of_samples_holds_every_grid_and_stays_small(tmp_path: Path) -> None:
    grids = []
    for number, width in enumerate((300, 200)):
        grids.append(tmp_path / f"{number}.png")
        noise = np.random.default_rng(number).integers(0, 256, (240, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(grids[-1])
    made = sheet(grids, tmp_path / "sheet.png")
    assert made is not None
    assert made.stat().st_size <= MOST_BYTES
    with Image.open(made) as image:
        assert image.width / image.height == pytest.approx(300 / 488, rel=0.01)
    assert sheet([], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[float | None]]:
    """Let slices end with these exit codes, each after a checkpoint or not; gives the limits that they were started with."""

    def prepare(codes: list[int], saves: bool = True) -> list[float | None]:
        limits: list[float | None] = []

        def run(words: list[object], log: Path, limit_s: float | None = None) -> Ran:
            limits.append(limit_s)
            if saves:  # and the one before goes, by the rule of retention
                shutil.rmtree(tmp_path / "run/checkpoints", ignore_errors=True)
                (tmp_path / f"run/checkpoints/images-{len(limits):012d}").mkdir(parents=True)
            return Ran(codes[len(limits) - 1], cpu_s=10.0, wall_s=20.0)

        monkeypatch.setattr(training, "run_verb", run)
        return limits

    return prepare


def test_slices_follow_each_other_until_the_run_is_done_and_no_further(
    tmp_path: Path, ended: Callable[..., list[float | None]]
) -> None:
    limits = ended([75, 75, 75, 75, 75, 0])
    assert train_in_slices(tmp_path / "c.yaml", tmp_path / "run", 60.0, say=False) == Taken(6, 60.0, 120.0, True)
    assert train_in_slices(tmp_path / "c.yaml", tmp_path / "run", 60.0, say=False).slices == 6
    assert limits == [60.0] * 6


def test_slices_too_short_for_a_checkpoint_are_given_up(
    tmp_path: Path, ended: Callable[..., list[float | None]]
) -> None:
    limits = ended([75] * 9, saves=False)
    with pytest.raises(VerbFailedError, match="longer --slice-minutes"):
        train_in_slices(tmp_path / "c.yaml", tmp_path / "run", 1.0, say=False)
    assert len(limits) == 3


def test_a_slice_that_is_cut_short_counts_among_what_a_run_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> Ran:
        sum(range(10**6))
        raise SystemExit(143)

    monkeypatch.setattr(training, "run_verb", run)
    with pytest.raises(SystemExit):
        train_in_slices(tmp_path / "c.yaml", tmp_path / "run", 60.0, say=False)
    taken = taken_by(tmp_path / "run.slices.jsonl")
    assert (taken.slices, taken.finished) == (1, False)
    assert taken.wall_s > 0


def test_a_run_stopped_in_its_third_step_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = a_config(
        tmp_path / "c.yaml", prepared(tmp_path, *spots()), train={"global_batch_size": 8, "max_images": 4 * 8}
    )
    monkeypatch.setenv("TARFLOW_FAULT", "step@3=term")  # asks itself to stop, as the end of a slice does
    run = tmp_path / "runs/short"
    taken = train_in_slices(config, run, 600.0, say=False)
    assert (taken.slices, taken.finished) == (2, True)
    assert taken.cpu_s > 0
    assert taken == taken_by(run.with_name("short.slices.jsonl"))
    steps = [json.loads(line).get("images_seen") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s for s in steps if s][-1] == 32
    with pytest.raises(VerbFailedError, match="exit code 2"):
        train_in_slices(tmp_path / "missing.yaml", tmp_path / "runs/none", 600.0, say=False)
