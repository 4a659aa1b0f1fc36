"""Each part of an evaluation computes float32 products in its own precision, whatever the process had set, and says so."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tarflow
import tarflow.evaluation.metrics.bits_per_dim
import tarflow.evaluation.samples.draw
from tarflow.evaluation.likelihood.per_image import likelihoods
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings
from tarflow.evaluation.networks.features import Features
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.worker.follow import evaluate
from tarflow.evaluation.worker.recipe import load_settings
from tarflow.models.float32 import products
from tarflow.models.flow import FlowBlock

Flags = tuple[str, bool]  # precision of matrix products; whether convolutions may be less than float32
OUTSIDE: Flags = ("medium", True)


def flags() -> Flags:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def as_somebody_has_left_them() -> Iterator[None]:
    with products("medium"):
        assert flags() == OUTSIDE
        yield
        assert flags() == OUTSIDE
    assert flags()[0] == "highest"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Flags]]:
    """The flags inside of each part."""
    found: dict[str, set[Flags]] = {}

    def listen(part: str, module: Any, name: str) -> None:
        real = getattr(module, name)

        def listening(*args: Any, **kwargs: Any) -> Any:
            found.setdefault(part, set()).add(flags())
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, listening)

    listen("sampling", tarflow.evaluation.samples.draw, "invert")
    listen("denoising", tarflow.evaluation.samples.draw, "denoise")
    listen("likelihood", tarflow.evaluation.metrics.bits_per_dim, "bits_per_dim")
    return found


@pytest.mark.usefixtures("fake_features")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_sampling_goes_by_its_setting_and_likelihoods_are_float32(make_run, seen, precision: str) -> None:
    run = make_run(steps=(10,), evaluation={"num_samples": 24, "grid": [3, 4], "matmul_precision": precision})[0]
    evaluate(run, False, log=lambda _: None)
    (path,) = (run / "evals").glob("*/result.json")
    assert json.loads(path.read_text())["float32"] == {
        "sampling": precision, "likelihood": "highest", "features": "highest"
    }  # fmt: skip
    sampling = (precision, precision != "highest")
    assert seen == {"sampling": {sampling}, "denoising": {sampling}, "likelihood": {("highest", False)}}


def test_features_are_float32() -> None:
    features, found = Features("efficientnet_lite0"), set()
    features._network.module.register_forward_pre_hook(lambda *_: found.add(flags()))
    features(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    assert found == {("highest", False)}


def test_only_another_precision_makes_another_result(make_run) -> None:
    """Results of earlier versions keep their names."""
    run = make_run(steps=(10,))[0]
    plain, other = (
        load_settings(run, [f"evaluation.matmul_precision={precision}"])[1] for precision in ("highest", "high")
    )
    assert "matmul_precision" not in plain.describe()["sampling"]
    assert plain.hash != other.hash
    assert ResolvedSampling(matmul_precision="high") != ResolvedSampling()


def test_whoever_asks_from_python_or_for_every_image_gets_float32(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(steps=(10,), evaluation={"matmul_precision": "high"})[0]
    flow, found, real = tarflow.load(run), set(), FlowBlock.forward

    def listening(self: FlowBlock, *args: Any, **kwargs: Any) -> Any:
        found.add(flags())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FlowBlock, "forward", listening)
    images = torch.zeros(2, *flow.config.image_shape, dtype=torch.uint8)
    for ask in (flow.log_prob, flow.bits_per_dim, flow.encode, flow.denoise):
        ask(images, 0)
        assert found == {("highest", False)}, ask
    ids = torch.arange(2)
    likelihoods(flow.model, [(images, ids, ids)], NoiseSettings("gaussian", 0.1))
    assert found == {("highest", False)}
