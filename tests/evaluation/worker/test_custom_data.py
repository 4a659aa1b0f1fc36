"""An evaluation on a user's own data: the code that a run directory names is not imported unless it is named again."""

from pathlib import Path

import numpy as np
import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.worker.class_maps import check_class_maps
from tarflow.evaluation.worker.recipe import load_recipes
from tarflow.trainer.config.files import load_config
from tarflow.trainer.run_dir import create_run, save_config
from tests.evaluation.conftest import write_checkpoint
from tests.helpers.own_data import Spots
from tests.helpers.runs import write_config

SPOTS = "tests.helpers.own_data:Spots"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of somebody's, whose configuration names code that says when it is imported."""
    code = tmp_path / "strange.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').close()\nfrom tests.helpers.own_data import Spots\n")
    own = {"dataset": f"{code}:Spots", "transform": f"{code}:gone", "validation": "held-24"}
    file = write_config(
        tmp_path / "own.yaml", Path("train"), data=own, train={"global_batch_size": 12, "max_images": 24},
        evaluation={"variants": [{"denoise": 0.0}], "num_samples": 8, "final_num_samples": 16},
    )  # fmt: skip
    create_run(tmp_path / "run")
    save_config(tmp_path / "run", load_config(file))
    return tmp_path / "run"


def test_the_code_that_a_run_names_is_imported_only_if_it_is_named_again(run: Path) -> None:
    for overrides in ([], ["sampling.denoise=0.5"], [f"data.transform={run.parent}/strange.py:gone"]):
        with pytest.raises(DataError, match=r"data.dataset=.*strange.py:Spots stands in the configuration of a run"):
            load_recipes(run, overrides)
    assert not (run.parent / "ran").exists()
    recipes = load_recipes(run, [f"data.dataset={run.parent}/strange.py:Spots"])
    assert (run.parent / "ran").exists()
    with pytest.raises(DataError, match="stands in the configuration"):
        recipes[0].config.data.code("transform")


def test_named_again_it_is_the_runs_own_evaluation_and_so_are_its_variants(run: Path) -> None:
    own, final, variant = load_recipes(run, [f"data.dataset={run.parent}/strange.py:Spots"])
    assert own.own
    assert (final.final, variant.final) == (True, False)
    earlier = own.config.changed(train={"noise_std": 0.2})
    checkpoint = write_checkpoint(run, earlier, 1, 12)
    for recipe in (own, final, variant):
        then = recipe.of(checkpoint)
        assert then.config.train.noise_std == 0.2
        for one in (recipe, then):
            assert one.settings.train_fingerprint == own.settings.train_fingerprint
            assert one.config.data.code("dataset") == f"{run.parent}/strange.py:Spots"
    assert own.settings.train_fingerprint.startswith("custom-96-")
    assert own.settings.validation_fingerprint is not None
    assert own.settings.validation_fingerprint.startswith("custom-24-")
    assert not load_recipes(run, [f"data.dataset={SPOTS}", "data.train=train-95"])[0].own
    check_class_maps(own.config, ["left", "middle", "right"])
    with pytest.raises(EvaluationError, match="right"):
        check_class_maps(own.config, ["left", "right", "middle"])


def test_images_for_references_and_likelihoods_are_those_of_the_data_set(run: Path) -> None:
    config = load_recipes(run, [f"data.dataset={SPOTS}"])[0].config
    held_out = config.data.held_out
    assert held_out is not None
    images = ImageSet(held_out, config.model, limit=12)
    assert images.num_images == 12
    assert images.provenance()["data"] == f"{SPOTS}('held-24')"
    expected = Spots("held-24")
    seen = [
        (int(number), int(label), pixels)
        for part in range(2)
        for batch in images.batches(True, 5, part, 2)
        for pixels, label, number in zip(*batch)
    ]
    assert [number for number, _, _ in seen] == list(range(0, 24, 2))
    for number, label, pixels in seen:
        assert label == expected.labels[number]
        np.testing.assert_array_equal(pixels[0].numpy(), expected.images[number][..., 0])
    with pytest.raises(EvaluationError, match=r"not known without reading them all; set sampling.labels=balanced"):
        images.class_counts()
