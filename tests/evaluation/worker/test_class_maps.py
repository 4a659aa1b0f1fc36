"""Weights are not scored against images in which their labels mean other classes."""

from pathlib import Path

import numpy as np
import pytest

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate_file
from tarflow.models.provenance import Provenance
from tarflow.models.weights import save_weights_file

pytestmark = pytest.mark.usefixtures("fake_features")


@pytest.fixture
def held_out(tmp_path: Path):
    """`held_out(names)`: six images of classes with these names."""
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import Options, prepare

    def make(names: list[str]) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "v.npz", images=pixels, labels=np.arange(6) % len(names))
        source = open_source(tmp_path / "v.npz")
        source.classes = names
        prepare(source, tmp_path / "-".join(names), Options(size=8))
        return tmp_path / "-".join(names)

    return make


@pytest.fixture
def weights(make_model, tmp_path: Path) -> Path:
    model = make_model()
    provenance = Provenance(classes=("ant", "bee", "cat"), noise="gaussian", noise_std=0.1, label_dropout=0.1)
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), provenance)
    return tmp_path / "w.safetensors"


def score(weights: Path, out: Path, train: Path, validation: Path, *more: str):
    overrides = [
        f"data.train={train}", f"data.validation={validation}", "evaluation.num_samples=8", "evaluation.grid=[1,2]", *more,
    ]  # fmt: skip
    return evaluate_file(weights, out, WorkerOptions(device="cpu", overrides=overrides), lambda line: None)


@pytest.mark.case("V03")
def test_held_out_images_of_other_classes_are_refused_by_the_evaluation_too(
    weights: Path, held_out, tmp_path: Path
) -> None:
    train, other = held_out(["ant", "bee", "cat"]), held_out(["ant", "cat"])
    with pytest.raises(EvaluationError) as caught:
        score(weights, tmp_path / "out", train, other)
    assert str(caught.value).startswith(
        "the classes differ: 3 of the weights (ant, bee, cat), 2 of data.validation (ant, cat); label 1 is 'bee' in the one and "
        f"'cat' in the other ({other})"
    )
    assert not list((tmp_path / "out").rglob("result.json"))
    meant = score(weights, tmp_path / "out", train, other, "data.accept=[class_names]")
    assert meant is not None
    assert meant["bits_per_dim"] is not None


@pytest.mark.case("V03")
def test_held_out_images_of_the_same_classes_are_taken(weights: Path, held_out, tmp_path: Path) -> None:
    same = held_out(["ant", "bee", "cat"])
    result = score(weights, tmp_path / "out", same, same)
    assert result is not None
    assert result["bits_per_dim"] is not None
