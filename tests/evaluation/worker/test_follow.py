"""The worker: every checkpoint once, atomically, whatever dies, with all options in the result."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tarflow.evaluation import results
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.worker.compute_chunk import Hooks
from tarflow.evaluation.worker.evaluate import Evaluator
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.evaluation.worker.real_images import RealImages
from tarflow.evaluation.worker.recipe import load_recipes
from tarflow.trainer.errors import TrainerError

pytestmark = pytest.mark.usefixtures("fake_features")


def run_once(run_dir, **options):
    lines: list[str] = []
    outcome = evaluate(run_dir, False, WorkerOptions(**options), lines.append)
    return SimpleNamespace(done=outcome.done, failed=outcome.failed, lines=lines)


def result_of(run_dir, name="images-000000000320"):
    return json.loads((run_dir / "evals" / name / "result.json").read_text())


def evals_lines(run_dir):
    return [json.loads(line) for line in (run_dir / "evals.jsonl").read_text().splitlines()]


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_checkpoint_is_evaluated_once_and_left_alone_afterwards(make_run):
    run_dir, _ = make_run()
    assert [r["step"] for r in run_once(run_dir).done] == [10, 20]
    before = tree(run_dir)
    again = run_once(run_dir)
    assert again.done == []
    assert again.failed == {}
    assert tree(run_dir) == before
    names = sorted(p.name for p in (run_dir / "evals").iterdir() if p.is_dir())
    assert names == ["images-000000000160", "images-000000000320"]
    assert [row["name"] for row in evals_lines(run_dir)] == names


@pytest.mark.case("V09")
def test_samples_that_are_images_of_the_reference_are_counted_and_said(make_run, monkeypatch):
    """The reference's hashes are made those of the samples: a flow that reproduces its training images."""
    run_dir, _ = make_run()
    run_once(run_dir, step=10)
    result = result_of(run_dir, "images-000000000160")
    assert result["identical_images"] == 0
    assert result["kernel_estimate"] == "all pairs"
    drawn: list[int] = []

    def all_of_them(ours, theirs):
        drawn.extend(ours)
        return len(ours)

    monkeypatch.setattr("tarflow.evaluation.worker.measure.count_identical", all_of_them)
    run_once(run_dir, step=20)
    result = result_of(run_dir)
    assert len(drawn) == result["num_samples"] == 24
    assert result["identical_images"] == 24
    assert "24 of 24 samples are, pixel for pixel, images of the reference" in result["warnings"]


@pytest.mark.case("V15")
def test_damaged_statistics_beside_the_data_are_passed_over_and_the_run_makes_its_own(make_run):
    run_dir, _ = make_run()
    (recipe, *_) = load_recipes(run_dir, [])
    lines: list[str] = []

    def real():
        return RealImages(
            results.evals_dir(run_dir), recipe.config, recipe.settings, torch.device("cpu"), log=lines.append
        )

    first = real().reference  # of the run, since nothing lies beside the data
    assert first.path.parent == results.evals_dir(run_dir)
    beside = Path(recipe.config.data.train) / first.path.name
    for damaged in (beside, first.path):
        damaged.write_bytes(b"cut")
        try:
            again = real().reference
        finally:
            beside.unlink(missing_ok=True)
        assert again.path == first.path
        assert torch.equal(again.rows, first.rows)
        assert any(line.startswith(f"{damaged} is ") and "damaged" in line for line in lines)


@pytest.mark.case("S11")
def test_the_result_holds_every_option(make_run):
    run_dir, _ = make_run()
    run_once(run_dir)
    result = result_of(run_dir)
    assert (result["step"], result["images_seen"], result["weights"], result["status"]) == (20, 320, "ema-0.100", "ok")
    assert result["fd_efficientnet_lite0"] > 0
    assert not any("fid" in key for key in result)
    assert result["settings"]["sampling"] == {
        "guidance": 1.0, "guide": "ab", "attn_temp": 1.0, "annealed": True, "denoise": 1.0, "noise_std": 0.1,
        "param_dtype": "float32", "seed": 0, "labels": "balanced: i % num_classes",
    }  # fmt: skip
    assert result["samples"]["asked"] == result["num_samples"] == 24
    assert result["nonfinite"] == 0
    assert 0 <= result["label_agreement"] <= 1
    assert result["bits_per_dim"] > 0
    assert result["bits_per_dim_stderr"] > 0
    assert result["likelihood"]["images"] == 12
    assert result["likelihood"]["noise"].startswith("gaussian, standard deviation 0.1")
    assert result["reference"]["images_used"] == 48
    assert result["reference"]["fingerprint"] != result["likelihood"]["fingerprint"]
    assert result["features"]["sha256"] == "f00d"
    assert len(result["weights_sha256"]) == 64
    assert not {"seconds", "machine", "time"} & set(result), "what differs from worker to worker lies apart"
    work = json.loads((run_dir / "evals/images-000000000320/work.json").read_text())
    assert {"sampling", "features", "likelihood", "total"} <= set(work["seconds"])
    assert work["machine"]["torch"] == torch.__version__
    pictures = {p.name for p in (run_dir / "evals/images-000000000320").glob("*.png")}
    assert pictures == {"grid.png", "grid-noisy.png", "grid-unguided.png", "neighbours.png", "trajectory.png"}


def test_the_distance_does_not_depend_on_the_batch_size(make_run):
    a, _ = make_run(name="a", sampling={"batch_size": 24})
    b, _ = make_run(name="b", sampling={"batch_size": 5})
    run_once(a)
    run_once(b)
    ours, theirs = result_of(a), result_of(b)
    assert ours["settings_hash"] == theirs["settings_hash"]
    assert ours["fd_efficientnet_lite0"] == pytest.approx(theirs["fd_efficientnet_lite0"], rel=1e-3)
    assert ours["bits_per_dim"] == pytest.approx(theirs["bits_per_dim"], abs=1e-6)
    assert ours["label_agreement"] == theirs["label_agreement"]


def test_other_settings_have_a_directory_of_their_own(make_run):
    run_dir, _ = make_run(steps=(20,))
    run_once(run_dir)
    own = tree(run_dir / "evals/images-000000000320")
    other = run_once(run_dir, overrides=["sampling.guidance=0", "evaluation.weights=raw"]).done[0]
    assert other["name"] == f"images-000000000320-{other['settings_hash']}"
    assert (other["weights"], other["settings"]["sampling"]["guidance"]) == ("raw", 0.0)
    assert not (run_dir / "evals" / other["name"] / "grid-unguided.png").exists()
    assert tree(run_dir / "evals/images-000000000320") == own
    assert run_once(run_dir, overrides=["sampling.guidance=0", "evaluation.weights=raw"]).done == []
    assert run_once(run_dir, overrides=["sampling.guidance=1.0"]).done == []  # these are the run's own
    assert len(evals_lines(run_dir)) == 2


def test_only_settings_of_the_evaluation_can_be_overridden(make_run):
    run_dir, _ = make_run(steps=(20,))
    with pytest.raises(
        EvaluationError, match=r"override 'train\.noise_std=0\.2'.*sections sampling, evaluation and data"
    ):
        run_once(run_dir, overrides=["train.noise_std=0.2"])
    with pytest.raises(TrainerError, match=r"did you mean sampling\.guidance"):
        run_once(run_dir, overrides=["sampling.guidence=2"])


def test_only_the_newest_or_one_step(make_run):
    run_dir, _ = make_run(steps=(10, 20, 30))
    assert [r["step"] for r in run_once(run_dir, newest_only=True).done] == [30]
    assert [r["step"] for r in run_once(run_dir, step=10).done] == [10]
    with pytest.raises(TrainerError, match="no usable checkpoint of step 15"):
        run_once(run_dir, step=15)


def test_a_worker_killed_before_its_line_is_announced_by_the_next(make_run):
    run_dir, _ = make_run(steps=(20,))
    run_once(run_dir)
    (run_dir / "evals.jsonl").write_text('{"name": "step-0000')  # torn
    run_once(run_dir)
    assert len((run_dir / "evals.jsonl").read_text().splitlines()) == 1, "its own worker may be about to do it"
    work = run_dir / "evals/images-000000000320/work.json"
    work.write_text(json.dumps(json.loads(work.read_text()) | {"time": time.time() - 60}))
    run_once(run_dir)
    lines = (run_dir / "evals.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["name"] == "images-000000000320"
    assert len(lines) == 2


def test_a_killed_evaluation_leaves_no_half_result(make_run):
    run_dir, _ = make_run(steps=(20,))

    def killed(_merged):
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run_once(run_dir, hooks=Hooks(before_measure=killed))
    assert not (run_dir / "evals/images-000000000320").exists()
    assert not (run_dir / "evals.jsonl").exists()
    assert not list((run_dir / "checkpoints/pins").iterdir())
    leftover = run_dir / f"evals/.images-000000000320.{__import__('os').uname().nodename}.999999.abc.tmp"
    leftover.mkdir()
    assert len(run_once(run_dir).done) == 1
    assert [p.name for p in (run_dir / "evals").iterdir() if p.name.startswith(".")] == []


def test_two_workers_publish_a_result_once(make_run):
    """Both start before there is a result; the second finds everything done."""
    run_dir, _ = make_run(steps=(20,))
    from tarflow.trainer.checkpoint.find import find

    (recipe,) = load_recipes(run_dir, [])
    quiet: dict[str, Any] = {"log": lambda _: None}
    real = RealImages(results.evals_dir(run_dir), recipe.config, recipe.settings, torch.device("cpu"), **quiet)
    workers = [Evaluator(run_dir, recipe, real, **quiet) for _ in range(2)]
    published = [worker.evaluate(find(run_dir, 20)) for worker in workers]
    assert published[0] is not None
    assert published[1] is None
    assert len(evals_lines(run_dir)) == 1
    assert not (run_dir / "evals/work").exists()


def test_a_step_saved_again_with_other_weights_is_evaluated_again(make_run, save_checkpoint):
    run_dir, config = make_run(steps=(20,))
    first = run_once(run_dir).done[0]
    time.sleep(0.05)
    save_checkpoint(run_dir, config, 20, 320, seed=0)  # the same weights: nothing to do
    assert run_once(run_dir).done == []
    time.sleep(0.05)
    save_checkpoint(run_dir, config, 20, 320, seed=1)
    again = run_once(run_dir)
    assert "saved again with other weights" in "\n".join(again.lines)
    assert again.done[0]["weights_sha256"] != first["weights_sha256"]
    assert result_of(run_dir)["weights_sha256"] == again.done[0]["weights_sha256"]
    assert len(evals_lines(run_dir)) == 2


@pytest.mark.case("T06")
def test_a_missing_set_of_weights_is_an_error_without_fallback(make_run, save_checkpoint):
    run_dir, config = make_run(steps=())
    save_checkpoint(run_dir, config, 10, 160, averages=["ema-0.050"])
    outcome = run_once(run_dir)
    assert outcome.done == []
    assert "holds no weights 'ema-0.100'; it holds: ema-0.050, raw" in outcome.failed["images-000000000160"]
    assert not (run_dir / "evals.jsonl").exists()


def test_a_checkpoint_of_another_shape_is_a_clear_error(make_run):
    run_dir, _ = make_run(steps=(20,))
    text = yaml.safe_load((run_dir / "config.yaml").read_text())
    text["model"]["channels"] = 32
    (run_dir / "config.yaml").write_text(yaml.safe_dump(text))
    reason = run_once(run_dir).failed["images-000000000320"]
    assert "images-000000000320" in reason
    assert "blocks.0.proj_in.weight: [16, 16] in the file, [32, 16] in the model" in reason


def test_one_bad_checkpoint_does_not_stop_the_others(make_run, save_checkpoint):
    run_dir, config = make_run(steps=(10,))
    save_checkpoint(run_dir, config, 15, 240, averages=[])
    save_checkpoint(run_dir, config, 20, 320)
    outcome = run_once(run_dir)
    assert [r["step"] for r in outcome.done] == [10, 20]
    assert list(outcome.failed) == ["images-000000000240"]


def test_a_directory_that_is_no_run_is_a_clear_error(tmp_path, make_run):
    with pytest.raises(TrainerError, match="no run directory at"):
        run_once(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(TrainerError, match="is not a run directory"):
        run_once(tmp_path / "other")
    empty, _ = make_run(steps=())
    (empty / "checkpoints/images-000000000160.tmp").mkdir(parents=True)
    with pytest.raises(EvaluationError, match=r"no committed checkpoint yet.*\n  images-000000000160\.tmp: a save was"):
        run_once(empty)


@pytest.mark.case("S03")
def test_too_many_lost_samples_fail_the_distance_and_are_said(make_run, save_checkpoint):
    run_dir, config = make_run(steps=())
    save_checkpoint(run_dir, config, 20, 320, scale=float("inf"))
    outcome = run_once(run_dir)
    result = result_of(run_dir)
    assert result["status"] == "failed"
    assert result["fd_efficientnet_lite0"] is None
    assert result["nonfinite"] == 24
    assert "24 of 24 samples are not finite" in outcome.failed["images-000000000320"]
    assert evals_lines(run_dir)[0]["status"] == "failed"


@pytest.mark.case("S10")
def test_guiding_a_run_trained_without_dropped_labels_is_refused(make_run):
    run_dir, _ = make_run(steps=(20,), train={"label_dropout": 0})
    with pytest.raises(EvaluationError, match=r"train\.label_dropout=0"):
        run_once(run_dir)
    assert len(run_once(run_dir, overrides=["sampling.guidance=0"]).done) == 1


@pytest.mark.case("S04")
def test_given_reference_statistics_must_match(make_run):
    run_dir, _ = make_run(steps=(20,))
    run_once(run_dir)
    reference = next((run_dir / "evals").glob("reference-*.npz"))
    shutil.copy(reference, run_dir / "mine.npz")
    used = run_once(run_dir, reference=run_dir / "mine.npz", overrides=["evaluation.num_samples=12"])
    assert used.done[0]["reference"]["file"] == "mine.npz"
    with pytest.raises(EvaluationError, match="images: 48 in the file, 20 here"):
        run_once(run_dir, reference=run_dir / "mine.npz", overrides=["evaluation.reference_images=20"])


def test_a_model_without_classes_and_a_run_without_held_out_images(make_run, digit_like):
    run_dir, _ = make_run(
        steps=(20,), model={"num_classes": 0}, sampling={"guidance": 0, "denoise": 0}, data={"validation": None}
    )
    assert run_once(run_dir).failed == {}
    result = result_of(run_dir)
    assert result["label_agreement"] is None
    assert result["bits_per_dim"] is None
    assert "data.validation is not set" in result["likelihood"]["note"]
    assert {p.name for p in (run_dir / "evals/images-000000000320").glob("*.png")} == {
        "grid.png", "neighbours.png", "trajectory.png",
    }  # fmt: skip


def events_of(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard/evaluation"), size_guidance={"images": 0})
    events.Reload()
    return events


def test_figures_go_to_tensorboard(make_run):
    run_dir, _ = make_run()
    run_once(run_dir)
    events = events_of(run_dir)
    assert [e.step for e in events.Scalars("eval/fd_efficientnet_lite0")] == [160, 320]
    assert [e.value for e in events.Scalars("eval/bits_per_dim")][1] == pytest.approx(
        result_of(run_dir)["bits_per_dim"]
    )
    quiet, _ = make_run(name="quiet", log={"tensorboard": False})
    run_once(quiet)
    assert not (quiet / "tensorboard").exists()


@pytest.mark.case("N15")
def test_a_runs_evaluations_share_one_file_of_events_and_grids_are_in_it(make_run):
    """In a folder of its own: TensorBoard would not go back to the training's file after reading a later one."""
    import io

    import numpy as np
    from PIL import Image

    run_dir, _ = make_run()
    run_once(run_dir, step=10)
    run_once(run_dir, step=20)  # workers that know nothing of each other
    run_once(run_dir, overrides=["sampling.guidance=0"], newest_only=True)
    (file,) = (run_dir / "tensorboard").rglob("*tfevents*")
    assert file.parent == run_dir / "tensorboard/evaluation"
    events = events_of(run_dir)
    (other,) = (p.name for p in (run_dir / "evals").glob("images-000000000320-*"))
    tags = events.Tags()["images"]
    assert tags == ["eval/grid", f"eval{other.removeprefix('images-000000000320')}/grid"]
    assert [e.step for e in events.Images("eval/grid")] == [160, 320]
    shown = Image.open(io.BytesIO(events.Images("eval/grid")[1].encoded_image_string))
    assert np.array_equal(np.array(shown), np.array(Image.open(run_dir / "evals/images-000000000320/grid.png")))

    file.write_bytes(file.read_bytes()[:-7])  # as after a crash in the middle of a write
    run_once(run_dir, overrides=["sampling.guidance=0.5"], newest_only=True)
    assert len(list((run_dir / "tensorboard").rglob("*tfevents*"))) == 2
    assert len(events_of(run_dir).Tags()["images"]) == 2  # the torn one is lost, the new one is read


@pytest.mark.case("N15")
def test_a_large_grid_is_made_smaller_for_tensorboard(tmp_path):
    from PIL import Image

    from tarflow.evaluation.tracking.event_file import append_events

    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "grid.png")
    append_events(
        tmp_path, 5, {"eval/fd": 1.5}, {"eval/grid": tmp_path / "grid.png", "eval/none": tmp_path / "no.png"}, 1.0
    )
    (image,) = events_of(tmp_path).Images("eval/grid")
    assert (image.width, image.height, image.step) == (1024, 512, 5)
    assert events_of(tmp_path).Tags()["images"] == ["eval/grid"]
    assert events_of(tmp_path).Scalars("eval/fd")[0].value == 1.5


@pytest.mark.case("H06")
def test_damaged_pictures_and_event_files_cost_nothing_else(tmp_path):
    from tarflow.evaluation.tracking.event_file import append_events

    (tmp_path / "grid.png").write_bytes(b"no picture")
    os.mkfifo(tmp_path / "pipe.png")
    pictures = {"eval/grid": tmp_path / "grid.png", "eval/pipe": tmp_path / "pipe.png"}
    folder = tmp_path / "tensorboard/evaluation"
    folder.mkdir(parents=True)
    name = "events.out.tfevents.000000000{}.evaluation"
    os.mkfifo(folder / name.format(0))
    (folder / name.format(1)).write_bytes(bytes(1 << 20))  # records without length, if one believes them
    (folder / name.format(2)).symlink_to(tmp_path / "elsewhere")
    append_events(tmp_path, 5, {"eval/fd": 1.5}, pictures, 1.0)
    assert not (tmp_path / "elsewhere").exists()
    assert (folder / name.format(3)).stat().st_size > 0
    for path in (folder / name.format(number) for number in (0, 1, 2)):
        path.unlink()
    assert events_of(tmp_path).Scalars("eval/fd")[0].value == 1.5


def test_watching_ends_when_the_last_checkpoint_is_evaluated(make_run, save_checkpoint):
    run_dir, config = make_run(steps=())

    def train():
        for step in (10, 20):
            time.sleep(0.3)
            save_checkpoint(run_dir, config, step, 16 * step)

    trainer = threading.Thread(target=train)
    trainer.start()
    outcome = evaluate(run_dir, True, WorkerOptions(poll_s=0.05), lambda _: None)
    trainer.join()
    assert [r["step"] for r in outcome.done] == [10, 20]


def test_watching_waits_for_a_run_that_is_being_made_and_gives_up_when_idle(make_run, tmp_path):
    lines: list[str] = []
    started = time.monotonic()
    with pytest.raises(TrainerError, match="no run directory"):
        evaluate(tmp_path / "later", True, WorkerOptions(wait_for_run_s=0.3), lines.append)
    assert time.monotonic() - started > 0.3
    run_dir, _ = make_run(steps=(10,))
    outcome = evaluate(run_dir, True, WorkerOptions(poll_s=0.05, idle_s=0.3), lines.append)
    assert [r["step"] for r in outcome.done] == [10]
    assert "stopped following" in lines[-1]


def test_a_checkpoint_removed_by_retention_is_passed_over(make_run, monkeypatch):
    run_dir, _ = make_run()
    from tarflow.evaluation.worker import follow as worker

    real = worker.scan
    calls: list[int] = []

    def listed_then_removed(path):
        found = real(path)
        if not calls:
            shutil.rmtree(run_dir / "checkpoints/images-000000000160")
        calls.append(1)
        return found

    monkeypatch.setattr(worker, "scan", listed_then_removed)
    outcome = run_once(run_dir)
    assert [r["step"] for r in outcome.done] == [20]
    assert outcome.failed == {}


def test_results_are_listed_by_images_seen(make_run):
    run_dir, _ = make_run(steps=(10, 20))
    run_once(run_dir)
    (run_dir / "evals/images-000000000080").mkdir()  # a directory without a result is none
    assert [r["step"] for _, r in results.read_results(run_dir)] == [10, 20]
