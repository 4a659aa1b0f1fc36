"""Averages of the weights: constant decays, snapshots that outlive retention, any width after the training."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import tarflow.cli
from tarflow.models.weights import load_weights_file
from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.marker import MARKER
from tarflow.trainer.checkpoint.tensors import load_weights, stored_shapes
from tarflow.trainer.config.files import load_config
from tarflow.trainer.ema.ema import EMA, power_of_width
from tarflow.trainer.ema.posthoc import Profile, fit, reconstruct
from tarflow.trainer.ema.snapshots import forget_after, prepare, snapshots_dir, sources
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.resilience.exit_codes import FINISHED
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.train import train
from tests.helpers.checkpoints import forge

TRACKED = (0.05, 0.075, 0.1)  # the run tracks the middle one too, as the truth


def fake_backend(p: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(locals=lambda: {"p": p})


def test_constant_decay_is_the_ordinary_recursion_beside_the_power_averages() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    ema = EMA(fake_backend(p), (0.1,), (0.9, 0.99))
    expected = {0.9: torch.zeros(3, dtype=torch.float64), 0.99: torch.zeros(3, dtype=torch.float64)}
    for k, value in enumerate(torch.rand(50, 3, generator=torch.Generator().manual_seed(0)), 1):
        p.data.copy_(value)
        ema.update(8 * k, 8)
        expected = {d: d * e + (1 - d) * value.double() for d, e in expected.items()}
    assert list(ema.averages) == ["ema-0.100", "ema-decay-0.9", "ema-decay-0.99"]
    for decay, value in expected.items():
        assert torch.allclose(ema.averages[f"ema-decay-{decay:g}"]["p"].double(), value, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b"), [((1000, 0.05), (1000, 0.1)), ((400, 0.1), (1000, 0.05)), ((900, 0.2), (100, 0.01))]
)
def test_inner_product_of_profiles_is_the_integral(a: tuple[int, float], b: tuple[int, float]) -> None:
    def values(end: int, std: float, t: np.ndarray) -> np.ndarray:
        gamma = power_of_width(std)
        return np.where(t <= end, (gamma + 1) / end * (t / end) ** gamma, 0)

    edges = np.linspace(0, min(a[0], b[0]), 2_000_001)
    t = (edges[1:] + edges[:-1]) / 2
    integral = float((values(*a, t) * values(*b, t)).sum() * (edges[1] - edges[0]))
    assert Profile(*a).dot(Profile(*b)) == pytest.approx(integral, rel=1e-6)
    assert Profile(*a).dot(Profile(*b)) == pytest.approx(Profile(*b).dot(Profile(*a)), rel=1e-12)


def test_fit_is_exact_for_a_stored_profile_and_close_between_and_says_when_it_is_far() -> None:
    stored = [Profile(end, std) for end in range(1000, 17_000, 1000) for std in (0.05, 0.1)]
    coefficients, distance = fit(stored, Profile(16_000, 0.1))
    assert np.abs(coefficients - np.eye(len(stored))[-1]).max() < 1e-6
    assert distance < 1e-6
    for std, bound in ((0.06, 1e-2), (0.075, 1e-2), (0.12, 2e-2)):
        coefficients, distance = fit(stored, Profile(16_000, std))
        assert distance < bound, std
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    assert fit(stored[-2:], Profile(16_000, 0.01))[1] > 0.5


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 steps; a snapshot at every eighth, two checkpoints kept."""
    tree = {
        "data": {"train": str(tiny_data)},
        "model": {"image_size": 8, "patch_size": 2, "in_channels": 1, "channels": 64, "num_blocks": 2, "layers_per_block": 1, "num_classes": 3},
        "train": {"global_batch_size": 8, "max_images": 768, "noise_std": 0.1, "param_dtype": "float32"},
        "optim": {"lr": 1e-3, "warmup_images": 32},
        "ema": {"relative_stds": list(TRACKED), "decays": [0.9], "snapshot_every_images": 64},
        "checkpoint": {"every_images": 256, "keep_latest": 2},
        "log": {"every_steps": 48, "tensorboard": False},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("ema")
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    assert train(load_config(folder / "run.yaml"), folder / "run") == FINISHED
    return folder / "run"


@pytest.mark.case("T06")
def test_snapshots_hold_averages_alone_and_outlive_retention(run: Path) -> None:
    kept = committed(run)
    assert [c.step for c in kept] == [88, 96]  # a snapshot comes with a checkpoint, which retention removes
    snapshots = committed(snapshots_dir(run))
    assert [c.images_seen for c in snapshots] == list(range(64, 769, 64))
    assert [c.path.parents[1] for c in sources(run)] == [snapshots_dir(run)] * 12
    names = {name.split("/")[0] for name in stored_shapes(snapshots[0])}
    assert names == {"ema-0.050", "ema-0.075", "ema-0.100", "ema-decay-0.9", "buffer"}
    for kind in ("ema-0.050", "ema-decay-0.9"):
        ours, theirs = load_weights(snapshots[-1], kind), load_weights(kept[-1], kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def without_the_middle(run: Path, folder: Path) -> Path:
    """A copy of a run whose stored configurations do not own up to the width that serves as the truth."""
    copy = folder / "copy"
    shutil.copytree(run, copy)
    for path in copy.rglob("config.yaml"):
        tree = yaml.safe_load(path.read_text())
        tree["ema"]["relative_stds"] = [0.05, 0.1]
        path.write_text(yaml.safe_dump(tree))
        marker = path.parent / MARKER
        if marker.exists():
            forge(path.parent)
    return copy


@pytest.mark.case("T06")
def test_a_width_made_after_training_is_the_one_tracked_in_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = without_the_middle(run, tmp_path), tmp_path / "mid.safetensors"
    assert tarflow.cli.main(["ema", str(copy), "--relative-std", "0.075", "--out", str(out)]) == 0
    assert "24 stored averages of 12 moments up to 768 images" in capsys.readouterr().out
    config, made = load_weights_file(out)
    assert config == load_config(run / "config.yaml").model
    last = find(run)
    truth, raw = load_weights(last, "ema-0.075"), load_weights(last, "raw")
    neighbours = [load_weights(last, f"ema-{s:.3f}") for s in (0.05, 0.1)]

    def distance(a: dict, b: dict) -> float:
        return float(sum((a[n].double() - b[n].double()).square().sum() for n in truth) ** 0.5)

    assert made.keys() == truth.keys()
    assert distance(made, truth) < 0.05 * min(distance(n, truth) for n in neighbours)
    assert distance(made, truth) < 0.05 * distance(raw, truth)


def test_a_stored_width_comes_out_as_stored_also_at_an_earlier_step(run: Path, tmp_path: Path) -> None:
    for step in (96, 40):
        path = reconstruct(run, 0.1, step, tmp_path / f"{step}.safetensors", lambda _: None)
        _, made = load_weights_file(path)
        stored = load_weights(find(snapshots_dir(run), step), "ema-0.100")
        assert max(float((made[n] - stored[n]).abs().max()) for n in stored) < 1e-6


def test_a_width_made_after_training_becomes_a_folder_too(run: Path, tmp_path: Path) -> None:
    words = ["ema", str(run), "--relative-std", "0.08", "--out"]
    assert tarflow.cli.main([*words, f"{tmp_path}/wide/"]) == 0
    assert tarflow.cli.main([*words, f"{tmp_path}/wide.safetensors"]) == 0
    assert sorted(path.name for path in (tmp_path / "wide").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (tmp_path / "wide/model.safetensors").read_bytes() == (tmp_path / "wide.safetensors").read_bytes()
    assert tarflow.load(tmp_path / "wide").provenance.ema_relative_std == 0.08
    assert tarflow.cli.main([*words, f"{tmp_path}/wide/"]) == 2, "it is there already"


def test_what_cannot_be_made_is_an_error_and_leaves_no_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "none.safetensors"
    for std, step, message in (
        (0.5, None, "between 0 and 0.28"),
        (0.1, 41, "no averages of step 41; usable steps: 8, 16"),
        (0.004, None, "off by .*ema.snapshot_every_images"),
    ):
        with pytest.raises(TrainerError, match=message):
            reconstruct(run, std, step, out, lambda _: None)
    for wrong in (tmp_path / "weights.bin", tmp_path / "nowhere" / "weights.pth"):
        with pytest.raises(
            TrainerError, match=r"give a \.safetensors or \.pth file, or with / at its end a new folder, in"
        ):
            reconstruct(run, 0.1, None, wrong, lambda _: None)
        assert not wrong.exists()
    assert not out.exists()
    bare = tmp_path / "bare"
    create_run(bare)
    with pytest.raises(TrainerError, match="usable steps: none"):
        reconstruct(bare, 0.1, None, out, lambda _: None)


def test_snapshots_after_the_checkpoint_resumed_from_are_removed(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "images-000000000768")  # as if the run had been killed before this save
    lines: list[str] = forget_after(copy, 704)
    assert len(lines) == 1
    assert "images-000000000768" in lines[0]
    assert [c.step for c in committed(prepare(copy))] == list(range(8, 89, 8))
    assert train(load_config(copy / "config.yaml"), copy) == FINISHED
    again, before = (load_weights(find(snapshots_dir(r), 96), "ema-0.100") for r in (copy, run))
    assert all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ema.decays=[1.0]", "between 0 and 1, got 1.0"),
        ("ema.decays=[0.9, 0.9]", "must differ"),
        ("ema.relative_stds=[]", "snapshot_every_images needs ema.relative_stds"),
    ],
)
def test_settings_that_cannot_be_are_refused(run: Path, override: str, message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        load_config(run / "config.yaml", [override])


def test_evaluation_takes_the_widest_power_average_by_itself_not_a_constant_decay(run: Path) -> None:
    config = load_config(run / "config.yaml")
    assert config.evaluated_weights == "ema-0.100"
    assert load_config(run / "config.yaml", ["evaluation.weights=ema-decay-0.9"]).evaluated_weights == "ema-decay-0.9"
