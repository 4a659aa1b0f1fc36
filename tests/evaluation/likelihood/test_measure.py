"""`tarflow likelihood`: a row per image, the evaluated figure as the mean, the same files for any number of workers."""

import csv
import json
import math
import multiprocessing
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tarflow
import tarflow.cli
from tarflow.cli import main
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.likelihood import measure as measuring
from tarflow.evaluation.likelihood.extremes import Extremes
from tarflow.evaluation.likelihood.measure import LikelihoodRequest, measure_likelihoods
from tarflow.evaluation.likelihood.per_image import ImageLikelihoods
from tarflow.evaluation.metrics.bits_per_dim import NoiseSettings, measure_bits_per_dim
from tarflow.evaluation.samples.png_folder import save_png
from tarflow.models.provenance import Provenance
from tarflow.models.weights import save_weights_file

GAUSSIAN = Provenance(noise="gaussian", noise_std=0.1, label_dropout=0.1, classes=("0", "1", "2"))
UNIFORM = Provenance(noise="uniform", noise_std=0.0, label_dropout=0.1)


def weights(tmp_path, model, known=GAUSSIAN):
    path = tmp_path / "w.safetensors"
    save_weights_file(path, model.config, model.state_dict(), known)
    return path


def measure(source, data, out, **options):
    lines = options.pop("lines", [])
    return measure_likelihoods(LikelihoodRequest(source=source, data=data, out=out, **options), lines.append)


def rows(out):
    return pq.read_table(out / "likelihood.parquet").to_pydict()


@pytest.fixture
def held_out(digit_like):
    return digit_like / "val"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(measuring, "CHUNK", 5)


def test_the_mean_is_the_evaluated_figure_and_rows_are_those_of_python(make_run, held_out, tmp_path):
    run_dir, config = make_run()
    result = measure(run_dir, held_out, tmp_path / "out", draws=3)
    flow = tarflow.load(run_dir)
    images = ImageSet(config.data.held_out, config.model)
    noise = NoiseSettings(config.train.noise, config.train.noise_std, config.sampling.seed, 3)
    evaluated = measure_bits_per_dim(flow.model, images.batches(True), noise)
    assert abs(result["bits_per_dim"] - evaluated["bits_per_dim"]) < 1e-6
    assert abs(result["stderr"] - evaluated["stderr"]) < 1e-6
    table = rows(tmp_path / "out")
    pixels, labels, ids = (torch.cat(parts) for parts in zip(*images.batches(True)))
    assert table["image"] == ids.tolist()
    assert table["label"] == labels.tolist()
    np.testing.assert_allclose(table["bits_per_dim"], flow.bits_per_dim(pixels, labels, draws=3).numpy(), atol=1e-5)
    np.testing.assert_allclose(table["log_prob"], flow.log_prob(pixels, labels, draws=3).numpy(), atol=1e-3)
    assert abs(result["log_prob"] - np.mean(table["log_prob"])) < 1e-9


def test_prior_and_blocks_sum_up_and_each_block_is_its_determinant(make_model, held_out, tmp_path):
    model = make_model(num_blocks=3)
    result = measure(weights(tmp_path, model), held_out, tmp_path / "out")
    table = rows(tmp_path / "out")
    names = ["prior", "block_0", "block_1", "block_2"]
    np.testing.assert_allclose(np.sum([table[name] for name in names], axis=0), table["bits_per_dim"], atol=1e-9)
    assert list(result["parts"]) == names
    # A block that is made the identity contributes nothing; the others' shares do not change.
    with torch.no_grad():
        model.blocks[2].proj_out.weight.zero_()
        model.blocks[2].proj_out.bias.zero_()
    measure(weights(tmp_path, model), held_out, tmp_path / "without")
    other = rows(tmp_path / "without")
    assert other["block_2"] == [0.0] * 12
    assert other["block_1"] == table["block_1"]
    assert other["prior"] != table["prior"]


def test_columns_say_how_sure_they_are(model, held_out, tmp_path):
    flow_file = weights(tmp_path, model, UNIFORM)
    result = measure(flow_file, held_out, tmp_path / "out", draws=4, labels="none", form="csv")
    with (tmp_path / "out/likelihood.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 12
    assert {row["label"] for row in table} == {"-1"}
    flow = tarflow.load(flow_file)
    pixels, _, ids = (
        torch.cat(parts) for parts in zip(*ImageSet(tarflow.DataSettings.of(held_out), model.config).batches(False))
    )
    noise = NoiseSettings("uniform", 0.0, 0, 4)
    draws = torch.stack([flow.bits_per_dim(noise.apply(pixels, ids.tolist(), draw)) for draw in range(4)])
    for row, bits in zip(table, draws.T):
        assert abs(float(row["stderr"]) - float(bits.std() / 2)) < 1e-5
        bound = -torch.logsumexp(-bits * 64 * math.log(2), 0) / (64 * math.log(2)) + math.log2(4) / 64
        assert abs(float(row["importance_weighted"]) - float(bound)) < 1e-5
        assert float(row["importance_weighted"]) <= float(row["bits_per_dim"])
    assert result["importance_weighted"] < result["bits_per_dim"]


def together(source, data, out, barrier):
    torch.set_num_threads(1)
    measuring.CHUNK = 2
    barrier.wait(60)
    measure(source, data, out, draws=2)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_together_write_the_files_of_one(model, held_out, tmp_path, workers):
    source = weights(tmp_path, model)
    measuring.CHUNK = 2
    measure(source, held_out, tmp_path / "alone", draws=2)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(workers)
    group = [
        context.Process(target=together, args=(source, held_out, tmp_path / "shared", barrier)) for _ in range(workers)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        assert process.exitcode == 0
    for name in ("likelihood.json", "likelihood.parquet"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert not (tmp_path / "shared/work").exists()


def test_a_folder_has_names_and_one_label_at_most(model, tmp_path):
    flow = tarflow.load(source := weights(tmp_path, model))
    pictures = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, picture in enumerate(pictures):
        (tmp_path / "in/sub").mkdir(parents=True, exist_ok=True)
        save_png(tmp_path / "in" / ("sub" if number > 4 else "") / f"{number}.png", picture)
    lines: list[str] = []
    measure(source, tmp_path / "in", tmp_path / "out", lines=lines)
    assert any("without a label (--labels NAME gives one)" in line for line in lines)
    table = rows(tmp_path / "out")
    assert table["name"] == [*(f"{n}.png" for n in range(5)), "sub/5.png", "sub/6.png"]
    np.testing.assert_allclose(table["bits_per_dim"], flow.bits_per_dim(pictures).numpy(), atol=1e-6)
    measure(source, tmp_path / "in", tmp_path / "named", labels="1", num=3)
    table = rows(tmp_path / "named")
    assert (table["label"], table["class"]) == ([1] * 3, ["1"] * 3)
    np.testing.assert_allclose(table["bits_per_dim"], flow.bits_per_dim(pictures[[0, 2, 4]], "1").numpy(), atol=1e-6)
    assert table["name"] == ["0.png", "2.png", "4.png"]
    # A picture that was drawn anew is not taken for the one that was measured.
    save_png(tmp_path / "in/2.png", 255 - pictures[2])
    with pytest.raises(EvaluationError, match="holds other likelihoods"):
        measure(source, tmp_path / "in", tmp_path / "named", labels="1", num=3)


@pytest.mark.parametrize("as_a_set", [False, True], ids=["folder", "data set"])
def test_images_of_other_sizes_and_colours_are_announced(model, held_out, tmp_path, as_a_set):
    data = tmp_path / "in"
    data.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number, shape in enumerate([(1, 8, 8), (1, 8, 12), (3, 8, 8), (3, 20, 20)]):
        save_png(data / f"{number}.png", torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    if as_a_set:
        words = ["data", "prepare", str(data), str(tmp_path / "set"), "--size", "12", "--channels", "3"]
        assert tarflow.cli.main(words) == 0
        data = tmp_path / "set"
    source, lines, quiet = weights(tmp_path, model), list[str](), list[str]()
    measure(source, data, tmp_path / "out", labels="none", lines=lines)
    notes = [line for line in lines if line.startswith(f"note: {data}: ")]
    others, coloured = (4, 2) if as_a_set else (2, 2)
    assert f"{others} of 4 images looked at are not 8 x 8 pixels" in notes[0]
    assert f"{coloured} of 4 images looked at have colours, and the model has none" in notes[1]
    if as_a_set:
        with pytest.raises(
            EvaluationError, match="has no labels, and the weights 3 classes: give --labels NAME or none"
        ):
            measure(source, data, tmp_path / "asked")
    measure(source, held_out, tmp_path / "own", lines=quiet)
    assert not [line for line in quiet if line.startswith("note: ")]


def test_done_once_is_done_and_other_settings_are_refused(model, held_out, tmp_path, monkeypatch):
    source, out = weights(tmp_path, model), tmp_path / "out"
    first = measure(source, held_out, out)
    monkeypatch.setattr(measuring, "likelihoods", lambda *_: pytest.fail("measured again"))
    assert measure(source, held_out, out) == first
    with pytest.raises(EvaluationError, match=r"holds other likelihoods \(noise: .*seed 0.* there, .*seed 5.* asked\)"):
        measure(source, held_out, out, seed=5)
    with pytest.raises(EvaluationError, match="form: 'parquet' there, 'csv' asked"):
        measure(source, held_out, out, form="csv")
    (out / "likelihood.parquet").unlink()
    with pytest.raises(EvaluationError, match=r"likelihood\.parquet is not: give another folder"):
        measure(source, held_out, out)


def test_what_was_killed_or_damaged_goes_on(model, held_out, tmp_path, monkeypatch):
    source, out = weights(tmp_path, model), tmp_path / "out"
    measure(source, held_out, tmp_path / "whole")
    calls = []

    def dies(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return likelihoods(*given)

    likelihoods = measuring.likelihoods
    monkeypatch.setattr(measuring, "likelihoods", dies)
    with pytest.raises(KeyboardInterrupt):
        measure(source, held_out, out)
    (chunk,) = (path for path in out.rglob("likelihood-*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-9])
    lines: list[str] = []
    measure(source, held_out, out, lines=lines)
    assert any("is damaged and computed again" in line for line in lines)
    assert (out / "likelihood.parquet").read_bytes() == (tmp_path / "whole/likelihood.parquet").read_bytes()


def test_the_page_shows_the_extremes_and_loads_nothing(model, held_out, tmp_path):
    source, out = weights(tmp_path, model), tmp_path / "out"
    measure(source, held_out, out)
    page, table = (out / "likelihood.html").read_text(), rows(out)
    best = int(np.argmin(table["bits_per_dim"]))
    assert page.index("Most likely") < page.index(f"{table['image'][best]}: {table['bits_per_dim'][best]:.3f}")
    assert page.count("<img") == 12
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")


def test_extremes_do_not_depend_on_the_chunks():
    draw = np.random.default_rng(0)
    bits = draw.normal(size=40).round(1)
    bits[7] = np.inf
    found = ImageLikelihoods(np.arange(40), np.zeros(40, np.int64), bits[:, None], bits[:, None])
    pixels = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    whole, halves = Extremes(4), Extremes(4)
    whole.add(found, pixels)
    for part in (np.arange(20, 40), np.arange(20)):
        halves.add(found.only(part), pixels[part])
    order = sorted(range(40), key=lambda i: (bits[i], i))
    order.remove(7)
    assert whole.numbers.tolist() == halves.numbers.tolist() == [*order[:4], *order[-4:]]
    assert np.array_equal(whole.stacked((1, 1, 1)), halves.stacked((1, 1, 1)))
    assert int(whole.pictures[order[0]]) == order[0]


def test_an_image_without_a_finite_likelihood_is_counted_and_fails_the_command(model, held_out, tmp_path):
    with torch.no_grad():
        model.blocks[0].proj_out.bias.fill_(-200.0)
    source, out = weights(tmp_path, model), tmp_path / "out"
    assert main(["likelihood", str(source), str(held_out), "--out", str(out)]) == 1
    summary = json.loads((out / "likelihood.json").read_text())
    assert (summary["nonfinite"], summary["bits_per_dim"]) == (12, None)
    assert not np.isfinite(rows(out)["bits_per_dim"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "cow"}, "--labels: no class is named 'cow'"),
        ({"labels": "3"}, "--labels: label 3 is not one of the model's 3 classes"),
    ],
)
def test_labels_without_meaning_are_refused(model, held_out, tmp_path, options, message):
    with pytest.raises(EvaluationError, match=message):
        measure(weights(tmp_path, model), held_out, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(model, held_out, tmp_path, make_run):
    run_dir, _ = make_run()
    before = sorted(path.name for path in run_dir.rglob("*"))
    for out in (run_dir, tmp_path):
        with pytest.raises(EvaluationError, match="holds other files"):
            measure(weights(tmp_path, model), held_out, out)
    assert sorted(path.name for path in run_dir.rglob("*")) == before
    with pytest.raises(EvaluationError, match="nothing: there is no such data set or folder of images"):
        measure(weights(tmp_path, model), tmp_path / "nothing", tmp_path / "out")


def test_a_link_in_the_place_of_a_file_is_refused_before_anything_is_measured(model, held_out, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/likelihood.parquet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvaluationError, match=r"likelihood\.parquet: it is a link, and nothing is written through one"):
        measure(weights(tmp_path, model), held_out, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["likelihood.parquet"]


def test_classes_that_mean_other_things_are_refused_unless_a_label_is_given(model, held_out, tmp_path):
    classes = json.loads((held_out / "classes.json").read_text())
    named = GAUSSIAN.model_copy(update={"classes": tuple(reversed(classes))})
    source = weights(tmp_path, model, named)
    with pytest.raises(EvaluationError, match="give --labels NAME or none"):
        measure(source, held_out, tmp_path / "out")
    assert measure(source, held_out, tmp_path / "out", labels="name:0")["measured"] == 12


def test_a_file_that_does_not_know_its_noise_has_to_be_told(model, held_out, tmp_path):
    source = tmp_path / "w.pth"
    save_weights_file(source, model.config, model.state_dict())
    with pytest.raises(EvaluationError, match="noise_std, --noise-std"):
        measure(source, held_out, tmp_path / "out", settings={"noise_std": 0.0})
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert measure(source, held_out, tmp_path / "out", settings={"noise_std": 0.1})["measured"] == 12
