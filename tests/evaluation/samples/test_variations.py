"""Temperatures, paths between seeds and images, and the likeliest of several candidates."""

import json

import numpy as np
import pytest
import torch

import tarflow
from tarflow.cli import main
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.draw_to_folder import SampleRequest, sample_images
from tarflow.evaluation.samples.png_folder import load_png, save_png
from tarflow.evaluation.samples.variations.best_of import BestSampler
from tarflow.evaluation.samples.variations.path import spherical
from tarflow.evaluation.samples.variations.temperatures import parse_temperatures
from tarflow.models.provenance import Provenance
from tarflow.models.randomness import keyed_normal
from tarflow.models.sampling.sequential import sample
from tarflow.models.weights import save_weights_file

KNOWN = Provenance(noise="gaussian", noise_std=0.1, label_dropout=0.1, classes=("cat", "dog", "emu"))


@pytest.fixture
def source(model, tmp_path):
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), KNOWN)
    return tmp_path / "w.safetensors"


@pytest.fixture
def flow(source):
    return tarflow.load(source, denoise=0)


def draw(source, out, lines=None, **options):
    return sample_images(SampleRequest(source=source, out=out, **options), ([] if lines is None else lines).append)


def images(folder):
    return torch.stack([load_png(path) for path in sorted((folder / "images").iterdir())])


def settings_of(folder):
    return json.loads((folder / "settings.json").read_text())


def pictures(num=2):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (num, 1, 8, 8), dtype=np.uint8))


@pytest.mark.parametrize("changes", [{}, {"nvp": False}])
def test_temperature_scales_the_noise_in_units_of_the_prior(make_model, tmp_path, changes):
    model = make_model(**changes)
    model.var.mul_(torch.rand(4, 16) + 0.5 if changes else 1)
    save_weights_file(tmp_path / "w.safetensors", model.config, model.state_dict(), KNOWN)
    flow = tarflow.load(tmp_path / "w.safetensors", denoise=0)
    noise = keyed_normal(0, "sample", 0, range(3), (4, 16))
    wanted = sample(flow.model, 0.7 * noise, torch.tensor([0, 1, 2]))
    drawn = flow.sample(3, temperature=0.7)
    assert torch.equal(drawn, ((wanted.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    assert not torch.equal(drawn, flow.sample(3))
    cold = flow.sample(6, temperature=0)
    assert torch.equal(cold[:3], cold[3:]), "of each class one image"


def test_temperature_one_names_no_other_result(flow):
    assert "temperature" not in flow.sampling.describe()
    assert flow.sampling.with_changes(temperature=0.5).describe()["temperature"] == 0.5
    with pytest.raises(EvaluationError, match=r"sampling\.temperature cannot be -1"):
        flow.sample(1, temperature=-1)


def test_several_temperatures_are_rows_of_the_same_samples(source, flow, tmp_path):
    assert draw(source, tmp_path / "out", num=4, temperatures=(0.5, 1.0), settings={"denoise": 0.0, "labels": (2, 0)})
    found = images(tmp_path / "out")
    assert torch.equal(found[:4], flow.sample(4, [2, 0], temperature=0.5))
    assert torch.equal(found[4:], flow.sample(4, [2, 0]))
    said = settings_of(tmp_path / "out")
    assert (said["temperatures"], said["samples"], said["num"]) == ([0.5, 1.0], 4, 8)
    grid = load_png(tmp_path / "out/grid.png")
    assert grid.shape[2] > grid.shape[1], "four columns, a row for each temperature"
    with pytest.raises(EvaluationError, match=r"other settings \(temperatures: \[0\.5, 1\.0\] there"):
        draw(source, tmp_path / "out", num=4, temperatures=(0.5, 0.9), settings={"denoise": 0.0, "labels": (2, 0)})


@pytest.mark.parametrize("text", ["", "warm", "0.5,", "nan", "-1", "11", "1,1", "inf"])
def test_what_is_no_temperature_is_refused(text):
    with pytest.raises(EvaluationError, match="--temperature"):
        parse_temperatures(text)
    assert parse_temperatures("0,0.5,10") == (0, 0.5, 10)


def test_the_spherical_path_turns_evenly_and_its_length_changes_in_proportion():
    a, b = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 16)
    b[0, 0], b[3, 3] = 3, -4
    path = spherical(a, b, 9)
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    flat = path.double().flatten(1)
    steps = torch.nn.functional.cosine_similarity(flat[1:], flat[:-1]).acos()
    torch.testing.assert_close(steps, steps[:1].expand(8), atol=1e-4, rtol=0)
    lengths = flat.norm(dim=1)
    torch.testing.assert_close(lengths, torch.linspace(float(lengths[0]), 5, 9).double(), atol=1e-4, rtol=0)
    for other in (a, 2 * a, -a, torch.zeros_like(a)):  # no plane to turn in
        straight = spherical(a, other, 3)
        torch.testing.assert_close(straight[1], (a + other) / 2)


def test_a_path_between_seeds_begins_and_ends_at_their_samples(source, tmp_path):
    flow = tarflow.load(source)
    path = flow.interpolate(3, 4, 5, "dog", guidance=1.5, temperature=0.8)
    assert path.shape == (5, 1, 8, 8)
    for end, seed in ((path[0], 3), (path[4], 4)):
        assert torch.equal(end, flow.sample(1, "dog", seed=seed, guidance=1.5, temperature=0.8)[0])
    options = {"num": 5, "labels": "dog", "settings": {"guidance": 1.5, "temperature": 0.8}}
    assert draw(source, tmp_path / "out", interpolate=("3", "4"), **options)
    assert torch.equal(images(tmp_path / "out"), path)
    height, width = load_png(tmp_path / "out/grid.png").shape[1:]
    assert width > 4 * height, "one row"
    assert settings_of(tmp_path / "out")["interpolate"] == {
        "path": "spherical", "from": {"seed": 3}, "to": {"seed": 4}, "images": 5,
    }  # fmt: skip
    with pytest.raises(EvaluationError, match="other settings"):
        draw(source, tmp_path / "out", interpolate=("3", "5"), **options)
    with pytest.raises(EvaluationError, match="other settings"):  # its images would be others
        draw(source, tmp_path / "out", interpolate=("3", "4"), **options | {"num": 6})


def test_a_path_between_images_begins_and_ends_at_them_whatever_a_run_samples_with(make_run, tmp_path):
    run_dir, _ = make_run()  # guided and denoised
    ends = pictures()
    for name, image in zip("ab", ends):
        save_png(tmp_path / f"{name}.png", image)
    lines: list[str] = []
    names = (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert draw(run_dir, tmp_path / "out", lines, num=4, labels="none", interpolate=names)
    found = images(tmp_path / "out")
    assert torch.equal(found[[0, -1]], ends)
    assert any("with guidance=0, denoise=0, temperature=1, so that it ends at the image" in line for line in lines)
    said = settings_of(tmp_path / "out")
    assert (said["sampling"]["guidance"], said["sampling"]["denoise"]) == (0, 0)
    assert said["interpolate"]["from"]["image"] == names[0]
    flow = tarflow.load(run_dir)
    assert torch.equal(flow.interpolate(ends[0], ends[1], 4), found)
    mixed = flow.interpolate(7, ends[1].float() / 127.5 - 1, 3, 1)
    assert torch.equal(mixed[-1], ends[1])
    assert torch.equal(mixed[0], flow.sample(1, 1, seed=7, guidance=0, denoise=0)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolate": ("1", "2")}, r"has one label, and none is given: --labels NAME"),
        ({"interpolate": ("1", "2"), "labels": "cat,dog"}, "has one label, and several are given"),
        ({"interpolate": ("1", "2"), "labels": "cat", "num": 1}, r"2 to 10,000 images.*1 was asked for \(--num\)"),
        ({"interpolate": ("1", "2"), "labels": "cat", "settings": {"seed": 3}}, r"seed 3 \(--seed\).*from seed 1 to seed 2"),
        ({"interpolate": ("1", "none.png"), "labels": "cat"}, "none.png: there is no such picture"),
        ({"interpolate": ("1", "w.safetensors"), "labels": "cat"}, r"--interpolate w\.safetensors: "),
        ({"interpolate": ("1", "9" * 19), "labels": "cat"}, "a seed is at most"),
        ({"interpolate": ("a.png", "1"), "labels": "cat", "settings": {"guidance": 2.0}}, r"guidance=2 .*image a\.png"),
        ({"interpolate": ("1", "a.png"), "labels": "cat", "settings": {"denoise": 1.0}}, r"denoise=1 .*image a\.png"),
        ({"interpolate": ("1", "a.png"), "labels": "cat", "settings": {"temperature": 0.5}}, r"temperature=0\.5 .*--interp"),
        ({"interpolate": ("1", "2"), "best_of": 2}, "--interpolate and --best-of are two ways"),
        ({"temperatures": (1.0, 0.5), "best_of": 2}, "--temperature with several values and --best-of are two ways"),
        ({"best_of": 2, "settings": {"temperature": 0.0}}, "--best-of 2 .* at --temperature 0"),
        ({"best_of": 10_001}, "--best-of 10001 is out of bounds"),
    ],
)  # fmt: skip
def test_what_contradicts_is_an_error_that_names_both_sides(source, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    save_png(tmp_path / "a.png", pictures()[0])
    with pytest.raises(EvaluationError, match=message):
        draw(source, tmp_path / "out", **{"num": 4} | options)
    assert not (tmp_path / "out").exists()


def test_the_best_of_several_is_the_likeliest_and_recorded(source, tmp_path):
    flow = tarflow.load(source, denoise=0)
    labels = torch.tensor([0, 1, 2, 0, 1])
    candidates = [sample(flow.model, keyed_normal(0, "sample", j, range(5), (4, 16)), labels) for j in range(4)]
    bits = torch.stack([flow.bits_per_dim(x, labels) for x in candidates])
    best = bits.argmin(0)
    assert len(set(best.tolist())) > 1, "the test can tell candidates apart"
    options = {"num": 5, "best_of": 4, "settings": {"denoise": 0.0}, "batch_size": 2}
    assert draw(source, tmp_path / "out", **options)
    for number, image in enumerate(images(tmp_path / "out")):
        wanted = ((candidates[best[number]][number].clamp(-1, 1) + 1) * 127.5).round()
        assert (image - wanted).abs().max() <= 1
    said = settings_of(tmp_path / "out")
    assert said["best_of"]["candidates"] == 4
    assert [said["chosen"][f"{n:06d}.png"]["candidate"] for n in range(5)] == best.tolist()
    for n in range(5):
        assert said["chosen"][f"{n:06d}.png"]["bits_per_dim"] == pytest.approx(float(bits[best[n], n]), abs=1e-5)
    # What is known stays when a picture is drawn again or more are asked for; a picture of unknown choice is drawn again.
    (tmp_path / "out/images/000001.png").unlink()
    lines: list[str] = []
    assert draw(source, tmp_path / "out", lines, **options | {"num": 6})
    assert "4 are there already" in lines
    assert {name: said["chosen"][name] for name in said["chosen"]}.items() <= settings_of(tmp_path / "out")[
        "chosen"
    ].items()
    with pytest.raises(EvaluationError, match="other settings"):
        draw(source, tmp_path / "out", **options | {"num": 6, "best_of": 3})


def test_a_candidate_that_is_not_finite_is_not_chosen(flow, monkeypatch):
    noise = BestSampler.candidate_noise

    def broken(self, indices, candidate):
        return noise(self, indices, candidate) * (torch.nan if candidate == 1 else 1)

    monkeypatch.setattr(BestSampler, "candidate_noise", broken)
    sampler = BestSampler(flow.model, flow.sampling, 2)
    assert sampler.draw(range(3)).finite.all()
    assert {candidate for candidate, _ in sampler.chosen.values()} == {0}


def test_the_command_takes_them(source, tmp_path):
    words = ["sample", str(source), "--num", "3", "--out"]
    assert main([*words, str(tmp_path / "rows"), "--temperature", "0.5,1"]) == 0
    assert main([*words, str(tmp_path / "one"), "--temperature", "0.5"]) == 0
    assert main([*words, str(tmp_path / "path"), "--interpolate", "1", "-2", "--labels", "emu"]) == 0
    assert main([*words, str(tmp_path / "best"), "--best-of", "2"]) == 0
    assert [len(images(tmp_path / name)) for name in ("rows", "one", "path", "best")] == [6, 3, 3, 3]
    assert settings_of(tmp_path / "one")["sampling"]["temperature"] == 0.5
    assert torch.equal(images(tmp_path / "one"), images(tmp_path / "rows")[:3])
