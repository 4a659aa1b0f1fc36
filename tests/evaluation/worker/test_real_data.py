"""The whole worker with nothing replaced: real digits, 28 px, grey, and a real feature network."""

import json

import pytest

from tarflow.trainer.config.files import parse_config
from tarflow.trainer.run_dir import create_run, save_config
from tests.helpers.data import digits, prepared


@pytest.fixture(scope="module")
def digit_set(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("digits"), *digits(every=50), size=28, val_fraction=0.2)


def test_a_checkpoint_of_a_tiny_model_is_scored_on_real_digits(digit_set, tmp_path, save_checkpoint):
    from tarflow.evaluation.report.build import write_report
    from tarflow.evaluation.worker.follow import WorkerOptions, evaluate

    config = parse_config(
        {
            "data": {"train": str(digit_set / "train"), "validation": str(digit_set / "val")},
            "model": {
                "image_size": 28, "patch_size": 7, "in_channels": 1, "channels": 32, "head_channels": 16,
                "num_blocks": 2, "layers_per_block": 1, "num_classes": 10,
            },
            "train": {"global_batch_size": 10, "max_images": 100, "noise_std": 0.1, "param_dtype": "float32"},
            "sampling": {"guidance": 2.0, "param_dtype": "bfloat16"},
            "evaluation": {"num_samples": 30, "reference_images": 40, "grid": [10, 3]},
        },
        "test",
    )  # fmt: skip
    run_dir = tmp_path / "run"
    create_run(run_dir)
    save_config(run_dir, config)
    save_checkpoint(run_dir, config, 10, 100, scale=0.02)
    outcome = evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    assert outcome.failed == {}
    result = json.loads((run_dir / "evals/images-000000000100/result.json").read_text())
    assert result["features"]["sha256"].startswith("579344248a93")
    assert result["reference"]["images_used"] == 40
    assert result["fd_efficientnet_lite0"] > 5  # nothing was trained: far from digits
    assert 0 <= result["label_agreement"] < 0.6
    assert len(result["warnings"]) == 2  # fewer images than features, on both sides
    assert result["samples"]["retried_in_float32"] == 0
    assert write_report(run_dir).stat().st_size > 50_000


@pytest.fixture(scope="module")
def halves():
    """Two disjoint halves of 20 digits each, uint8 [20, 1, 28, 28], classes alike."""
    import torch

    images, _ = digits(every=124)
    pixels = torch.from_numpy(images[:40, None])
    return pixels[::2], pixels[1::2]


@pytest.mark.parametrize("network", ["efficientnet_lite0", "mobilenet_v2"])
def test_the_distance_grows_with_damage_to_real_images(halves, network):
    """Two disjoint halves are nearer to each other than a half is to the other one blurred, or with noise; more noise, farther."""
    import torch
    from torchvision.transforms.v2.functional import gaussian_blur

    from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics, frechet_distance
    from tarflow.evaluation.metrics.kernel_distance import kernel_distance
    from tarflow.evaluation.networks.features import Features

    first, second = halves
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(second.shape, generator=rng)

    def noisy(std):
        return (second + std * noise).round().clamp(0, 255).to(torch.uint8)

    features = Features(network)
    rows = {
        "first": features(first),
        "second": features(second),
        "blur": features(gaussian_blur(second, [5, 5], [1.0, 1.0])),
        "noise 8": features(noisy(8)),
        "noise 32": features(noisy(32)),
    }
    statistics = {name: FeatureStatistics(features.dim // 4) for name in rows}
    for name, part in rows.items():
        statistics[name].add(part[:, ::4])  # the roots of whole matrices take the most of the time
    names = [name for name in rows if name != "first"]
    frechet = {name: frechet_distance(statistics["first"], statistics[name]).distance for name in names}
    kernel = {name: kernel_distance(rows["first"], rows[name]).distance for name in names}
    for distances in (frechet, kernel):
        assert distances["second"] < distances["blur"], distances
        assert distances["second"] < distances["noise 8"] < distances["noise 32"], distances
