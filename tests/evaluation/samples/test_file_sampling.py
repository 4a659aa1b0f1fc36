"""A weights file is sampled as its run is; what it does not say is asked for, what it contradicts is refused."""

import json

import pytest
import torch

import tarflow.cli
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw_to_folder import SampleRequest, sample_images
from tarflow.evaluation.samples.png_folder import load_png
from tarflow.models.provenance import Provenance
from tarflow.models.weights import read_weights, save_weights_file
from tarflow.records import read_object, write_object
from tests.helpers.checkpoints import tell


def draw(source, out, num=5, quiet=None, **options):
    say = ([] if quiet is None else quiet).append
    return sample_images(SampleRequest(source=source, out=out, num=num, **options), say)


def export(run_dir, out, *options):
    assert tarflow.cli.main(["checkpoint", "export", str(run_dir), "--out", str(out), *options]) == 0
    return out


def pixels(folder):
    return torch.stack([load_png(p) for p in sorted((folder / "images").iterdir())])


def sampling_of(folder):
    return json.loads((folder / "settings.json").read_text())["sampling"]


@pytest.fixture
def save_file(make_model, tmp_path):
    def make(name="m.safetensors", model=None, **known):
        model = model or make_model()
        save_weights_file(tmp_path / name, model.config, model.state_dict(), Provenance(**known) if known else None)
        return tmp_path / name

    return make


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.case("V05", "N05")
def test_an_exported_file_draws_the_images_of_its_run(make_run, tmp_path, suffix):
    sampling = {"guidance": 1.5, "guide": "b", "annealed": False, "denoise": 0.5, "seed": 9}
    run_dir, _ = make_run(steps=(10,), sampling=sampling)
    file = export(run_dir, tmp_path / f"v{suffix}")
    lines: list[str] = []
    draw(run_dir, tmp_path / "run-samples")
    draw(file, tmp_path / "file-samples", quiet=lines)
    assert torch.equal(pixels(tmp_path / "run-samples"), pixels(tmp_path / "file-samples"))
    assert sampling_of(tmp_path / "run-samples") == sampling_of(tmp_path / "file-samples")
    assert sampling_of(tmp_path / "file-samples")["noise_std"] == 0.1
    said = "weights ema-0.100 of step 10 (160 images), trained on Gaussian noise of standard deviation 0.1, label dropout 0.1"
    assert said in lines[0]
    assert "guidance=1.5" in lines[0]


@pytest.mark.case("V05")
def test_an_exported_file_goes_by_the_choice_of_a_sweep_as_its_run_does(make_run, tmp_path, capsys):
    from tarflow.evaluation.run_config import choose

    run_dir, _ = make_run(steps=(10,))
    choose(run_dir, {"guidance": 0.5, "denoise": 0.25}, "a sweep")
    file = export(run_dir, tmp_path / "v.safetensors")
    assert "guidance=0.5, denoise=0.25: chosen by a sweep" in capsys.readouterr().out
    draw(run_dir, tmp_path / "a")
    draw(file, tmp_path / "b")
    assert sampling_of(tmp_path / "a") == sampling_of(tmp_path / "b")
    draw(file, tmp_path / "c", settings={"guidance": 0.0})
    assert (sampling_of(tmp_path / "c")["guidance"], sampling_of(tmp_path / "c")["denoise"]) == (0.0, 0.25)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.case("V05")
def test_guidance_without_label_dropout_is_refused_as_for_the_run(make_run, tmp_path, suffix):
    run_dir, _ = make_run(steps=(10,), train={"label_dropout": 0.0}, sampling={"guidance": 0.0})
    file = export(run_dir, tmp_path / f"v{suffix}", "--weights", "raw")
    for source in (run_dir, file):
        with pytest.raises(EvaluationError, match="needs a model trained with label dropout, but train"):
            draw(source, tmp_path / "out", settings={"guidance": 2.0})
    assert not (tmp_path / "out").exists()
    assert draw(file, tmp_path / "out", settings={"guidance": 2.0, "labels": (-1,), "attn_temp": 0.5})


@pytest.mark.case("V05")
def test_denoising_after_uniform_noise_is_refused_as_for_the_run(make_run, tmp_path):
    run_dir, _ = make_run(steps=(10,), train={"noise": "uniform"})
    file = export(run_dir, tmp_path / "v.safetensors")
    for source in (run_dir, file):
        with pytest.raises(EvaluationError, match="--denoise needs a model trained with gaussian noise"):
            draw(source, tmp_path / "out", settings={"denoise": 1.0})
    assert draw(file, tmp_path / "out")
    assert sampling_of(tmp_path / "out")["denoise"] == 0.0


@pytest.mark.case("V05")
def test_the_marker_of_the_checkpoint_goes_into_the_file(make_run, make_model, save_checkpoint, tmp_path):
    run_dir, _ = make_run(steps=(10,))
    marker = run_dir / "checkpoints/images-000000000160/COMMITTED"
    code = {"version": "0.2.0", "commit": "ab" * 20, "dirty": False}
    tell(marker.parent, classes=["food", "smileys", "x"], code=code)
    found = read_weights(export(run_dir, tmp_path / "v.safetensors", "--weights", "ema-0.050")).provenance
    assert found.classes == ("food", "smileys", "x")
    assert found.code == code
    assert (found.weights, found.ema_relative_std, found.step, found.images_seen) == ("ema-0.050", 0.05, 10, 160)
    assert found.run == json.loads(marker.read_text())["run"]
    assert (found.noise, found.noise_std, found.label_dropout) == ("gaussian", 0.1, 0.1)


@pytest.mark.case("V05")
def test_an_average_made_afterwards_says_the_same(make_run, tmp_path):
    run_dir, _ = make_run(steps=(10, 20))
    out = tmp_path / "wide.safetensors"
    assert tarflow.cli.main(["ema", str(run_dir), "--relative-std", "0.07", "--out", str(out)]) == 0
    found = read_weights(out).provenance
    assert (found.weights, found.ema_relative_std, found.step, found.noise_std) == ("ema-0.070", 0.07, 20, 0.1)


@pytest.mark.case("N05")
def test_a_file_that_does_not_say_its_noise_is_asked_for_it(save_file, tmp_path):
    for number, name in enumerate(("m.safetensors", "m.pth")):
        file, out = save_file(name), tmp_path / f"out{number}"
        with pytest.raises(EvaluationError, match=r"sampling needs --noise-std: .*does not say its training noise"):
            draw(file, out)
        assert not out.exists()
        draw(file, out, settings={"noise_std": 0.0})  # knowingly
        assert sampling_of(out)["denoise"] == 0.0
    draw(file, tmp_path / "undenoised", settings={"denoise": 0.0})
    draw(file, tmp_path / "denoised", settings={"noise_std": 0.2})
    assert sampling_of(tmp_path / "denoised")["denoise"] == 1.0
    assert not torch.equal(pixels(tmp_path / "denoised"), pixels(tmp_path / "undenoised"))


@pytest.mark.case("N05")
def test_an_option_that_contradicts_the_file_is_refused(save_file, tmp_path):
    file = save_file(noise="gaussian", noise_std=0.1)
    with pytest.raises(EvaluationError, match=r"--noise-std 0\.2, but .*m\.safetensors was trained with 0\.1"):
        draw(file, tmp_path / "out", settings={"noise_std": 0.2})
    assert draw(file, tmp_path / "out", settings={"noise_std": 0.1})


@pytest.mark.case("N05")
def test_what_the_file_leaves_open_is_said(save_file, tmp_path):
    lines: list[str] = []
    file = save_file(noise="gaussian", noise_std=0.1, sampling={"labels": "training", "guidance": 1.0})
    draw(file, tmp_path / "out", quiet=lines)
    assert "balanced labels: the file does not hold the label frequencies of its training data" in lines
    assert any("does not say whether it was trained with label dropout" in line for line in lines)
    with pytest.raises(EvaluationError, match=r"holds sampling settings that this version does not know"):
        draw(save_file(noise="gaussian", noise_std=0.1, sampling={"guidence": 1.0}), tmp_path / "new")


@pytest.mark.case("I01")
def test_a_published_file_is_sampled_and_what_was_inferred_is_said(tmp_path):
    from tarflow.models.config import TarFlowConfig
    from tarflow.models.flow import TarFlow
    from tarflow.models.init import init_weights

    config = TarFlowConfig(image_size=8, patch_size=4, channels=64, num_blocks=2, layers_per_block=1, num_classes=3)
    model = TarFlow(config)
    lines: list[str] = []
    init_weights(model, 1)
    torch.save(
        model.state_dict() | {f"blocks.{i}.attn_mask": torch.ones(4, 4).tril() for i in range(2)}, tmp_path / "w.pth"
    )
    assert draw(tmp_path / "w.pth", tmp_path / "out", num=3, quiet=lines, settings={"noise_std": 0.1})
    assert "from its shapes 8 x 8 pixels, patches of 4, 64 channels, 2 blocks of 1 layers, 3 classes" in lines[0]
    assert "attention heads of 64 channels" in lines[0]


@pytest.mark.case("V08")
def test_a_folder_of_samples_says_which_code_trained_and_which_drew(make_run, tmp_path):
    from tarflow.code_version import code_version

    run_dir, _ = make_run(steps=(10,))
    code = {"version": "0.1.9"}
    tell(run_dir / "checkpoints/images-000000000160", code=code)
    draw(run_dir, tmp_path / "out")
    path = tmp_path / "out/settings.json"
    said = read_object(path)
    assert (said["provenance"]["code"], said["code"]) == (code, code_version())
    path.write_text(json.dumps({k: v for k, v in said.items() if k not in ("provenance", "code")}))
    assert draw(run_dir, tmp_path / "out", num=6), "a folder of an earlier version is added to"
    write_object(path, read_object(path) | {"code": {"version": "9"}})
    assert draw(run_dir, tmp_path / "out", num=7), "other code is not other settings"
