"""The likelihoods of single images sum up to the evaluated figure, are those of Python, and rank other images lower."""

import json
import multiprocessing

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tarflow
from benchmarks.likelihood_ranks import area, bits_of, plot
from tarflow.evaluation.images.data_set import ImageSet
from tarflow.evaluation.likelihood import measure as measuring
from tarflow.evaluation.likelihood.measure import LikelihoodRequest, measure_likelihoods
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tests.helpers.data import halves, prepared


def work(run_dir, data, out, barrier):
    torch.set_num_threads(1)
    barrier.wait(60)
    evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    measuring.CHUNK = 4
    measure_likelihoods(LikelihoodRequest(source=run_dir, data=data, out=out, draws=4), lambda _: None)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rows_sum_up_to_the_evaluated_figure_for_any_number_of_workers(
    make_run, digit_like, fake_features, tmp_path, workers
):
    run_dir, config = make_run(
        steps=(20,), sampling={"batch_size": 5, "guidance": 0},
        evaluation={"num_samples": 6, "chunk_samples": 5, "neighbour_samples": 0, "grid": [1, 1], "likelihood_draws": 4},
    )  # fmt: skip
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(workers)
    group = [
        context.Process(target=work, args=(run_dir, digit_like / "val", tmp_path / "out", barrier))
        for _ in range(workers)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        assert process.exitcode == 0
    evaluated = json.loads((run_dir / "evals/images-000000000320/result.json").read_text())["bits_per_dim"]
    table = pq.read_table(tmp_path / "out/likelihood.parquet").to_pydict()
    nats, dims = np.array(table["log_prob"]), 64
    assert len(nats) == 12
    assert abs((7 - nats.sum() / (12 * dims * np.log(2))) - evaluated) < 1e-6
    assert abs(sum(table["bits_per_dim"]) / 12 - evaluated) < 1e-6
    flow = tarflow.load(run_dir)
    pixels, labels, _ = (torch.cat(parts) for parts in zip(*ImageSet(config.data.held_out, config.model).batches(True)))
    of_python = flow.log_prob(pixels, labels, draws=4).numpy()
    np.testing.assert_allclose(nats / dims, of_python / dims, atol=1e-6)


def test_images_of_another_set_are_less_likely(trained, digit_like, tmp_path):
    (tmp_path / "other").mkdir()
    other = prepared(tmp_path / "other", *halves(48), val_fraction=0.5)
    inside, outside = bits_of(trained, digit_like / "val", 0), bits_of(trained, other / "val", 0)
    assert (len(inside), len(outside)) == (12, 24)
    assert area(inside, outside) > 0.95
    assert area(outside, inside) == pytest.approx(1 - area(inside, outside))
    plot(tmp_path / "plot.svg", {"bars": inside, "halves": outside})
    assert "bars" in (tmp_path / "plot.svg").read_text()


def test_the_area_is_the_share_of_pairs():
    inside, outside = np.array([1.0, 2.0, 2.0, 5.0]), np.array([2.0, 3.0])
    pairs = [(b > a) + 0.5 * (b == a) for a in inside for b in outside]
    assert area(inside, outside) == pytest.approx(float(np.mean(pairs)))
