"""All samples of an evaluation as one array, as ADM's evaluator takes them: the same bytes by any number of workers."""

import multiprocessing
import os
import tracemalloc

import numpy as np
import pytest
import torch

from tarflow.evaluation.images.array import ImageArray
from tarflow.evaluation.samples import store_formats
from tarflow.evaluation.samples.draw import Sampler
from tarflow.evaluation.samples.resolved_sampling import ResolvedSampling
from tarflow.evaluation.samples.store import SampleStore
from tarflow.evaluation.samples.weights_source import WeightsSource
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tests.helpers.npy import arrays_by_the_format

KIND = "npz"


@pytest.fixture
def sampler(model):
    return Sampler(model, ResolvedSampling().with_changes(seed=3))


@pytest.fixture
def opened(tmp_path, sampler):
    def make(num, place="one"):
        source = WeightsSource(model=sampler.model, weights="raw", sha256="ab" * 32, origin="x", step=20)
        store = SampleStore.of(KIND, tmp_path / place, source, sampler, num, lambda _: None)
        assert store is not None
        return store

    return make


def complete(store, sampler, chunk=4):
    store.complete(sampler, batch_size=3, chunk=chunk, lease_s=60)
    return store.folder / "samples.npz"


def array_of(path):
    found = arrays_by_the_format(path)
    assert found.keys() == {"arr_0"}
    kind, shape, values = found["arr_0"]
    assert kind == "|u1"
    return np.array(values, dtype=np.uint8).reshape(shape)


@pytest.mark.case("S02")
def test_the_array_holds_the_samples_in_their_order_and_is_scored_as_they_are(opened, sampler):
    path = complete(opened(10), sampler)
    images = array_of(path)
    assert images.shape == (10, 8, 8, 3)
    wanted = torch.stack(list(sampler.draw(range(10)).pixels()))
    ours = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert (ours.int() - wanted.expand(-1, 3, -1, -1).int()).abs().max() <= 1
    assert torch.equal(torch.cat(list(ImageArray(path, 3, 8).batches(4))), ours)
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".npz", ".tar", ".tar", ".tar"]


@pytest.mark.case("S02")
@pytest.mark.parametrize("num", [10, 2])
def test_four_processes_write_the_bytes_of_one_whatever_the_ranges(opened, sampler, num):
    whole = complete(opened(num, "one"), sampler, chunk=100).read_bytes()

    def work():
        torch.set_num_threads(1)
        complete(opened(num, "four"), sampler, chunk=2)
        os._exit(0)

    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    folder = opened(num, "four").folder
    assert (folder / "samples.npz").read_bytes() == whole
    assert not list(folder.glob(".*"))


@pytest.mark.case("S02")
@pytest.mark.case("S03")
def test_more_samples_lost_ones_and_ranges_that_overlap(opened, sampler):
    honest = sampler.noise

    def noise(indices):
        rows = honest(indices)
        rows[torch.tensor([i in (2, 9) for i in indices])] = torch.nan
        return rows

    sampler.noise = noise
    path = complete(opened(6), sampler)
    six = array_of(path)
    assert len(six) == 5, "lost ones are not in it"
    path = complete(opened(11), sampler)
    eleven = array_of(path)
    assert len(eleven) == 9
    assert np.array_equal(eleven[:5], six)
    store = opened(11)
    for drawn in sampler.draw_all(range(1, 8), 3):  # as a worker does that saw no file yet
        store.add(drawn)
    store.format.write(store.folder / "samples-00000001-00000007.tar", dict(store._waiting))
    path.unlink()
    assert np.array_equal(array_of(complete(opened(11), sampler)), eleven)


@pytest.mark.case("V06")
@pytest.mark.parametrize("what", ["gone", "cut", "shard"])
def test_a_damaged_array_is_written_again_from_the_shards(make_run, fake_features, what):
    run_dir, _ = make_run(steps=(20,), evaluation={"chunk_samples": 10})
    evaluate(run_dir, False, WorkerOptions(save=KIND), lambda _: None)
    (folder,) = (run_dir / "samples").iterdir()
    path = folder / "samples.npz"
    before = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    evaluate(run_dir, False, WorkerOptions(save=KIND), lambda _: None)
    assert path.stat().st_mtime_ns == stamp, "nothing to do"
    if what == "gone":
        path.unlink()
    else:
        victim = path if what == "cut" else folder / "samples-00000010-00000019.tar"
        os.truncate(victim, 100)
    os.utime(folder / "settings.json")
    evaluate(run_dir, False, WorkerOptions(save=KIND), lambda _: None)
    assert path.read_bytes() == before


@pytest.mark.case("V06")
def test_a_kill_while_the_array_is_written_leaves_none_and_the_next_command_writes_it(opened, sampler, monkeypatch):
    pictures = store_formats._pictures

    def killed(folder):
        for number, picture in enumerate(pictures(folder)):
            if number == 7:
                raise KeyboardInterrupt
            yield picture

    monkeypatch.setattr(store_formats, "_pictures", killed)
    with pytest.raises(KeyboardInterrupt):
        complete(opened(10), sampler)
    assert not list(opened(10).folder.glob("*.npz"))
    monkeypatch.undo()
    path = complete(opened(10), sampler)
    assert len(array_of(path)) == 10
    assert not list(path.parent.glob(".*"))


def test_the_array_is_streamed_one_sample_in_memory_at_a_time(tmp_path, monkeypatch):
    size, number = 64, 600
    monkeypatch.setattr(
        store_formats,
        "_pictures",
        lambda _folder: (torch.zeros(3, size, size, dtype=torch.uint8) for _ in range(number)),
    )
    tracemalloc.start()
    store_formats.write_samples(tmp_path / "a.npz", tmp_path, number, (3, size, size))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > number * size * size * 3
    assert peak < 100 * size * size * 3
