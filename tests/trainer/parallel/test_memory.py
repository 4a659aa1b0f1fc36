"""The plan of memory: against an H100's allocator, and as what configurations choose by it."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.golden import training_config
from tarflow.evaluation import batches
from tarflow.models.cost import batch_that_fits, parameters
from tarflow.models.presets import preset
from tarflow.trainer.config.files import load_config
from tarflow.trainer.parallel.memory import fits, rank_memory, reshards
from tarflow.trainer.plan import describe, evaluation_stages, evaluation_weights

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml"))
# Peak GB of one rank through the sharded backend on an H100, 32 images (benchmarks/results/h100-gpu.jsonl).
SEEN = {"selective": 46.88, "none": 62.76, "full": 15.04}


@pytest.mark.parametrize("mode", SEEN)
def test_the_plan_is_within_a_tenth_of_what_a_gpu_allocated(mode: str) -> None:
    config = training_config(
        preset("imagenet64-2-768-8-8"),
        train={"global_batch_size": 32, "max_images": 10**6, "param_dtype": "bfloat16"},
        activation_checkpoint={"mode": mode},
    )
    assert rank_memory(config, 1).allocated / 1e9 == pytest.approx(SEEN[mode], rel=0.1)


def plan(micro_batch: int, **parallel: Any) -> Any:
    config = training_config(
        preset("imagenet256-8-1280-8-8"),
        train={"global_batch_size": 1024, "micro_batch_size": micro_batch, "param_dtype": "bfloat16"},
        parallel={"backend": "fsdp2", "dp_shard": 8, **parallel},
    )
    return rank_memory(config, 128)


def test_accumulation_holds_whole_gradients_in_the_dtype_of_their_reduction() -> None:
    assert plan(2).gradients == pytest.approx(8 * plan(8).gradients, rel=0.01)
    assert plan(2, reduce_dtype="bfloat16").gradients == pytest.approx(plan(2).gradients / 2, rel=0.01)


def test_weights_are_kept_where_the_stated_device_has_room_and_the_plan_says_so() -> None:
    shape = preset("imagenet256-8-1280-8-8")
    for size, freed in ((0, True), (10, True), (80, False)):
        parallel = {"backend": "fsdp2", "dp_shard": 8, "device_memory_gb": size}
        train = {"global_batch_size": 256, "param_dtype": "bfloat16"}
        config = training_config(shape, train=train, parallel=parallel)
        assert reshards(config, 128) == freed, size
        assert ("weights freed after" if freed else "weights kept from") in describe(config, 128)
        assert ("DOES NOT FIT" in describe(config, 128)) == (size == 10)


@pytest.mark.parametrize("path", [p for p in CONFIGS if not p.stem.startswith("demo")], ids=lambda p: p.stem)
def test_every_configuration_recomputes_as_little_as_its_stated_device_allows(path: Path) -> None:
    config = load_config(path)
    assert config.parallel.device_memory_gb
    ranks = config.parallel.world_size
    room = [
        mode
        for mode in ("none", "selective", "full")
        if fits(load_config(path, [f"activation_checkpoint.mode={mode}"]),
                rank_memory(load_config(path, [f"activation_checkpoint.mode={mode}"]), ranks))
    ]  # fmt: skip
    assert config.activation_checkpoint.mode == room[0], room


def test_the_largest_configuration_also_runs_on_sixteen_nodes_of_eight() -> None:
    config = load_config(next(p for p in CONFIGS if p.stem == "imagenet256-cond"))
    assert "128 ranks x 1 micro-batch x 8 images" in describe(config, 128)


def test_the_plan_says_what_an_evaluation_worker_holds_and_takes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(p for p in CONFIGS if p.stem == "pixels1024-16")
    config = load_config(path, ["parallel.device_memory_gb=24"])
    stages, weights = evaluation_stages(config), evaluation_weights(config)
    assert weights == 6 * parameters(config.model)  # float32, and the bfloat16 that samples
    (line,) = [line for line in describe(config).splitlines() if line.startswith("evaluation")]
    monkeypatch.setattr(batches, "free_bytes", lambda _: 24e9 - weights)
    for stage in ("denoising", "likelihood"):
        worker = batches.Batches(log=lambda _: None)
        worker.run(stage, config.sampling.batch_size, lambda part: part, stages[stage])
        images = worker.used[stage]
        split = f"{images} of 64" if images < 64 else "64"
        assert f"{stage} {split} images {images * stages[stage] / 2**30:.2f} GiB" in line
    fits = batch_that_fits(24e9 - weights, stages["sampling"])
    whole = (
        f"sampling 64 images {64 * stages['sampling'] / 2**30:.2f} GiB (DOES NOT FIT: set sampling.batch_size={fits})"
    )
    assert whole in line
    assert "sampling.batch_size" not in describe(load_config(path))
    assert " of 64 images" not in describe(load_config(path, ["parallel.device_memory_gb=0"]))
    assert "denoising" not in describe(load_config(path, ["sampling.denoise=0"]))
