"""`tarflow sample`: from a run or a weights file, exactly what was asked for."""

import json

import pytest
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.draw_to_folder import SampleRequest, sample_images
from tarflow.evaluation.samples.png_folder import load_png
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.weights_source import from_checkpoint, resolve_device
from tarflow.models.errors import ModelError
from tarflow.models.weights import save_weights_file
from tarflow.records import DamagedFileError
from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.errors import TrainerError


def draw(source, out, num=6, quiet=None, **options):
    return sample_images(
        SampleRequest(source=source, out=out, num=num, **options), ([] if quiet is None else quiet).append
    )


def images(folder):
    return {p.name: load_png(p) for p in sorted((folder / "images").iterdir())}


def settings_of(folder):
    return json.loads((folder / "settings.json").read_text())


def test_images_of_a_run_are_those_of_its_settings_and_weights(make_run, tmp_path):
    run_dir, config = make_run()
    assert draw(run_dir, tmp_path / "out")
    source = from_checkpoint(config, find(run_dir), "ema-0.100", torch.device("cpu"))
    wanted = Sampler(source.model, ResolvedSampling.of_run(config)).draw(range(6)).pixels()
    found = images(tmp_path / "out")
    assert list(found) == [f"{i:06d}.png" for i in range(6)]
    for i, image in enumerate(found.values()):
        assert (image.int() - wanted[i].int()).abs().max() <= 1
    said = settings_of(tmp_path / "out")
    assert (said["weights"], said["step"], said["images_seen"], said["num"]) == ("ema-0.100", 20, 320, 6)
    assert said["weights_sha256"] == source.sha256
    assert said["sampling"]["guidance"] == 1.0
    assert (tmp_path / "out/grid.png").is_file()


@pytest.mark.case("S01")
def test_any_batch_size_draws_the_same_images(make_run, tmp_path):
    run_dir, _ = make_run()
    draw(run_dir, tmp_path / "a", num=7, batch_size=7)
    draw(run_dir, tmp_path / "b", num=7, batch_size=2)
    for ours, theirs in zip(images(tmp_path / "a").values(), images(tmp_path / "b").values()):
        assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.case("S02")
def test_the_same_command_adds_only_what_is_missing(make_run, tmp_path):
    run_dir, _ = make_run()
    out = tmp_path / "out"
    lines: list[str] = []
    draw(run_dir, out)
    before = {p.name: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    (out / "images/000003.png").unlink()
    draw(run_dir, out, num=8, quiet=lines)
    assert "5 are there already" in "\n".join(lines)
    after = {p.name: p.stat().st_mtime_ns for p in (out / "images").iterdir()}
    assert sorted(after) == [f"{i:06d}.png" for i in range(8)]
    assert all(after[name] == before[name] for name in before if name != "000003.png")
    with pytest.raises(EvaluationError, match="beyond the 5 requested"):
        draw(run_dir, out, num=5)
    with pytest.raises(EvaluationError, match="other settings"):
        draw(run_dir, out, num=8, settings={"seed": 1})
    with pytest.raises(EvaluationError, match="other settings"):
        draw(run_dir, out, num=8, step=10)


def test_labels_and_settings_can_be_chosen(make_run, tmp_path):
    run_dir, _ = make_run()
    draw(run_dir, tmp_path / "out", settings={"labels": (2, -1), "guidance": 0.5, "denoise": 0.0}, weights="raw")
    said = settings_of(tmp_path / "out")
    assert said["weights"] == "raw"
    assert said["sampling"]["labels"] == [2, -1]
    assert (said["sampling"]["guidance"], said["sampling"]["denoise"]) == (0.5, 0.0)


def test_a_weights_file_says_its_own_model(make_model, tmp_path):
    model = make_model()
    save_weights_file(tmp_path / "m.safetensors", model.config, model.state_dict())
    assert draw(tmp_path / "m.safetensors", tmp_path / "plain", settings={"noise_std": 0.0})
    plain = Sampler(model, ResolvedSampling()).draw(range(6)).pixels()
    assert all((a.int() - b.int()).abs().max() <= 1 for a, b in zip(images(tmp_path / "plain").values(), plain))
    draw(tmp_path / "m.safetensors", tmp_path / "clean", settings={"noise_std": 0.2})
    assert settings_of(tmp_path / "clean")["sampling"]["denoise"] == 1.0
    assert settings_of(tmp_path / "clean")["weights"] == "file"


def test_options_that_would_have_no_effect_are_refused(make_run, make_model, tmp_path):
    run_dir, _ = make_run()
    model = make_model()
    save_weights_file(tmp_path / "m.safetensors", model.config, model.state_dict())
    file, out = tmp_path / "m.safetensors", tmp_path / "out"
    with pytest.raises(EvaluationError, match="--noise-std is for weights files"):
        draw(run_dir, out, settings={"noise_std": 0.2})
    with pytest.raises(EvaluationError, match="--denoise needs --noise-std"):
        draw(file, out, settings={"denoise": 1.0})
    with pytest.raises(EvaluationError, match="--weights selects among a run's checkpoints"):
        draw(file, out, weights="raw")
    with pytest.raises(EvaluationError, match=r"label 7 is not one of the model's 3 classes"):
        draw(run_dir, out, settings={"labels": (7,)})
    assert not out.exists()


@pytest.mark.case("T06")
def test_a_set_of_weights_that_is_not_there_is_an_error(make_run, tmp_path):
    run_dir, _ = make_run()
    with pytest.raises(TrainerError, match=r"holds no weights 'ema-0.200'; it holds: ema-0.050, ema-0.100, raw"):
        draw(run_dir, tmp_path / "out", weights="ema-0.200")
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none_are_clear_errors(tmp_path):
    with pytest.raises(TrainerError, match="no run directory"):
        draw(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ModelError, match="no weights file at"):
        draw(tmp_path / "nothing.safetensors", tmp_path / "out")
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(DamagedFileError, match="not a readable safetensors"):
        draw(tmp_path / "x.safetensors", tmp_path / "out")
    with pytest.raises(EvaluationError, match="device 'mps' is not available"):
        resolve_device("mps")


@pytest.mark.case("H04")
def test_samples_of_a_file_without_a_checksum_say_so_and_of_a_damaged_one_there_are_none(make_model, tmp_path):
    from safetensors.torch import save_file

    model, path = make_model(), tmp_path / "m.safetensors"
    lines: list[str] = []
    save_file(model.state_dict(), path, metadata={"tarflow_config": model.config.model_dump_json()})
    draw(path, tmp_path / "old", quiet=lines, settings={"noise_std": 0.0})
    assert sum("it carries no checksum" in line for line in lines) == 1
    assert settings_of(tmp_path / "old")["provenance"]["checked"] is False
    save_weights_file(path, model.config, model.state_dict())
    draw(path, tmp_path / "new", quiet=(lines := []), settings={"noise_std": 0.0})
    assert "checked" not in settings_of(tmp_path / "new")["provenance"]
    assert "checksum" not in "".join(lines)
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(DamagedFileError, match="its checksum does not match"):
        draw(path, tmp_path / "none", settings={"noise_std": 0.0})
    assert not (tmp_path / "none").exists()


@pytest.mark.case("S03")
def test_lost_samples_are_missing_and_said(make_model, tmp_path):
    model = make_model()
    lines: list[str] = []
    with torch.no_grad():
        model.blocks[0].class_embed[1] = torch.nan
    save_weights_file(tmp_path / "m.safetensors", model.config, model.state_dict())
    complete = draw(tmp_path / "m.safetensors", tmp_path / "out", quiet=lines, settings={"noise_std": 0.0})
    assert not complete
    assert list(images(tmp_path / "out")) == ["000000.png", "000002.png", "000003.png", "000005.png"]
    assert settings_of(tmp_path / "out")["nonfinite"] == [1, 4]
    assert "2 of 6 samples are not finite" in "\n".join(lines)


@pytest.mark.case("V06")
def test_damaged_images_are_drawn_again_and_said(make_run, tmp_path):
    run_dir, _ = make_run(steps=(20,))
    draw(run_dir, tmp_path / "out", num=5)
    before = images(tmp_path / "out")
    lines: list[str] = []
    good = (tmp_path / "out/images/000002.png").read_bytes()
    (tmp_path / "out/images/000002.png").write_bytes(b"")
    (tmp_path / "out/images/000004.png").write_bytes(good[: len(good) // 2])
    assert draw(run_dir, tmp_path / "out", num=5, quiet=lines)
    assert "2 damaged images are drawn again: 000002.png is empty, and 1 more" in lines
    assert "3 are there already" in lines
    after = images(tmp_path / "out")
    assert all((after[name].int() - before[name].int()).abs().max() <= 1 for name in before)
