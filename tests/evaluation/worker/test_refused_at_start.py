"""Whatever `tarflow evaluate` refuses because of a run's settings or data is refused before the run is made.

Left to the evaluation, because no start can know it: a checkpoint that is damaged or gone, samples that are not finite,
held-out or training images that do not decode, a device or a package that the evaluating machine lacks (the package is
said at the start), results and leases in the run directory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tarflow.errors import UserError
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics
from tarflow.evaluation.networks.features import FROM_FILE, PACKAGED
from tarflow.evaluation.references.reference import save_reference
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.trainer.config.evaluation import FEATURE_PACKAGES
from tarflow.trainer.start.check import check_start


@pytest.fixture
def places(tmp_path: Path, digit_like: Path) -> dict[str, Path]:
    """What the settings of the table point to."""
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import Options, prepare

    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    labels: dict[str, Any] = {"unlabelled": {}, "wild": {"labels": np.array([0, 1, 2, 3, 0, 1])}}
    for name, arrays in labels.items():
        np.savez(tmp_path / f"{name}.npz", images=pixels, **arrays)
        prepare(open_source(tmp_path / f"{name}.npz"), tmp_path / name, Options(size=8))
    (tmp_path / "no-index").mkdir()
    (tmp_path / "no-index" / "a.tar").write_bytes((tmp_path / "wild" / "shard-000000.tar").read_bytes())
    (tmp_path / "text.npz").write_text("no statistics")
    return {
        "SPLITS": digit_like, "NOWHERE": tmp_path / "nowhere", "TEXT": tmp_path / "text.npz",
        **{name.upper(): tmp_path / name for name in ("unlabelled", "wild", "no-index")},
    }  # fmt: skip


# name: (settings, a word of what the evaluation says, what a start says, whether with a stand-in for the feature network)
CASES: dict[str, tuple[dict[str, Any], str, str, bool]] = {
    "guidance without classes": (
        {"model": {"num_classes": 0}, "sampling": {"guidance": 2}},
        "no effect without labels", "sampling.guidance=2.0 has no effect without labels", True,
    ),
    "guidance without label dropout": (
        {"train": {"label_dropout": 0}}, "train.label_dropout=0", "sampling.guidance=1.0 needs a model", True,
    ),
    "a variant's guidance": (
        {"train": {"label_dropout": 0}, "sampling": {"guidance": 0}, "evaluation": {"variants": [{"guidance": 2}]}},
        "train.label_dropout=0", "evaluation.variants: {'guidance': 2}: sampling.guidance=2.0 needs", True,
    ),
    "no held-out images there": (
        {"data": {"validation": "NOWHERE"}}, "there is no data set at", "data.validation=NOWHERE: there is no data set", True,
    ),
    "held-out images are a folder of splits": (
        {"data": {"validation": "SPLITS"}}, "holds the splits train, val", "data.validation=SPLITS: SPLITS holds the splits", True,
    ),
    "held-out tars without an index": (
        {"data": {"validation": "NO-INDEX"}}, "have no index yet", "data.validation=NO-INDEX: the shards at", True,
    ),
    "held-out images through a pipe": (
        {"data": {"validation": "pipe:cat NOWHERE/a.tar"}}, "there is no data set", "data.validation=pipe:cat NOWHERE/a.tar: ", True,
    ),
    "held-out images without labels": (
        {"data": {"validation": "UNLABELLED"}}, "has no labels", "data.validation: the data set at UNLABELLED has no labels", True,
    ),
    "held-out label out of range": (
        {"data": {"validation": "WILD"}}, "label 3 is outside 0..2", "data.validation: shard WILD", True,
    ),
    "labels as in unlabelled training images": (
        {"data": {"train": "UNLABELLED"}, "sampling": {"labels": "training"}},
        "has no labels", "model.num_classes=3, but the data in UNLABELLED have no labels", True,
    ),
    "training label out of range": (
        {"data": {"train": "WILD"}}, "label 3 is outside 0..2", "model.num_classes=3, but the data in WILD have 4 classes", True,
    ),
    "training images are nowhere": ({"data": {"train": "NOWHERE"}}, "no data set", "there is no data set at NOWHERE", True),
    "a network that no package brings": (
        {"evaluation": {"features": "fid_inception"}}, "no package provides", "evaluation.features=fid_inception", False,
    ),
    "its weights are not there": (
        {"evaluation": {"features": "dinov2", "features_file": "NOWHERE"}},
        "there are no weights of", "evaluation.features_file=NOWHERE: there is no such file", False,
    ),
    "weights for a network that a package brings": (
        {"evaluation": {"features": "mobilenet_v2", "features_file": "TEXT"}},
        "leave evaluation.features_file out", "evaluation.features=mobilenet_v2 has its weights in a package", False,
    ),
    "no reference statistics there": (
        {"evaluation": {"reference": "NOWHERE"}}, "no reference statistics at", "evaluation.reference=NOWHERE: there is no such", True,
    ),
    "reference statistics that are none": (
        {"evaluation": {"reference": "TEXT"}},
        "(reference statistics) is damaged", "evaluation.reference: TEXT (reference statistics) is damaged", True,
    ),
    "reference statistics of one image": (
        {"evaluation": {"reference_images": 1}}, "at least 2 images", "evaluation.reference_images=1: reference statistics need 2", True,
    ),
}  # fmt: skip


def filled(value: Any, places: dict[str, Path]) -> Any:
    """The table's settings with real paths for the words in capitals."""
    if isinstance(value, dict):
        return {k: filled(v, places) for k, v in value.items()}
    for name, path in places.items():
        value = value.replace(name, str(path)) if isinstance(value, str) else value
    return value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.case("N03")
def test_what_the_evaluation_refuses_is_refused_at_the_start(
    case: str, make_run: Callable[..., Any], places: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    settings, evaluation_says, start_says, stand_in = CASES[case]
    if stand_in:
        request.getfixturevalue("fake_features")
    run_dir, config = make_run(**filled(settings, places), steps=(20,))
    try:
        outcome = evaluate(run_dir, False, WorkerOptions(device="cpu"), lambda line: None)
        assert outcome.done == []
        said = " ".join(outcome.failed.values())
    except UserError as error:
        said = str(error)
    assert evaluation_says in said
    with pytest.raises(UserError) as caught:
        check_start(config, Path("no/run"), 1)
    lines = str(caught.value).splitlines()
    assert [line for line in lines if filled(start_says, places) in line or start_says in line], lines


@pytest.mark.case("N03")
def test_what_the_evaluation_takes_is_taken(make_run: Callable[..., Any]) -> None:
    _, config = make_run(steps=())
    assert check_start(config, Path("no/run"), 1).notes == []


@pytest.mark.case("N03")
def test_reference_statistics_of_something_else(
    make_run: Callable[..., Any], fake_features: Any, tmp_path: Path
) -> None:
    run_dir, _ = make_run(steps=(20,))
    assert evaluate(run_dir, False, WorkerOptions(device="cpu"), lambda line: None).done
    (file,) = (run_dir / "evals").glob("reference-*.npz")
    _, same = make_run(name="same", evaluation={"reference": str(file)})
    assert check_start(same, Path("no/run"), 1).notes == []
    other_dir, other = make_run(name="other", steps=(20,), evaluation={"reference": str(file), "reference_images": 7})
    with pytest.raises(UserError, match="made from something else"):
        evaluate(other_dir, False, WorkerOptions(device="cpu"), lambda line: None)
    with pytest.raises(
        UserError, match=rf"evaluation\.reference={file} was made from something else: images 48 there, 7 here"
    ):
        check_start(other, Path("no/run"), 1)


@pytest.mark.case("N03")
def test_every_part_of_a_provenance_is_compared_that_a_start_can_know(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    from tarflow.evaluation.images.data_set import ImageSet

    _, config = make_run(steps=())
    stored = ImageSet(config.data, config.model).provenance() | {"features": config.evaluation.features}
    network = {"features_sha256": "f00d", "preprocessing": "none"}
    statistics = FeatureStatistics.from_parts(2, np.zeros(4), np.eye(4))
    free = {
        "data",
        "selection",
        "crop",
    }  # where the images lie, what follows from their number, what this version always does
    for key in stored.keys() - free:
        other_value = 3 if isinstance(stored[key], int) else "other"
        said = stored | network | {key: other_value}
        save_reference(tmp_path / "r.npz", statistics, said, torch.empty(0, 4))
        _, other = make_run(name=f"run-{key}", steps=(), evaluation={"reference": str(tmp_path / "r.npz")})
        with pytest.raises(UserError, match=rf"made from something else: {key} {other_value} there"):
            check_start(other, Path("no/run"), 1)


def test_the_start_knows_every_feature_network_and_its_package() -> None:
    assert {name: network.package for name, network in PACKAGED.items()} == FEATURE_PACKAGES
    assert not FEATURE_PACKAGES.keys() & FROM_FILE.keys()


@pytest.mark.case("N03")
def test_a_network_whose_package_is_missing_here_is_said(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = make_run(steps=())
    monkeypatch.setitem(FEATURE_PACKAGES, "efficientnet_lite0", "no_such_package")
    (note,) = check_start(config, Path("no/run"), 1).notes
    assert note.startswith("evaluation.features=efficientnet_lite0 needs the package no_such_package")
