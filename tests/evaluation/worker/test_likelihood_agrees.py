"""One figure of bits per dimension: for any number of workers and any batch size, and the same that the training shows."""

import itertools
import json
import multiprocessing
import os

import pytest
import torch

from tarflow.data_pipeline.loading.loader import Loader
from tarflow.data_pipeline.loading.shape import BatchShard, ImageShape
from tarflow.evaluation.metrics import bits_per_dim as likelihood
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings, measure_bits_per_dim
from tarflow.evaluation.samples.weights_source import from_checkpoint
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.models.randomness import keyed_normal, keyed_uniform
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.config.files import load_config

fork = multiprocessing.get_context("fork")


def work(run_dir):
    torch.set_num_threads(1)
    evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    os._exit(0)


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
@pytest.mark.case("S08")
def test_the_figure_is_the_same_for_1_2_3_workers_and_batches_of_1_7_64(make_run, fake_features, noise):
    """Whole runs with real processes: 12 held-out images in chunks of 5, 5 and 2."""
    found = []
    for workers, batch_size in ((1, 1), (2, 7), (3, 64)):
        run_dir, _ = make_run(
            steps=(20,), name=f"run-{workers}-{batch_size}", train={"noise": noise},
            sampling={"batch_size": batch_size, "guidance": 0},
            evaluation={"num_samples": 15, "chunk_samples": 5, "neighbour_samples": 0, "grid": [1, 1]},
        )  # fmt: skip
        processes = [fork.Process(target=work, args=(run_dir,)) for _ in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        result = json.loads((run_dir / "evals/images-000000000320/result.json").read_text())
        assert (result["likelihood"]["images"], result["likelihood"]["draws"]) == (12, 4)
        weighted = result["likelihood"]["importance_weighted_bits_per_dim"]
        assert (weighted is None) == (noise == "gaussian")
        found.append((result["bits_per_dim"], result["bits_per_dim_stderr"], weighted or 0.0))
    for figures in found[1:]:
        assert figures == pytest.approx(found[0], abs=1e-6)


@pytest.mark.parametrize(
    ("noise", "param_dtype"), list(itertools.product(["gaussian", "uniform"], ["float32", "bfloat16"]))
)
def test_the_trainings_own_figure_is_the_evaluated_one(digit_like, tmp_path, monkeypatch, noise, param_dtype):
    """A real run that logs every step: the figure of step 6 is of the weights saved at step 5, on batch 6."""
    import tarflow.cli

    tree = [
        f"data.train={digit_like / 'train'}", "train.global_batch_size=24", "train.max_images=144",
        "train.label_dropout=0", f"train.noise={noise}", f"train.param_dtype={param_dtype}", "optim.lr=3e-3",
        "optim.warmup_images=24", "checkpoint.every_images=120", "log.every_steps=1", "log.tensorboard=false",
    ]  # fmt: skip
    (tmp_path / "c.yaml").write_text(
        "data: {train: x}\nmodel: {image_size: 8, patch_size: 4, in_channels: 1, channels: 16, num_blocks: 2, "
        "layers_per_block: 1, head_channels: 8, num_classes: 3}\ntrain: {global_batch_size: 24, max_images: 144}\n"
    )
    run_dir = tmp_path / "run"
    assert tarflow.cli.main(["train", str(tmp_path / "c.yaml"), "--run", str(run_dir), *tree]) == 0
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (live,) = [row["train/bits_per_dim"] for row in rows if row.get("step") == 6 and "train/bits_per_dim" in row]

    config = load_config(run_dir / "config.yaml")
    source = from_checkpoint(config, find(run_dir, 5), "raw", torch.device("cpu"))
    with Loader(config.data, ImageShape(8, 1, 3), BatchShard(24, images_seen=120, seed=config.train.seed)) as loader:
        batch = next(iter(loader))
    draw = keyed_uniform if noise == "uniform" else keyed_normal

    def trainings_noise(seed, stream, step, ids, shape):
        """The training keys its noise by position, the evaluation by sample."""
        assert ids == batch.ids.tolist()
        return draw(config.train.seed, "noise", 0, range(120, 144), shape)

    monkeypatch.setattr(likelihood, f"keyed_{'uniform' if noise == 'uniform' else 'normal'}", trainings_noise)
    settings = NoiseSettings(noise, config.train.noise_std)
    found = measure_bits_per_dim(source.model, [(batch.images, batch.labels, batch.ids)], settings)
    first = next(row["train/bits_per_dim"] for row in rows if "train/bits_per_dim" in row)
    assert abs(live - first) > 0.01, "the weights have moved"
    assert found["bits_per_dim"] == pytest.approx(live, abs=1e-3)
