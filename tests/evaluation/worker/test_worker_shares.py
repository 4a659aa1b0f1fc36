"""Several workers on one result: the same bytes whoever did what, each sample once, whoever dies (real processes)."""

import json
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from typing import Any, cast

import numpy as np
import pytest
import torch

from tarflow.evaluation.worker.compute_chunk import Hooks
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.records import DamagedFileError
from tests.evaluation.conftest import model_config
from tests.helpers.checkpoints import tell
from tests.helpers.waiting import until

pytestmark = pytest.mark.usefixtures("fake_features")
fork = multiprocessing.get_context("fork")
CHUNKS, CHUNK = 10, 50
SAMPLES = CHUNKS * CHUNK


def work(run_dir, before_chunk):
    torch.set_num_threads(1)
    evaluate(run_dir, False, WorkerOptions(hooks=Hooks(before_chunk=before_chunk)), lambda _: None)
    os._exit(0)


def start(run_dir, before_chunk=lambda _: None):
    """A worker."""
    process = fork.Process(target=work, args=(run_dir, before_chunk))
    process.start()
    return process


def after(chunks, hold):
    """To be called before each chunk: so many are computed, and before every other one it calls `hold`."""
    begun: list[str] = []

    def before_chunk(name):
        if len(begun) >= chunks:
            hold()
        begun.append(name)

    return before_chunk


def for_ever():
    time.sleep(600)


def claims_of(run_dir, process):
    found = (run_dir / "evals").glob("work/images-*/claims/*-*")
    return [p.name for p in found if f'"pid": {process.pid}}}' in p.read_text()]


def chunks_done(run_dir):
    return sorted((run_dir / "evals").glob("work/images-*/*-0????"))


def stop_before_the_result(run_dir):
    """All chunks are computed, then the worker ends."""

    def stop(_merged):
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        evaluate(run_dir, False, WorkerOptions(hooks=Hooks(before_measure=stop)), lambda _: None)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


def files(run_dir, name="images-000000000320"):
    folder = run_dir / "evals" / name
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "work.json"}


@pytest.fixture
def shared_run(make_run):
    run_dir, _ = make_run(
        steps=(20,),
        sampling={"batch_size": CHUNK // 2, "guidance": 0, "denoise": 0},
        evaluation={"num_samples": SAMPLES, "chunk_samples": CHUNK, "neighbour_samples": 75, "lease_s": 600},
    )
    return run_dir


@pytest.mark.case("S01", "S08")
def test_three_workers_one_killed_one_late_write_the_bytes_of_one(shared_run, tmp_path):
    """Ten chunks of samples and 12 held-out images. The killed one holds a chunk, and its lease is ten minutes."""
    alone = tmp_path / "alone"
    shutil.copytree(shared_run, alone)
    one = start(alone)
    victim = start(shared_run, after(0, for_ever))
    until("a claim", lambda: claims_of(shared_run, victim))
    come = fork.Event()
    other = start(shared_run, after(3, lambda: come.wait(60)))  # the late one finds something to do
    until("chunks", lambda: len(chunks_done(shared_run)) >= 2)
    kill(victim)
    late = start(shared_run, lambda _: come.set())
    for process in (one, other, late):
        process.join(60)
        assert process.exitcode == 0
    assert files(shared_run) == files(alone)
    assert set(files(alone)) == {"result.json", "certificates.npz", "grid.png", "neighbours.png", "trajectory.png"}
    result = json.loads(files(alone)["result.json"])
    assert result["samples"]["asked"] == result["num_samples"] == SAMPLES
    done_by = json.loads((shared_run / "evals/images-000000000320/work.json").read_text())["workers"]
    assert sorted(chunk for chunks in done_by.values() for chunk in chunks) == [
        "likelihood-00000", *(f"samples-{k:05d}" for k in range(CHUNKS)),
    ]  # fmt: skip
    assert len(done_by) == 2
    assert not any(name.endswith(f":{victim.pid}") for name in done_by)
    for run_dir in (shared_run, alone):
        assert len((run_dir / "evals.jsonl").read_text().splitlines()) == 1
        assert not (run_dir / "evals/work").exists()


@pytest.mark.case("S02")
def test_all_killed_and_one_started_again_draws_only_what_is_missing(shared_run, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(shared_run, alone)
    workers = [start(shared_run, after(2, for_ever)) for _ in range(2)]
    until("chunks", lambda: len(chunks_done(shared_run)) >= 4)
    for process in workers:
        kill(process)
    before = {p.name: p.read_bytes() for p in chunks_done(shared_run)}
    assert 4 <= len(before) < CHUNKS
    drawn: list[str] = []
    counting = WorkerOptions(hooks=Hooks(after_chunk=drawn.append))
    for run_dir, options in ((shared_run, counting), (alone, WorkerOptions())):
        assert len(evaluate(run_dir, False, options, lambda _: None).done) == 1
    starts = [CHUNK * int(name[-5:]) for name in [*drawn, *before] if name.startswith("samples")]
    assert sorted(starts) == list(range(0, SAMPLES, CHUNK))
    assert files(shared_run) == files(alone)


def test_a_model_that_is_told_the_noise_is_shared_like_any_other(make_run, tmp_path):
    """Denoising in random steps, too: they are keyed by sample, not by worker."""
    run_dir, _ = make_run(
        steps=(20,),
        model=model_config(noise_conditioning=True).model_dump(),
        train={"global_batch_size": 16, "max_images": 320, "noise_std": 0.0, "noise_range": [0.05, 0.3]},
        sampling={"guidance": 0.5, "batch_size": 5, "denoise_steps": 3, "denoise_stochastic": True},
        evaluation={"num_samples": 40, "chunk_samples": 10, "neighbour_samples": 16, "lease_s": 600},
    )
    alone = tmp_path / "alone"
    shutil.copytree(run_dir, alone)
    one, first = start(alone), start(run_dir, after(2, for_ever))
    until("two chunks", lambda: len(chunks_done(run_dir)) == 2)
    kill(first)
    second = start(run_dir)
    for process in (one, second):
        process.join(60)
        assert process.exitcode == 0
    assert files(run_dir) == files(alone)
    assert "denoising.png" in files(alone)
    workers = json.loads((run_dir / "evals/images-000000000320/work.json").read_text())["workers"]
    assert len(workers) == 2


def test_the_statistics_are_those_of_all_features_at_once(shared_run):
    """Merged chunks against two passes over everything; the features are kept for measures that need them."""
    seen: dict[str, Any] = {}

    def keep(merged):
        seen.update(features=merged.samples.features, parts=merged.samples.statistics.parts())

    evaluate(shared_run, False, WorkerOptions(hooks=Hooks(before_measure=keep)), lambda _: None)
    rows = seen["features"].double()
    assert rows.shape == (SAMPLES, 8)
    count, mean, scatter = seen["parts"]
    assert count == SAMPLES
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scatter, (rows - rows.mean(0)).T @ (rows - rows.mean(0)), rtol=1e-10, atol=1e-6)


def test_variants_are_evaluated_beside_the_runs_own_settings(make_run):
    run_dir, _ = make_run(
        evaluation={"variants": [{"weights": "raw"}, {"guidance": "2.0", "denoise": "0"}, {"guidance": "1.0"}]}
    )
    done = evaluate(run_dir, False, WorkerOptions(), lambda _: None).done
    of_step = [r for r in done if r["step"] == 20]
    assert [(r["weights"], r["settings"]["sampling"]["guidance"]) for r in of_step] == [
        ("ema-0.100", 1.0), ("raw", 1.0), ("ema-0.100", 2.0),
    ]  # fmt: skip
    assert of_step[0]["name"] == "images-000000000320"
    assert len({r["name"] for r in done}) == len(done) == 6, "a variant that is the run's own is not done twice"
    assert evaluate(run_dir, False, WorkerOptions(), lambda _: None).done == []


def test_the_order_is_a_setting(make_run):
    run_dir, _ = make_run(evaluation={"order": "newest_first"})
    assert [r["step"] for r in evaluate(run_dir, False, WorkerOptions(), lambda _: None).done] == [20, 10]


def test_what_is_evaluated_is_pinned_all_the_while(make_run):
    from tarflow.trainer.checkpoint.retention import apply_retention

    run_dir, _ = make_run(steps=(10, 20, 30))
    removed = []
    hooks = Hooks(before_chunk=lambda _: removed.append(apply_retention(run_dir, 2, 0)))
    evaluate(run_dir, False, WorkerOptions(step=10, hooks=hooks), lambda _: None)
    assert set(map(tuple, removed)) == {()}
    assert apply_retention(run_dir, 2, 0) == ["images-000000000160"]


def test_a_weights_file_is_evaluated_like_a_checkpoint(make_run, make_model, digit_like, tmp_path):
    import tarflow.cli
    from tarflow.models.weights import save_weights_file

    model = make_model()
    save_weights_file(tmp_path / "m.safetensors", model.config, model.state_dict())
    settings = [f"data.train={digit_like / 'train'}", "train.noise_std=0.1", "evaluation.num_samples=30"]
    arguments = ["evaluate", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "out"), *settings]
    assert tarflow.cli.main(arguments) == 0
    (result,) = (tmp_path / "out/evals").glob("weights-*/result.json")
    said = json.loads(result.read_text())
    assert (said["weights"], said["step"], said["num_samples"], said["run"]) == ("file", None, 30, None)
    assert said["fd_efficientnet_lite0"] > 0
    assert said["settings"]["sampling"]["denoise"] == 1.0
    before = result.stat().st_mtime_ns
    assert tarflow.cli.main(arguments) == 0
    assert result.stat().st_mtime_ns == before
    for wrong in (
        arguments[:4] + settings[1:],
        arguments[:4] + settings[:1],
        [*arguments, "optim.lr=1"],
        arguments[:2],
    ):
        assert tarflow.cli.main(wrong) == 2


def test_a_refused_weights_file_writes_nothing_and_leaves_a_run_as_it_is(make_run, make_model, digit_like, tmp_path):
    from tarflow.data_pipeline.errors import DataError
    from tarflow.evaluation.errors import EvaluationError
    from tarflow.evaluation.worker.follow import WorkerOptions, evaluate_file
    from tarflow.models.weights import save_weights_file

    run_dir, _ = make_run()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    model = make_model()
    save_weights_file(tmp_path / "m.safetensors", model.config, model.state_dict())
    given = [f"data.train={digit_like / 'train'}", "train.noise_std=0.1"]
    with pytest.raises(EvaluationError, match="is a run directory"):
        evaluate_file(tmp_path / "m.safetensors", run_dir, WorkerOptions(overrides=given))
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    nowhere = WorkerOptions(overrides=["data.train=/nowhere", "train.noise_std=0.1"])
    with pytest.raises(DataError, match=r"no data set at /nowhere.*data\.train"):
        evaluate_file(tmp_path / "m.safetensors", tmp_path / "out", nowhere)
    assert not (tmp_path / "out").exists()


def test_a_chunks_file_says_who_did_it(shared_run):
    """Stopped before the result: the chunks stay, with their owner and nothing that is not an array."""
    stop_before_the_result(shared_run)
    path = chunks_done(shared_run)[-1]
    assert zipfile.is_zipfile(path)
    with np.load(path) as stored:
        said = json.loads(str(stored["said"]))
        assert stored["count"].tolist() == [CHUNK]
        assert stored["scatter"].dtype == np.float64
    assert said["about"]["by"].endswith(f":{os.getpid()}")
    assert {"sampling", "features", "statistics"} <= set(said["about"]["seconds"])
    assert said["of"]["chunk"] == path.name


@pytest.mark.case("V08")
def test_work_by_two_versions_names_both_and_the_result_is_the_same(shared_run, tmp_path):
    """The code that trained is a fact of the result; who evaluated with which code stands beside it."""
    old, new = {"version": "0.2.0", "commit": "ab" * 20, "dirty": False}, {"version": "0.3.0"}
    trained = {"version": "0.1.0", "commit": "cd" * 20, "dirty": True}
    tell(shared_run / "checkpoints/images-000000000320", code=trained, classes=["0", "1", "2"])
    alone = tmp_path / "alone"
    shutil.copytree(shared_run, alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tarflow.evaluation.worker.task.code_version", lambda: old)
        stop_before_the_result(shared_run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tarflow.evaluation.worker.task.code_version", lambda: new)
        for run_dir in (shared_run, alone):
            evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    assert files(shared_run) == files(alone)
    result = json.loads(files(alone)["result.json"])
    assert result["provenance"]["code"] == trained
    assert (result["provenance"]["noise_std"], result["provenance"]["weights"]) == (0.1, "ema-0.100")
    assert result["grid_rows"] == ["0", "1", "2"]
    codes = [json.loads((r / "evals/images-000000000320/work.json").read_text())["code"] for r in (shared_run, alone)]
    assert codes == [[new, old], [new]]


def test_labels_by_frequency_leave_the_grid_in_rows_of_classes(make_run):
    run_dir, _ = make_run(steps=(20,), sampling={"labels": "training"}, evaluation={"num_samples": 40})
    (result,) = evaluate(run_dir, False, WorkerOptions(), lambda _: None).done
    assert result["settings"]["sampling"]["labels"] == "drawn by the frequencies in the training data"
    assert sum(result["settings"]["sampling"]["class_counts"]) == 48
    plain, _ = make_run(steps=(20,), name="plain", evaluation={"num_samples": 40})
    (other,) = evaluate(plain, False, WorkerOptions(), lambda _: None).done
    assert files(run_dir)["grid.png"] == files(plain)["grid.png"]
    assert result["fd_efficientnet_lite0"] != other["fd_efficientnet_lite0"]


def test_chunks_that_nobody_needs_any_more_are_cleared_away(make_run):
    run_dir, _ = make_run(steps=(20,))
    gone = run_dir / "evals/work/images-000000000160-aaaaaaaaaaaa-bbbbbbbbbbbb"
    wanted = run_dir / "evals/work/images-000000000320-aaaaaaaaaaaa-bbbbbbbbbbbb"
    for folder in (gone, wanted):
        folder.mkdir(parents=True)
    evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    assert not gone.exists(), "its checkpoint was removed"
    assert wanted.exists(), "another worker with other settings may be at it"


def test_chunks_count_as_progress_of_a_requeued_job(shared_run):
    """A result that takes longer than one allocation must not look like a job that gets nowhere."""
    from types import SimpleNamespace

    from tarflow.cluster.job.description import Job
    from tarflow.cluster.job.requeue import progress

    job = cast(Job, SimpleNamespace(kind="evaluate", run_dir=str(shared_run)))
    seen = [progress(job)]
    hooks = Hooks(after_chunk=lambda _: seen.append(progress(job)))
    evaluate(shared_run, False, WorkerOptions(hooks=hooks), lambda _: None)
    seen.append(progress(job))
    assert seen == [0, *range(CHUNKS + 1), 1_000_000]


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.case("V06")
def test_a_damaged_chunk_is_computed_again_and_said(shared_run, tmp_path, size):
    lines: list[str] = []
    alone = tmp_path / "alone"
    shutil.copytree(shared_run, alone)
    evaluate(alone, False, WorkerOptions(), lambda _: None)
    stop_before_the_result(shared_run)
    for chunk in (chunks_done(shared_run)[0], chunks_done(shared_run)[-1]):
        os.truncate(chunk, size if size >= 0 else chunk.stat().st_size + size)
    evaluate(shared_run, False, WorkerOptions(), lines.append)
    assert sum("is damaged and computed again" in line for line in lines) == 2
    assert files(shared_run) == files(alone)


@pytest.mark.case("V06")
def test_a_damaged_plan_says_what_to_remove(shared_run):
    from tarflow.evaluation.shared_work import SharedWork

    SharedWork(shared_run / "work", {"batch_size": 3}, 60)
    (shared_run / "work/plan.json").write_text("{")
    with pytest.raises(
        DamagedFileError, match=r"plan\.json \(.*\) is damaged .*; remove .*/work to begin this work again"
    ):
        SharedWork(shared_run / "work", {"batch_size": 3}, 60)


@pytest.mark.parametrize("text", ["", "[]", None])
@pytest.mark.case("V06")
def test_a_result_that_cannot_be_read_is_set_aside_and_evaluated_again(make_run, text):
    run_dir, _ = make_run(steps=(20,))
    evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    lines: list[str] = []
    before = files(run_dir)
    result = run_dir / "evals/images-000000000320/result.json"
    result.unlink() if text is None else result.write_text(text)
    assert len(evaluate(run_dir, False, WorkerOptions(), lines.append).done) == 1
    assert files(run_dir) == before
    assert any("set aside as damaged-images-000000000320, evaluated again" in line for line in lines)
    assert (run_dir / "evals/damaged-images-000000000320/grid.png").exists()
