"""`benchmarks.ablations`: what equal compute pays for, errors over seeds, the table, and options that the product takes."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations
from benchmarks.ablations import (
    DEFAULT,
    HEADER,
    OPTIONS,
    SETS,
    Bench,
    Figure,
    against,
    equal_compute,
    mean_and_error,
    rows_of,
)
from benchmarks.photographs.arms import ARMS, PATCH, settings_of
from benchmarks.verbs import nested
from tarflow.models.cost import flops_per_image
from tarflow.trainer.config.schema import Config


def test_an_option_that_costs_twice_as_much_gets_half_the_images_and_starts_do_not_count() -> None:
    assert equal_compute(1024, cpu_s=210.0, default_cpu_s=110.0, start_s=10.0, batch=32) == 512
    assert equal_compute(1024, cpu_s=110.0, default_cpu_s=110.0, start_s=10.0, batch=32) == 1024
    with pytest.raises(SystemExit, match="a start alone"):
        equal_compute(1024, cpu_s=9.0, default_cpu_s=110.0, start_s=10.0, batch=32)


def test_errors_are_those_over_seeds_and_of_one_seed_those_of_its_evaluation() -> None:
    assert mean_and_error([(3.0, 0.25)]) == (3.0, 0.25)
    assert mean_and_error([(1.0, 9.0), (3.0, 9.0)]) == pytest.approx((2.0, 1.0))
    # Seed by seed: what the seeds have in common is not in the error of the difference.
    assert against([(11.0, 9.0), (21.0, 9.0)], [(10.0, 9.0), (20.0, 9.0)]) == pytest.approx((1.0, 0.0))
    assert against([(11.0, 3.0)], [(10.0, 4.0)]) == pytest.approx((1.0, 5.0))


def test_a_row_has_a_cell_for_each_title() -> None:
    figure = Figure(640, 12.0, (3.0, 0.1), (50.0, 2.0))
    rows = rows_of("digits", "images", {DEFAULT: [figure], "other": [figure]}, [figure])
    assert [row[2] for row in rows] == [DEFAULT, "other"]
    assert {len(row) for row in rows} == {len(HEADER)}
    assert rows[0][6:10] == (3.0, 0.1, None, None)
    assert rows[1][6:10] == pytest.approx((3.0, 0.1, 0.0, 0.1 * 2**0.5))


def test_the_result_of_a_run_is_that_of_its_end_whatever_else_was_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose training was interrupted ended in "too many values to unpack", or was scored by where it stood then."""
    there: list[int] = [320]
    monkeypatch.setattr(ablations, "read_results", lambda _: [(tmp_path, result(images)) for images in there])
    asked: list[list[Any]] = []

    def evaluate(words: list[Any], _: Path) -> None:
        asked.append(words)
        there.append(640)

    def result(images: int) -> dict[str, Any]:
        measured = {"bits_per_dim": images / 100, "bits_per_dim_stderr": 0.1, "distance_stderr": 2.0}
        return {"images_seen": images, "fd_efficientnet_lite0": 50.0, **measured}

    monkeypatch.setattr(ablations, "run_verb", evaluate)
    monkeypatch.setattr(Bench, "train", lambda *_: (tmp_path, 12.0))
    monkeypatch.setattr(Bench, "reference", tmp_path / "reference.npz")
    bench = Bench(SETS[0], tmp_path, tmp_path, quick=True)
    for _ in range(2):
        assert bench.figure(DEFAULT, 640, 0, "images") == Figure(640, 12.0, (6.4, 0.1), (50.0, 2.0))
    assert len(asked) == 1, "and what is there is not measured again"
    assert "--newest" in asked[0]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("data", SETS, ids=lambda data: data.name)
def test_every_option_is_one_that_the_product_takes_and_differs_from_the_default(data: Any, option: str) -> None:
    bench = Bench(data, Path("nowhere"), Path("nowhere"), quick=True)
    settings = bench.settings(option, 640, 1)
    config = Config.model_validate(nested(settings))
    default = Config.model_validate(nested(bench.settings(DEFAULT, 640, 1)))
    assert (config == default) == (option == DEFAULT)
    assert config.likelihood_noise == default.likelihood_noise, "bits of other noise do not compare"
    layers = config.model.layers
    assert sum(layers) == sum(default.model.layers), "an option must not be a larger model"


@pytest.mark.parametrize("size", PATCH)
def test_arms_have_as_many_layers_and_their_bits_are_of_the_same_noise(size: int) -> None:
    made = [settings_of(arm, size, "data", 3, 3200, quick=False) for arm in ARMS]
    plain, *others = [Config.model_validate(nested(settings)) for settings in made]
    for other in others:
        assert other.likelihood_noise == plain.likelihood_noise
        assert sum(other.model.layers) == sum(plain.model.layers)
        assert flops_per_image(other.model) == pytest.approx(flops_per_image(plain.model), rel=0.02)
    assert plain.model.num_tokens == 256


@pytest.mark.parametrize("seeds", ["0", "-1"])
def test_no_seed_is_an_error_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: str
) -> None:
    monkeypatch.setattr("sys.argv", ["ablations", "--quick", "--seeds", seeds, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"--seeds {seeds}: at least one run"):
        ablations.main()
    assert not (tmp_path / "out").exists()
