"""One of 1,024 ranks on this machine: the plan of the largest model against the cost model."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import tarflow.trainer.config.schema as settings
from benchmarks.fake_ranks import QUICK
from benchmarks.golden import training_config
from tarflow.models.config import TarFlowConfig
from tarflow.models.cost import largest_piece, parameters, peak_rate
from tarflow.models.flow import TarFlow
from tarflow.trainer.batch import plan_batch
from tarflow.trainer.config.files import load_config
from tarflow.trainer.parallel.memory import rank_memory
from tarflow.trainer.parallel.mesh import mesh_shape
from tarflow.trainer.parallel.zero import zero_config
from tarflow.trainer.plan import describe
from tarflow.trainer.resilience.exit_codes import FINISHED
from tarflow.trainer.tracking.choose import wandb_tracker
from tarflow.trainer.train import train
from tests.helpers.warm import warm

ROOT = Path(__file__).resolve().parents[3]


def test_one_of_1024_ranks_of_the_largest_model_holds_what_the_cost_model_says(tmp_path: Path) -> None:
    """In a process of its own: the fake process group would be this one's. A host sync in the step would fail it, too."""
    done = subprocess.run(
        warm("benchmarks.fake_ranks", "--quick", "--check", "--json", str(tmp_path / "out.json")),
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    plans: dict[str, dict[str, list[float]]] = {}
    for plan, kind, *numbers in json.loads((tmp_path / "out.json").read_text())["rows"]:
        plans.setdefault(plan, {})[kind] = numbers
    assert plans.keys() == set(QUICK)
    assert [plan for plan, rows in plans.items() if "held" in rows] == ["ZeRO-3, none, 1 micro-batches"]
    for plan, rows in plans.items():
        assert rows.keys() >= {"total", "optimizer", "averages"}
        for kind, (counted, expected, *_) in rows.items():
            assert counted == pytest.approx(expected, rel=0.1), (plan, kind)


@pytest.mark.parametrize("pieces", [1, 3, 8, 1000])
def test_largest_piece_counts_rows_as_torch_cuts_them(pieces: int) -> None:
    shape = TarFlowConfig(image_size=12, patch_size=3, channels=128, num_blocks=2, layers_per_block=1, num_classes=7)
    with torch.device("meta"):
        whole = list(TarFlow(shape).parameters())
    assert largest_piece(shape, pieces) == sum(p.chunk(pieces)[0].numel() for p in whole)
    assert largest_piece(shape, 1) == parameters(shape)
    assert largest_piece(shape, pieces) >= parameters(shape) / pieces


def test_offloaded_inputs_leave_the_estimate_of_the_device() -> None:
    shape = TarFlowConfig(image_size=32, patch_size=2, channels=128, num_blocks=4, layers_per_block=4)
    kept, moved = (
        rank_memory(training_config(shape, activation_checkpoint={"mode": "full", "offload": o}), 1)
        for o in (False, True)
    )
    inputs = 8 * 16 * shape.num_tokens * shape.channels * 4  # images x layers x tokens x channels x float32
    assert kept.activations - moved.activations == inputs
    assert moved.activations > 0


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),  # not an A10
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce RTX 2080 Ti", None),
    ],
)
def test_peak_rates_by_the_name_that_the_driver_gives(name: str, rate: float | None) -> None:
    assert peak_rate(name) == rate


SECTIONS: dict[str, Any] = {
    "train": settings.TrainConfig, "optim": settings.OptimConfig, "parallel": settings.ParallelConfig,
    "activation_checkpoint": settings.ActivationCheckpointConfig, "compile": settings.CompileConfig,
    "ema": settings.EMAConfig, "checkpoint": settings.CheckpointConfig, "log": settings.LogConfig,
}  # fmt: skip


def test_every_setting_of_training_is_read_when_a_run_is_planned_and_made(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its name somewhere in the text, but by the code that runs: each is looked at."""
    read: set[str] = set()

    def noting(section: str) -> object:
        def look(self: object, name: str) -> object:
            read.add(f"{section}.{name}")
            return object.__getattribute__(self, name)

        return look

    wanted = {f"{section}.{name}" for section, kind in SECTIONS.items() for name in kind.model_fields}
    config = load_config(
        tiny_config,
        ["train.max_images=64", "optim.warmup_images=16", "activation_checkpoint.mode=selective", "checkpoint.asynchronous=false",
         "train.skip_images=[[16, 32]]"],
    )  # fmt: skip
    many_levels = load_config(
        tiny_config,
        ["train.max_images=32", "model.noise_conditioning=true", "train.noise_std=0", "train.noise_range=[0.05, 0.5]",
         "train.noise_distribution=log_normal"],
    )  # fmt: skip
    for section, kind in SECTIONS.items():
        monkeypatch.setattr(kind, "__getattribute__", noting(section), raising=False)
    config.model_dump(mode="json")
    assert not wanted & read  # writing a configuration down does not count
    assert train(config, tmp_path / "run") == FINISHED
    assert train(many_levels, tmp_path / "levels") == FINISHED
    wandb_tracker(config.log.model_copy(update={"wandb": "offline"}), tmp_path / "run", "training")
    describe(config, 2)
    mesh_shape(config.parallel, 1)
    zero_config(config, plan_batch(16, 1, 0))
    assert sorted(wanted - read) == []
