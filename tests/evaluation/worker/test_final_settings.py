"""Small evaluations during a run and a large one of its last checkpoint: who gets which, and what the report shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from tarflow.evaluation.report.build import write_report
from tarflow.evaluation.report.headline import find_headline
from tarflow.evaluation.report.history import read_history
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.trainer.config.files import load_config

pytestmark = pytest.mark.usefixtures("fake_features")
FINAL = {"num_samples": 12, "likelihood_draws": 1, "final_num_samples": 30, "final_likelihood_draws": 3}


def scored(run_dir: Path, *overrides: str, **options: Any) -> list[tuple[int, int, str]]:
    """(step, samples, noise) of the results that an evaluation makes."""
    outcome = evaluate(run_dir, False, WorkerOptions(overrides=list(overrides), **options), lambda _: None)
    assert not outcome.failed
    return [(r["step"], r["settings"]["num_samples"], r["settings"]["likelihood"]) for r in outcome.done]


NOISE = "gaussian, standard deviation 0.1 in [-1, 1], seed 0"


def test_only_the_last_checkpoint_is_evaluated_with_the_settings_of_the_end(make_run) -> None:
    run_dir, _ = make_run(evaluation=FINAL)
    assert scored(run_dir) == [(10, 12, NOISE), (20, 12, NOISE), (20, 30, f"{NOISE}, 3 draws")]
    assert scored(run_dir) == []
    (at_end,) = run_dir.glob("evals/images-000000000320-*/result.json")
    assert json.loads(at_end.read_text())["settings"]["num_samples"] == 30
    assert scored(run_dir, "evaluation.reference_images=40", step=10) == [(10, 12, NOISE)]


def test_a_run_that_was_extended_has_its_end_elsewhere(make_run) -> None:
    run_dir, _ = make_run(evaluation=FINAL, train={"max_images": 640})
    assert scored(run_dir) == [(10, 12, NOISE), (20, 12, NOISE)]
    config = run_dir / "config.yaml"
    lines = config.read_text().replace("max_images: 640", "max_images: 320").splitlines(keepends=True)
    config.write_text("".join(lines[1:]))  # without its checksum, as its first line asks of those who edit it
    assert scored(run_dir) == [(20, 30, f"{NOISE}, 3 draws")]


def test_who_asks_for_fewer_samples_gets_no_more_at_the_end(make_run) -> None:
    run_dir, _ = make_run(steps=(20,), evaluation=FINAL)
    asked = ("evaluation.num_samples=6", "evaluation.likelihood_draws=2")
    assert scored(run_dir, *asked) == [(20, 6, f"{NOISE}, 2 draws")]
    assert scored(run_dir, *asked, "evaluation.final_num_samples=8") == [(20, 8, f"{NOISE}, 2 draws")]


def test_the_headline_is_the_evaluation_of_the_end_and_the_curves_are_those_of_the_run(make_run) -> None:
    run_dir, _ = make_run(evaluation=FINAL)
    config = load_config(run_dir / "config.yaml")
    scored(run_dir, step=10)
    first = find_headline(read_history(run_dir).results, config)
    assert first is not None
    assert (first.result.images_seen, first.differs, first.curve) == (160, {}, first.result)
    scored(run_dir)
    headline = find_headline(read_history(run_dir).results, config)
    assert headline is not None
    assert headline.result.values["settings"]["num_samples"] == 30
    assert headline.differs == {}
    assert headline.curve.folder.name == "images-000000000320"
    text = write_report(run_dir).read_text()
    assert text.count("(headline)") == 1
    assert f"{headline.result.folder.name} (headline)" in text
