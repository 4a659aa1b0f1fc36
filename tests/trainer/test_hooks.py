"""Hooks of the loop, scheduled garbage collection, traces of steps, peak memory, matmul precision."""

import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.checkpoint.marker import config_of
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.files import load_config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.hooks import Hook, ScheduledGC
from tarflow.trainer.resilience.exit_codes import FINISHED, REQUEUE
from tarflow.trainer.step_inputs import StepInput
from tarflow.trainer.train import train
from tests.helpers.ranks import launch_ranks

STEPS = 6


class Notes(Hook):
    """What it was told."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.steps: list[tuple[int, int]] = []
        self.collecting: list[bool] = []
        self.precisions: list[tuple[str, bool]] = []  # of matrix products; of convolutions: not float32
        self.closed = 0

    def on_batch(self, batch: StepInput) -> None:
        self.batches.append(batch.images_seen)

    def on_step(self, step: int, batch: StepInput) -> None:
        self.steps.append((step, batch.images_seen))
        self.collecting.append(gc.isenabled())
        self.precisions.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def interpreter_as_before() -> Iterator[None]:
    yield
    gc.enable()
    torch.set_float32_matmul_precision("highest")


def run(config: Path, folder: Path, *overrides: str) -> tuple[Notes, dict[str, bytes]]:
    """Train six steps; what a hook saw, and the weights at the end."""
    notes = Notes()
    settings = load_config(config, [f"train.max_images={STEPS * 16}", "log.every_steps=2", *overrides])
    assert train(settings, folder, hooks=[notes]) == FINISHED
    weights = load_weights(find(folder), "raw")
    return notes, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def optimizer_steps(events: list[dict[str, Any]]) -> int:
    """Steps in a trace. Torch hooks a step once more after tests that have replaced it: what is within another is the same."""
    steps = [event for event in events if event["name"] == "Optimizer.step#GuardedAdamW.step"]

    def holds(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
        end = inner["ts"] + inner["dur"]
        return outer is not inner and outer["ts"] <= inner["ts"] and end <= outer["ts"] + outer["dur"]

    return sum(not any(holds(other, step) for other in steps) for step in steps)


def test_hooks_traces_and_scheduled_collection_change_no_weight(tiny_config: Path, tmp_path: Path) -> None:
    plain, expected = run(tiny_config, tmp_path / "plain")
    assert plain.batches == [16 * step for step in range(STEPS)]
    assert plain.steps == [(step + 1, 16 * step) for step in range(STEPS)]
    assert plain.collecting == [True] * STEPS
    assert plain.closed == 1
    assert not (tmp_path / "plain/traces").exists()

    hooked, weights = run(
        tiny_config, tmp_path / "hooked", "train.gc_every_steps=2", "profile.start_step=3", "profile.end_step=4",
        "train.skip_images=[[16,32]]",
    )  # fmt: skip
    assert hooked.batches == plain.batches, "a skipped batch is seen"
    assert [seen for _, seen in hooked.steps] == [0, 32, 48, 64, 80], "its step is not"
    assert hooked.collecting == [False] * 5
    assert gc.isenabled()

    _, weights = run(
        tiny_config, tmp_path / "traced", "train.gc_every_steps=2", "profile.start_step=3", "profile.end_step=4"
    )
    assert weights == expected
    (trace,) = (tmp_path / "traced/traces").iterdir()
    assert trace.name == "steps-3-4-rank-0000.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert optimizer_steps(events) == 2
    assert any(event["name"] == "aten::addmm" for event in events)
    assert f"trace of steps 3 to 4: {trace}" in (tmp_path / "traced/log.txt").read_text()


def train_traced(config: Path, folder: Path, overrides: list[str]) -> tuple[int, list[bool]]:
    """A rank; its exit code, and whether Python collected garbage by itself at each step."""
    notes = Notes()
    return train(load_config(config, overrides), folder, hooks=[notes]), notes.collecting


def test_every_rank_traces_and_collects_at_the_same_steps(tiny_config: Path, tmp_path: Path) -> None:
    settings = ["train.max_images=64", "profile.start_step=2", "profile.end_step=3", "train.gc_every_steps=2"]
    ended = launch_ranks(train_traced, 2, tiny_config, tmp_path / "run", settings)
    assert ended.values == [(FINISHED, [False] * 4)] * 2, ended.output[-2000:]
    names = [path.name for path in sorted((tmp_path / "run/traces").iterdir())]
    assert names == ["steps-2-3-rank-0000.json", "steps-2-3-rank-0001.json"]
    for name in names:
        events = json.loads((tmp_path / "run/traces" / name).read_text())["traceEvents"]
        assert optimizer_steps(events) == 2
    assert "rank-0001.json" in (tmp_path / "run/logs/rank-0001.log").read_text()


def test_a_resumed_run_takes_the_new_settings_of_speed_and_ends_with_the_same_bits(
    tiny_config: Path, tmp_path: Path
) -> None:
    class StopAfterThree(Hook):
        def on_step(self, step: int, batch: StepInput) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    _, expected = run(tiny_config, tmp_path / "whole")
    first = [f"train.max_images={STEPS * 16}", "log.every_steps=2", "train.gc_every_steps=2"]
    assert train(load_config(tiny_config, first), tmp_path / "run", hooks=[StopAfterThree()]) == REQUEUE
    at = find(tmp_path / "run").step
    assert 3 <= at < STEPS
    _, weights = run(tiny_config, tmp_path / "run", "profile.start_step=2", "profile.end_step=5")
    assert weights == expected
    log = (tmp_path / "run/log.txt").read_text()
    assert "changed: train.gc_every_steps: 2 -> 0" in log
    assert "changed: profile.end_step: 0 -> 5" in log
    assert f"no trace: this start resumes after profile.start_step=2, at step {at}" in log


def test_a_trace_that_cannot_be_written_costs_the_trace_and_not_the_run(tiny_config: Path, tmp_path: Path) -> None:
    class TakeTheName(Hook):
        def on_batch(self, batch: StepInput) -> None:
            (tmp_path / "run/traces").write_text("a file")

    settings = load_config(tiny_config, ["train.max_images=48", "profile.start_step=2", "profile.end_step=2"])
    assert train(settings, tmp_path / "run", hooks=[TakeTheName()]) == FINISHED
    assert "WARNING: no trace of steps 2 to 2: " in (tmp_path / "run/log.txt").read_text()


def test_the_precision_of_matrix_products_is_set_stored_and_may_change(tiny_config: Path, tmp_path: Path) -> None:
    notes, _ = run(tiny_config, tmp_path / "run", "train.max_images=48", "train.matmul_precision=high")
    assert notes.precisions == [("high", True)] * 3
    assert torch.get_float32_matmul_precision() == "highest"  # as it was before
    assert config_of(find(tmp_path / "run")).train.matmul_precision == "high"
    notes, _ = run(tiny_config, tmp_path / "run")
    assert notes.precisions == [("highest", False)] * 3
    assert "changed: train.matmul_precision: high -> highest" in (tmp_path / "run/log.txt").read_text()
    with pytest.raises(TrainerError, match=r"train.matmul_precision.*'highest', 'high' or 'medium'"):
        load_config(tiny_config, ["train.matmul_precision=low"])


def test_a_trace_that_cannot_be_complete_is_said(tiny_config: Path, tmp_path: Path) -> None:
    run(tiny_config, tmp_path / "run", "profile.start_step=5", "profile.end_step=9")
    assert "the run ended before profile.end_step=9" in (tmp_path / "run/log.txt").read_text()
    assert not (tmp_path / "run/traces").exists()
    with pytest.raises(TrainerError, match=r"profile.end_step=3 must be between profile.start_step=5 and 104"):
        load_config(tiny_config, ["profile.start_step=5", "profile.end_step=3"])


def test_garbage_is_collected_at_multiples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = ScheduledGC(3)
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: collected.append(generation))
    for step in range(1, 8):
        hook.on_step(step, None)  # type: ignore[arg-type]
    assert collected == [1, 1]
    assert not gc.isenabled()
    hook.close()
    assert gc.isenabled()


def test_peak_memory_is_in_the_metrics_and_the_line(tiny_config: Path, tmp_path: Path) -> None:
    run(tiny_config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    peaks = [row["memory/peak_rss_gb"] for row in rows if "train/loss" in row]
    assert len(peaks) == 3
    assert 0.1 < peaks[0] <= peaks[-1] < 24
    assert f"| peak RSS {peaks[-1]:.1f} GB" in (tmp_path / "run/log.txt").read_text()
