"""The loop: it learns, it resumes bit for bit after kill -9, and what may change on resume is said or refused.

Real processes, real kills.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.files import load_config
from tarflow.trainer.resilience.exit_codes import FINISHED, REQUEUE
from tarflow.trainer.schedule import learning_rate
from tests.helpers.ranks import tarflow
from tests.helpers.warm import warm


def command(config: Path, run: Path, *overrides: str) -> list[str]:
    return warm("tarflow", "train", config, "--run", run, *overrides)


def train(config: Path, run: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return tarflow("train", config, "--run", run, *overrides)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in rows(run) if "train/loss" in r}


def assert_same_state(a: Path, b: Path) -> None:
    """Every tensor of the newest checkpoints (weights, averages, moments) equal to the last bit."""
    for kind in ("raw", "ema-0.050", "ema-0.100"):
        ours, theirs = load_weights(find(a), kind), load_weights(find(b), kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours), kind
    assert find(a).images_seen == find(b).images_seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"dir": tmp_path_factory.mktemp("whole")}


def uninterrupted(whole: dict[str, Path], config: Path) -> Path:
    """One run from start to end, shared by the tests of this module."""
    if "run" not in whole:
        whole["run"] = whole["dir"] / "run"
        done = train(config, whole["run"])
        assert done.returncode == FINISHED, done.stderr[-800:]
    return whole["run"]


def test_loss_falls_and_every_weight_moves(tiny_config: Path, whole: dict[str, Path]) -> None:
    run = uninterrupted(whole, tiny_config)
    curve = losses(run)
    assert list(curve) == [5, 10, 15, 20, 25, 30]
    assert curve[30] < curve[5] - 0.2
    row = next(r for r in rows(run) if r.get("step") == 30 and "train/loss" in r)
    assert row["images_seen"] == 480
    assert row["train/loss"] == pytest.approx(0.5 * row["train/mse_z"] - row["train/logdet"], abs=1e-4)
    assert row["train/bits_per_dim"] == pytest.approx(row["train/loss"] / 0.6931472 + 8.32575, abs=1e-4)
    first, last = load_weights(committed(run)[0], "raw"), load_weights(find(run), "raw")
    still = [n for n in last if n != "var" and torch.equal(first[n], last[n])]
    assert still == []
    assert [c.step for c in committed(run)] == [25, 30]  # keep_latest = 2


@pytest.mark.case("S11")
def test_a_trained_model_inverts(tiny_config: Path, whole: dict[str, Path]) -> None:
    from tarflow.models.sampling.sequential import sample
    from tarflow.models.weights import load_model

    run = uninterrupted(whole, tiny_config)
    model = load_model(load_config(run / "config.yaml").model, load_weights(find(run), "raw"))
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.arange(16) % 4 - 1
    with torch.no_grad():
        z, logdet = model(x, y)
        assert (sample(model, z / model.var.sqrt(), y) - x).abs().max() <= 1e-4
    assert logdet.abs().min() > 0.1  # trained: not the identity


@pytest.mark.case("D10")
def test_killed_mid_way_and_started_again_equals_the_uninterrupted_run(
    tiny_config: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    expected = uninterrupted(whole, tiny_config)
    run, kills = tmp_path / "run", 0
    for wanted in (1, 3):  # die after so many commits, somewhere in a later step
        process = subprocess.Popen(
            command(tiny_config, run),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        while process.poll() is None:
            saves = [r for r in rows(run) if r.get("event") == "save"] if (run / "metrics.jsonl").exists() else []
            if len(saves) >= wanted:
                process.kill()
                process.wait()
                kills += 1
                break
            time.sleep(0.005)
    assert kills == 2
    done = train(tiny_config, run)
    assert done.returncode == FINISHED, done.stderr[-800:]
    assert "resuming at" in done.stdout
    resumed = [r["images_seen"] for r in rows(run) if r.get("event") == "resume"]
    assert len(resumed) == 2
    assert all(seen % 80 == 0 and seen > 0 for seen in resumed)
    assert_same_state(run, expected)
    for step, loss in losses(run).items():
        if step > resumed[-1] // 16 + 5:
            assert loss == losses(expected)[step]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.case("C07")
def test_a_signal_saves_at_the_next_step_and_says_so(
    tiny_config: Path, whole: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(tiny_config, run),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5 "):
            process.send_signal(number)
            break
    output = process.stdout.read()
    assert process.wait() == REQUEUE
    assert f"stopped by {number.name}" in output
    assert 80 <= find(run).images_seen < 480
    if number == signal.SIGTERM:
        assert train(tiny_config, run).returncode == FINISHED
        assert_same_state(run, uninterrupted(whole, tiny_config))


def test_finished_run_started_again_does_nothing_and_a_longer_one_goes_on(tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(tiny_config, run, "train.max_images=160").returncode == FINISHED
    before = (run / "checkpoints" / "images-000000000160" / "COMMITTED").stat().st_mtime_ns
    again = train(tiny_config, run, "train.max_images=160")
    assert again.returncode == FINISHED
    assert "is finished, images-000000000160 has 160 of train.max_images=160" in again.stdout
    assert (run / "checkpoints" / "images-000000000160" / "COMMITTED").stat().st_mtime_ns == before
    longer = train(tiny_config, run, "train.max_images=320", "optim.lr=5e-4")
    assert longer.returncode == FINISHED
    assert "changed: train.max_images: 160 -> 320" in longer.stdout
    assert "changed: optim.lr: 0.001 -> 0.0005" in longer.stdout
    rates = {r["step"]: r["optim/lr"] for r in rows(run) if "optim/lr" in r}
    new = load_config(run / "config.yaml").optim
    assert rates[15] == learning_rate(new, 240, 32, 320)  # the new rate, on the new schedule
    assert rates[15] > 5e-5  # a longer run is not at its end


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.channels=128", "model.channels: 64 in the checkpoint, 128 now"),
        ("model.num_blocks=3", "model.num_blocks: 2 in the checkpoint, 3 now"),
        ("ema.relative_stds=[0.05]", "ema.relative_stds: [0.05, 0.1] in the checkpoint, [0.05] now"),
    ],
)
@pytest.mark.case("K03")
def test_structural_changes_are_refused_before_loading(
    tiny_config: Path, whole: dict[str, Path], override: str, message: str
) -> None:
    run = uninterrupted(whole, tiny_config)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (run / "checkpoints").rglob("*"))
    done = train(tiny_config, run, override)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (run / "checkpoints").rglob("*")) == before
    assert load_config(run / "config.yaml").model.channels == 64


@pytest.mark.case("K03")
def test_another_data_set_is_refused_unless_accepted(tiny_config: Path, tiny_data: Path, tmp_path: Path) -> None:
    import numpy as np

    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import Options, prepare

    np.savez(tmp_path / "o.npz", images=np.zeros((40, 8, 8, 1), np.uint8), labels=np.arange(40) % 3)
    prepare(open_source(tmp_path / "o.npz"), tmp_path / "other", Options(size=8))
    run = tmp_path / "run"
    assert train(tiny_config, run, "train.max_images=160").returncode == FINISHED
    longer = ("train.max_images=240", f"data.train={tmp_path / 'other'}")
    refused = train(tiny_config, run, *longer)
    assert refused.returncode == 2
    assert "is another one than at 160 images" in refused.stderr
    accepted = train(tiny_config, run, *longer, "--accept-new-data")
    assert accepted.returncode == FINISHED
    assert "changed: the data set" in accepted.stdout


@pytest.mark.case("T15")
def test_a_checkpoint_that_does_not_load_stops_the_run_instead_of_starting_over(
    tiny_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(tiny_config, run, "train.max_images=160").returncode == FINISHED
    for file in (run / "checkpoints").glob("images-*/*.distcp"):  # same size, other bytes in the place of tensors
        file.write_bytes(os.urandom(file.stat().st_size))
    done = train(tiny_config, run)
    assert done.returncode == 2
    assert "starting from fresh weights" not in done.stdout
    assert "has checkpoints, but none can be used" in done.stderr
    assert "images-000000000160: the checksum of its file __0_0.distcp is wrong" in done.stderr


def test_weights_file_starts_a_new_run_but_never_an_old_one(
    tiny_config: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    from tarflow.models.weights import save_weights_file

    source = uninterrupted(whole, tiny_config)
    config = load_config(source / "config.yaml")
    weights = load_weights(find(source), "ema-0.100")
    save_weights_file(tmp_path / "w.safetensors", config.model, weights)
    run = tmp_path / "run"
    stop_at_once = ("train.max_images=16", "optim.lr=1e-30", "optim.final_lr=0")
    done = train(tiny_config, run, "--init-from", str(tmp_path / "w.safetensors"), *stop_at_once)
    assert done.returncode == FINISHED, done.stderr[-500:]
    started = load_weights(find(run), "raw")
    assert all(torch.allclose(started[n], weights[n], atol=1e-6) for n in weights)
    done = train(tiny_config, run, "--init-from", str(tmp_path / "w.safetensors"), "train.max_images=32")
    assert "--init-from is not used: the run has checkpoints" in done.stdout
    done = train(tiny_config, tmp_path / "new", "--init-from", str(tmp_path / "w.safetensors"), "model.num_blocks=1")
    assert done.returncode == 2
    assert "holds another model" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=/nowhere"], "/nowhere"),
        (["model.num_classes=2"], "3 classes"),
        (["train.micro_batch_size=5"], "train.micro_batch_size=5 does not divide the 16 images per rank"),
        (["train.device=cuda"], "train.device=cuda, but on node "),
    ],
)
def test_bad_input_makes_no_run(tiny_config: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    if "cuda" in overrides[0] and torch.cuda.is_available():
        overrides = ["train.device=mps"]
        message = "train.device=mps: this machine has none"
    done = train(tiny_config, tmp_path / "run", *overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_micro_batches_give_the_same_run_to_rounding(tiny_config: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    overrides = ("train.max_images=160", "train.param_dtype=float32", "checkpoint.every_images=0")
    for name, micro in (("a", "0"), ("b", "4")):
        done = train(tiny_config, tmp_path / name, *overrides, f"train.micro_batch_size={micro}")
        assert done.returncode == FINISHED
    for step, loss in losses(tmp_path / "a").items():
        assert losses(tmp_path / "b")[step] == pytest.approx(loss, abs=1e-5)


def test_dry_run_prints_the_arithmetic_and_makes_nothing(tiny_config: Path, tmp_path: Path) -> None:
    done = train(tiny_config, tmp_path / "run", "--dry-run")
    assert done.returncode == 0
    assert "global batch 16 = 1 rank x 1 micro-batch x 16 images" in done.stdout
    assert "480 images = 30 steps" in done.stdout
    assert not (tmp_path / "run").exists()
