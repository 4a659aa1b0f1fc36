"""Whole runs of two real ranks: averages over a change of the world, randomness, a run whose gradient goes bad."""

import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import tarflow.trainer.train as set_up
from tarflow.data_pipeline.loading.batch import Batch
from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.files import load_config
from tarflow.trainer.config.schema import Config
from tarflow.trainer.ema.ema import power_decay
from tarflow.trainer.ema.posthoc import reconstruct
from tarflow.trainer.ema.snapshots import snapshots_dir
from tarflow.trainer.hooks import Hook
from tarflow.trainer.resilience.exit_codes import FINISHED, NO_PROGRESS, USAGE
from tarflow.trainer.step_inputs import StepInput, step_input
from tests.helpers.ranks import launch_ranks
from tests.helpers.runs import write_config

BATCH = 12


def train(config: Path, run: Path, overrides: list[str], hooks: Sequence[Hook] = ()) -> int:
    """A rank; its exit code."""
    return set_up.train(load_config(config, overrides), run, hooks=hooks)


def train_with_bad_noise(config: Path, run: Path, overrides: list[str], bad_rank: int, bad_from: int) -> int:
    """A rank; the noise of one of them is not finite from a position on."""

    class BadNoise(Hook):
        def on_batch(self, batch: StepInput) -> None:
            if int(os.environ["RANK"]) == bad_rank and batch.images_seen >= bad_from:
                batch.noise[0].fill_(float("nan"))

    return train(config, run, overrides, [BadNoise()])


def train_apart(config: Path, run: Path, overrides: list[str]) -> int:
    """A rank in a directory of its own, as on nodes that share no storage."""
    set_up.check_shared = partial(set_up.check_shared, patience_s=1)
    place = config.parent / f"node{os.environ['RANK']}"
    place.mkdir()
    os.chdir(place)
    return train(config, run, overrides)


@pytest.fixture
def config_file(tiny_data: Path, tmp_path: Path) -> Path:
    """Three classes: an embedding whose rows do not divide among two ranks. A checkpoint after each step."""
    return write_config(
        tmp_path / "config.yaml", tiny_data,
        train={"global_batch_size": BATCH, "max_images": 5 * BATCH, "noise_std": 0.1, "param_dtype": "float32"},
        optim={"lr": 1e-3, "warmup_images": 12},
        parallel={"backend": "fsdp2", "start_timeout_s": 60, "step_timeout_s": 60},
        ema={"relative_stds": [0.1], "decays": [0.9], "snapshot_every_images": BATCH},
        checkpoint={"every_images": BATCH, "keep_latest": -1},
    )  # fmt: skip


@pytest.mark.case("T06")
def test_sharded_averages_are_those_of_one_process_before_and_after_a_resume_on_one(
    config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for ranks, overrides in ((2, []), (1, [f"train.max_images={7 * BATCH}"])):
        ended = launch_ranks(train, ranks, config_file, run, overrides)
        assert ended.values == [FINISHED] * ranks, ended.output[-2000:]
    checkpoints = committed(run)
    assert [(c.step, c.info["world_size"]) for c in checkpoints] == [(k, 2) for k in range(1, 6)] + [(6, 1), (7, 1)]
    model = TarFlow(load_config(run / "config.yaml").model)
    init_weights(model, 0)
    constant = {name: p.detach().double() for name, p in model.named_parameters()}
    power = dict(constant)
    for checkpoint in checkpoints:  # the reference: one process, from the weights after each step
        raw = {n: t.double() for n, t in load_weights(checkpoint, "raw").items() if n != "var"}
        decay = power_decay(0.1, checkpoint.images_seen, BATCH)
        constant = {n: 0.9 * t + 0.1 * raw[n] for n, t in constant.items()}
        power = {n: decay * t + (1 - decay) * raw[n] for n, t in power.items()}
        for kind, truth in (("ema-decay-0.9", constant), ("ema-0.100", power)):
            snapshot = find(snapshots_dir(run), checkpoint.step)
            for stored in (load_weights(checkpoint, kind), load_weights(snapshot, kind)):
                assert stored.keys() - {"var"} == truth.keys()
                for name, value in truth.items():
                    assert stored[name].shape == value.shape
                    assert float((stored[name] - value).abs().max()) < 1e-6, (checkpoint.step, kind, name)
        assert any(not torch.equal(raw[n].float(), constant[n].float()) for n in raw)
    assert raw["blocks.0.class_embed"].shape[0] == 3
    made = load_weights_of(reconstruct(run, 0.1, 5, tmp_path / "made.safetensors", lambda _: None))
    stored = load_weights(find(run, 5), "ema-0.100")
    assert max(float((made[n] - stored[n]).abs().max()) for n in stored) < 1e-6


def load_weights_of(path: Path) -> dict[str, torch.Tensor]:
    from tarflow.models.weights import load_weights_file

    return load_weights_file(path)[1]


@pytest.mark.case("T14")
def test_a_run_that_goes_bad_on_one_rank_stops_all_and_saves_nothing_that_is_not_finite(
    config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = [f"train.max_images={20 * BATCH}", f"checkpoint.every_images={5 * BATCH}", "train.max_skipped_in_a_row=3",
                "ema.snapshot_every_images=0"]  # fmt: skip
    ended = launch_ranks(train_with_bad_noise, 2, config_file, run, settings, 1, 6 * BATCH)  # step 7 and all after it
    assert ended.values == [NO_PROGRESS] * 2, ended.output[-2000:]
    last = (run / "log.txt").read_text().splitlines()[-1]
    assert last.partition("  ")[2] in ended.output  # where a job looks for its reason
    assert "3 steps in a row had a gradient that was not finite" in last
    assert "train.max_skipped_in_a_row" in last
    assert 5 in [c.step for c in committed(run)]
    for checkpoint in committed(run):
        found = {}
        metadata: dict[str, Any] = dcp.FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
        for name, entry in metadata.items():
            found[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load(found, storage_reader=dcp.FileSystemReader(checkpoint.path), no_dist=True)
        assert all(torch.isfinite(t).all() for t in found.values()), checkpoint.name
        assert float(found["optim/step"]) == min(checkpoint.step, 6)
    ended = launch_ranks(train, 2, config_file, run, settings)  # whatever it was is over
    assert ended.values == [FINISHED] * 2, ended.output[-2000:]


@pytest.mark.case("T13")
def test_a_run_directory_that_the_ranks_do_not_share_is_refused_before_training(
    config_file: Path, tmp_path: Path
) -> None:
    ended = launch_ranks(train_apart, 2, config_file, Path("run"), [], may_fail=True)
    assert ended.codes == [USAGE] * 2, ended.output[-2000:]
    assert "is not the same place for all ranks: rank 1" in ended.output
    assert "give --run-dir a path on storage that every node shares" in ended.output
    assert committed(tmp_path / "node0" / "run") == []
    assert not (tmp_path / "node1" / "run" / "run.json").exists()


def noise_of(config: Config, world: int, seen: int) -> list[StepInput]:
    """What each rank of a world draws for one step, after using up as much randomness of its own as it likes."""
    per_rank, found = BATCH // world, []
    for rank in range(world):
        torch.manual_seed(rank)
        for _ in range(rank * world):  # ranks differ, and worlds
            torch.rand(7), np.random.rand(3), random.random()
        slots = torch.arange(rank * per_rank, (rank + 1) * per_rank)
        images = torch.zeros(per_rank, 1, 8, 8, dtype=torch.uint8)
        batch = Batch(images, labels=slots % 3, ids=slots, slots=slots, images_seen=seen)
        found.append(step_input(batch, config.train))
    return found


@pytest.mark.case("T09")
def test_noise_belongs_to_the_sample_not_to_a_rank_its_history_or_its_restarts(config_file: Path) -> None:
    config = load_config(config_file, ["train.label_dropout=0.5"])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    labels, slots = torch.zeros(2, dtype=torch.long), torch.arange(2)
    step_input(Batch(torch.zeros(2, 1, 8, 8), labels, ids=slots, slots=slots, images_seen=0), config.train)
    assert torch.equal(torch.get_rng_state(), before)  # nor does it move anybody else's randomness
    drawn = []
    for seen in (0, BATCH, 2 * BATCH):
        alone = noise_of(config, 1, seen)[0]
        for world in (2, 4, 3, 2):  # the last: a restart
            parts = noise_of(config, world, seen)
            assert torch.equal(torch.cat([p.noise for p in parts]), alone.noise)
            assert torch.equal(torch.cat([p.labels for p in parts]), alone.labels)
        drawn.append(alone)
    noise = torch.cat([d.noise.flatten(1) for d in drawn])
    assert len(torch.unique(noise, dim=0)) == 3 * BATCH  # no two samples, ranks or steps share any
    labels = torch.cat([d.labels for d in drawn])
    assert 0 < int((labels < 0).sum()) < 3 * BATCH
