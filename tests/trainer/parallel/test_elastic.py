"""A run goes on at any world size and in any backend as if it had been one.

Real processes over gloo. The reference is one uninterrupted process in float32.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import tarflow.trainer.loop as loop
from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.files import load_config
from tarflow.trainer.resilience.exit_codes import FINISHED
from tests.helpers.ranks import launch_ranks
from tests.helpers.runs import write_config

# (ranks, backend, steps until which it trains): every leg resumes what the one before saved.
BATCH = 12
WORLDS = [(4, "fsdp2", 4), (2, "fsdp2", 8), (1, "ddp", 12), (3, "fsdp2", 16)]
BACKENDS = [(2, "ddp", 4), (2, "fsdp2", 8), (2, "deepspeed", 12), (2, "fsdp2", 16)]
STEPS = 16


def train_and_note(config: Path, overrides: list[str], run: Path) -> int:
    """A rank: train as `tarflow train` does, and write down which samples this rank gets; the exit code."""
    prefetch_inputs = loop.prefetch_inputs

    def noting(loader: Any, *args: Any, **options: Any) -> Any:
        def batches() -> Iterator[Any]:
            for batch in loader:
                with open(run / "ids.jsonl", "a") as file:
                    file.write(json.dumps([batch.images_seen, batch.slots.tolist(), batch.ids.tolist()]) + "\n")
                yield batch

        return prefetch_inputs(batches(), *args, **options)

    loop.prefetch_inputs = noting
    return loop.train(load_config(config, overrides), run)


def train(config: Path, run: Path, legs: list[tuple[int, str, int]]) -> None:
    """Leg after leg: so many ranks of a backend, until a step."""
    for ranks, backend, until in legs:
        overrides = [f"parallel.backend={backend}", f"train.max_images={until * BATCH}"]
        ended = launch_ranks(train_and_note, ranks, config, overrides, run)
        assert ended.values == [FINISHED] * ranks, (ranks, backend, until, ended.output[-2000:])


@pytest.fixture(scope="module")
def elastic_config(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The schedule reaches its end in the warm-up, so that it does not depend on the length of a leg."""
    return write_config(
        tmp_path_factory.mktemp("elastic") / "elastic.yaml", tiny_data,
        train={"global_batch_size": BATCH, "max_images": STEPS * BATCH, "noise_std": 0.1, "param_dtype": "float32", "grad_clip": 1.0},
        optim={"lr": 1e-3, "warmup_images": 10_000}, checkpoint={"every_images": 4 * BATCH, "keep_latest": -1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(elastic_config: Path) -> Path:
    run = elastic_config.parent / "reference"
    train(elastic_config, run, [(1, "ddp", STEPS)])
    return run


def losses(run: Path) -> dict[int, tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: (r["train/loss"], r["optim/lr"]) for r in rows if "train/loss" in r}


def samples(run: Path) -> dict[int, dict[int, int]]:
    """images_seen -> slot -> id, of the positions that were trained."""
    found: dict[int, dict[int, int]] = {}
    for line in (run / "ids.jsonl").read_text().splitlines():
        position, slots, ids = json.loads(line)
        if position < STEPS * BATCH:
            for slot, number in zip(slots, ids):
                assert found.setdefault(position, {}).setdefault(slot, number) == number
    return found


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    path = find(run, step).path
    metadata: dict[str, Any] = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return found


@pytest.mark.parametrize("legs", [WORLDS, BACKENDS], ids=["4-2-1-3 ranks", "ddp-fsdp2-zero3-fsdp2"])
@pytest.mark.case("T05", "T06", "T08", "T09")
def test_a_run_goes_on_in_another_world_as_if_nothing_happened(
    elastic_config: Path, reference: Path, tmp_path: Path, legs: list[tuple[int, str, int]]
) -> None:
    run = tmp_path / "run"
    train(elastic_config, run, legs)
    assert [c.info["world_size"] for c in committed(run)] == [ranks for ranks, _, _ in legs]
    ours, theirs = losses(run), losses(reference)
    assert list(ours) == list(range(1, STEPS + 1))
    for step, (loss, lr) in ours.items():
        assert loss == pytest.approx(theirs[step][0], abs=1e-5), step
        assert lr == pytest.approx(theirs[step][1], rel=1e-12), step
    assert samples(run) == samples(reference)
    for step in (4, 8, 12, 16):
        a, b = tensors(run, step), tensors(reference, step)
        assert a.keys() == b.keys()
        for name in a:
            kind = name.split("/")[0]
            if kind == "optim" or kind.startswith("ema"):
                assert torch.allclose(a[name], b[name], rtol=0, atol=1e-6), (step, name)
    assert torch.equal(a["optim/step"], torch.tensor(float(STEPS)))


@pytest.mark.case("T06")
def test_averages_and_raw_weights_stay_apart_over_a_resume_and_an_export(reference: Path) -> None:
    raw, narrow, wide = (load_weights(find(reference), kind) for kind in ("raw", "ema-0.050", "ema-0.100"))
    for name in raw:
        if name != "var":
            assert not torch.equal(raw[name], narrow[name]), name
            assert not torch.equal(narrow[name], wide[name]), name
