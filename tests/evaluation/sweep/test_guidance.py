"""The guidance sweep: halving, choice, default; shared and resumable."""

import json
import multiprocessing
import os
import shutil
from typing import Any

import pytest
import torch

import tarflow.cli
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.run_config import run_config
from tarflow.evaluation.sweep import candidate_score
from tarflow.evaluation.sweep.candidates import SweepRequest
from tarflow.evaluation.sweep.guidance import sweep_guidance
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.records import DamagedFileError, read_object

pytestmark = pytest.mark.usefixtures("fake_features")


@pytest.fixture
def run_dir(make_run):
    return make_run(steps=(20,), sampling={"batch_size": 64}, evaluation={"num_samples": 64})[0]


def request(run_dir, **changes):
    plain: dict[str, Any] = {"guidance": (0, 1, 2, 4), "denoise": (0.0, 1.0), "start": 8, "final": 64}
    return SweepRequest(run_dir, **(plain | changes))


@pytest.fixture(scope="module")
def swept_once(tmp_path_factory):
    """A folder for the run of `swept`, which is made once."""
    return tmp_path_factory.mktemp("swept") / "run"


@pytest.fixture
def swept(run_dir, swept_once):
    """A run with the sweep of `request`, and its record."""
    if swept_once.exists():
        shutil.rmtree(run_dir)
        shutil.copytree(swept_once, run_dir)
    else:
        sweep_guidance(request(run_dir), lambda _: None)
        shutil.copytree(run_dir, swept_once)
    (path,) = run_dir.glob("sweeps/*/sweep.json")
    return run_dir, read_object(path)


def test_the_better_half_goes_on_to_more_samples_and_the_best_is_chosen(run_dir):
    lines: list[str] = []
    record = sweep_guidance(request(run_dir), lines.append)
    assert [r["num_samples"] for r in record["rounds"]] == [8, 24, 64]
    assert [len(r["points"]) for r in record["rounds"]] == [8, 4, 2]
    for before, after in zip(record["rounds"], record["rounds"][1:]):
        key = lambda p: (p["guidance"], p["denoise"], p["attn_temp"])  # noqa: E731
        better = sorted(before["points"], key=lambda p: p["distance"])[: len(after["points"])]
        assert {key(p) for p in better} == {key(p) for p in after["points"]}
    best = min(record["rounds"][-1]["points"], key=lambda p: p["distance"])
    assert record["best"] == {k: best[k] for k in ("guidance", "denoise", "attn_temp")}
    folder = run_dir / "sweeps" / record["name"]
    assert read_object(folder / "sweep.json") == record
    assert "<svg" in (folder / "guidance.svg").read_text()
    assert sorted(p.name for p in (run_dir / "sweeps").iterdir()) == [record["name"]], "the chunks are cleared away"


def test_the_distance_of_the_last_round_is_that_of_an_evaluation(swept):
    run_dir, _ = swept
    record = sweep_guidance(request(run_dir, choose="best"), lambda _: None)
    (result,) = evaluate(run_dir, False, WorkerOptions(), lambda _: None).done
    assert result["fd_efficientnet_lite0"] == pytest.approx(record["distance"], rel=1e-5)
    assert result["distance_stderr"] == pytest.approx(record["distance_stderr"], rel=1e-5)
    assert result["settings"]["sampling"]["guidance"] == record["best"]["guidance"]


def test_the_choice_is_the_default_until_it_is_overridden_and_whoever_uses_it_says_so(run_dir, tmp_path, capsys):
    before = run_config(run_dir).sampling
    options = ["--guidance", "3,5", "--denoise", "0.25", "--start", "8", "--final", "16", "--threads", "1"]
    assert tarflow.cli.main(["sweep-guidance", str(run_dir), *options, "--no-default"]) == 0
    assert run_config(run_dir).sampling == before
    assert tarflow.cli.main(["sweep-guidance", str(run_dir), *options, "--choose", "best"]) == 0
    chosen = run_config(run_dir).sampling
    assert chosen.guidance in (3, 5)
    assert chosen.denoise == 0.25
    capsys.readouterr()
    assert tarflow.cli.main(["sample", str(run_dir), "--out", str(tmp_path / "out"), "--num", "2"]) == 0
    assert f"sampling with guidance={chosen.guidance}, denoise=0.25" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/settings.json").read_text())["sampling"]["guidance"] == chosen.guidance
    asked = ["sample", str(run_dir), "--out", str(tmp_path / "two"), "--num", "2", "--guidance", "0.5"]
    assert tarflow.cli.main(asked) == 0
    assert "sampling with denoise=0.25" in capsys.readouterr().out
    assert tarflow.cli.main(["evaluate", str(run_dir), "sampling.guidance=0.5"]) == 0
    assert "sampling with denoise=0.25, attn_temp=1.0: chosen by sweeps/images-000000000320-" in capsys.readouterr().out
    (run_dir / "sampling.json").write_text('{"sampling": {"guidence": 1}, "chosen_by": "me"}')
    with pytest.raises(
        DamagedFileError, match=r"'guidence' is not a setting .*remove it to go by the run's own settings"
    ):
        run_config(run_dir)


@pytest.mark.case("N11")
def test_within_the_noise_nothing_is_chosen_unless_asked(run_dir, capsys):
    """48 samples hardly tell guidance 1 from 1.01."""
    words = ["sweep-guidance", str(run_dir), "--guidance", "1,1.01", "--start", "8", "--final", "48", "--threads", "1"]
    assert tarflow.cli.main(words) == 0
    said = capsys.readouterr().out
    (path,) = (run_dir / "sweeps").glob("*/sweep.json")
    record = read_object(path)
    distance, error = record["distance"], record["distance_stderr"]
    assert record["chosen"] is None
    assert f"distance {distance:.2f} ± {error:.2f} with 48 samples" in said
    assert "not clear: guidance 1" in said
    assert "as good within the noise" in said
    assert "nothing is chosen, the run's default stays as it is (--choose best takes the best anyway)" in said
    assert not (run_dir / "sampling.json").exists()
    assert run_config(run_dir).sampling.guidance == 1.0
    assert tarflow.cli.main([*words, "--choose", "best"]) == 0, "with the samples that are there"
    assert run_config(run_dir).sampling.guidance == record["best"]["guidance"]
    assert read_object(path) == record


@pytest.mark.case("N11")
def test_standard_errors_stand_in_record_plot_and_report(swept):
    from tarflow.evaluation.report.build import write_report

    run_dir, record = swept
    points = [point for part in record["rounds"] for point in part["points"]]
    assert all(point["distance_stderr"] > 0 for point in points)
    plot = (run_dir / "sweeps" / record["name"] / "guidance.svg").read_text()
    assert plot.count("LineCollection") >= len(record["rounds"]), "error bars"
    text = write_report(run_dir).read_text()
    best = ", ".join(f"{key} {value:g}" for key, value in record["best"].items())
    assert f"best is {best}, at a distance of {record['distance']:.2f} ± {record['distance_stderr']:.2f}" in text


def test_forms_and_guided_blocks_are_axes_of_their_own(run_dir, tmp_path, capsys):
    """Without guidance they have no effect, and a block may be counted from either end: such settings are tried once."""
    words = ["sweep-guidance", str(run_dir), "--guidance", "0,2", "--denoise", "1", "--guidance-form", "linear,closed"]
    words += ["--guide-blocks=all,-1,1,0+1,1+0", "--start", "8", "--final", "16", "--threads", "1", "--choose", "best"]
    assert run_config(run_dir).model.num_blocks == 2
    assert tarflow.cli.main(words) == 0
    said = capsys.readouterr().out
    (path,) = (run_dir / "sweeps").glob("*/sweep.json")
    record = read_object(path)
    tried = [(p["guidance"], p["guidance_form"], tuple(p["guide_blocks"])) for p in record["rounds"][0]["points"]]
    assert sorted(tried) == [
        (0, "linear", ()), (2, "closed", ()), (2, "closed", (-1,)), (2, "linear", ()), (2, "linear", (-1,)),
    ]  # fmt: skip
    distances = [p["distance"] for p in record["rounds"][0]["points"]]
    assert len(set(distances)) == 5, "each draws other samples"
    plot = path.with_name("guidance.svg").read_text()
    for line in ("linear, blocks all", "linear, blocks -1", "closed, blocks all", "closed, blocks -1"):
        assert f">{line}<" in plot
    assert "attention temperature" not in plot, "what all lines have in common names none"
    best = record["best"]
    shown = f"guidance_form {best['guidance_form']}, guide_blocks {'-1' if best['guide_blocks'] else 'all'}; distance"
    assert shown in said
    chosen = run_config(run_dir).sampling
    assert (chosen.guidance_form, list(chosen.guide_blocks)) == (best["guidance_form"], best["guide_blocks"])
    assert tarflow.cli.main(["report", str(run_dir), "--out", str(tmp_path / "page.html")]) == 0
    assert shown.removesuffix("; distance") in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--guide-blocks=0,7", "--guide-blocks 7: the model has 2 blocks (0..1, or -1 for the last"),
        (
            "--guide-blocks=first",
            "--guide-blocks 'first' must be all or numbers of blocks joined by +, e.g. all,-1,0+1",
        ),
        ("--guidance-form=square", "--guidance-form 'square' must be among linear, closed"),
        ("--guidance=1,,2", "--guidance '1,,2' lacks a value before, between or after its commas"),
        ("--guidance-form=linear,", "--guidance-form 'linear,' lacks a value before, between or after its commas"),
        ("--denoise-steps=nan", "--denoise-steps nan must be a whole number"),
        ("--denoise-steps=2,inf", "--denoise-steps inf must be a whole number"),
        ("--denoise-steps=", "--denoise-steps '' lacks a value"),
    ],
)
@pytest.mark.case("S10")
def test_a_value_that_there_is_not_is_named(run_dir, capsys, option, said):
    assert tarflow.cli.main(["sweep-guidance", str(run_dir), option, "--start", "4", "--final", "8"]) == 2
    assert said in capsys.readouterr().err
    assert not (run_dir / "sweeps").exists()


@pytest.mark.case("N11")
def test_a_record_of_an_earlier_version_is_read(swept):
    run_dir, record = swept
    path = run_dir / "sweeps" / record["name"] / "sweep.json"
    old = {k: v for k, v in record.items() if k not in ("best", "unclear", "distance_stderr")}
    path.write_text(json.dumps(old | {"chosen": record["best"]}))
    lines: list[str] = []
    sweep_guidance(request(run_dir), lines.append)
    assert "not clear: this sweep was recorded without standard errors; remove its folder to do it again" in lines
    assert not (run_dir / "sampling.json").exists()
    sweep_guidance(request(run_dir, choose="best"), lines.append)
    assert run_config(run_dir).sampling.guidance == record["best"]["guidance"]


@pytest.mark.case("V06")
def test_damaged_parts_of_a_sweep_are_computed_again_and_said(run_dir):
    def stop(line):
        if " samples, guidance" in line:  # the first setting has its distance
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        sweep_guidance(request(run_dir), stop)
    (figures,) = (run_dir / "sweeps").rglob("distance-*.json")
    chunk = sorted(figures.parent.glob("samples-*"))[0]
    for path in (figures, chunk):
        os.truncate(path, path.stat().st_size // 2)
    lines: list[str] = []
    sweep_guidance(request(run_dir), lines.append)
    assert [line for line in lines if "damaged" in line] == [
        f"{path} is damaged and computed again" for path in (figures, chunk)
    ]


def work(run_dir):
    torch.set_num_threads(1)
    sweep_guidance(request(run_dir), lambda _: None)
    os._exit(0)


def test_two_processes_share_a_sweep_and_agree_with_one(swept, tmp_path):
    run_dir, _ = swept
    alone = tmp_path / "alone"
    shutil.copytree(run_dir, alone)
    shutil.rmtree(run_dir / "sweeps")
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(run_dir,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    ours, theirs = ((r / "sweeps").glob("images-*/sweep.json") for r in (run_dir, alone))
    assert next(ours).read_bytes() == next(theirs).read_bytes()


def test_a_killed_sweep_goes_on_with_what_is_missing(run_dir, monkeypatch):
    drawn: list[Any] = []
    draw = candidate_score.draw_chunk

    def dying(part, sampler, features, indices, *rest):
        if len(drawn) == 5:
            raise SystemExit(137)
        drawn.append((sampler.sampling, indices.start))
        draw(part, sampler, features, indices, *rest)

    monkeypatch.setattr(candidate_score, "draw_chunk", dying)
    with pytest.raises(SystemExit):
        sweep_guidance(request(run_dir), lambda _: None)
    first, drawn[:] = set(drawn), [None] * 6  # never dies again
    sweep_guidance(request(run_dir), lambda _: None)
    again = [item for item in drawn if item]
    assert len(first) == 5
    assert not first & set(again)
    assert len(again) == len(set(again)), "a round goes on from the samples of the one before"


@pytest.mark.case("S10")
def test_settings_that_mean_nothing_are_refused_or_said(make_run):
    plain, _ = make_run(steps=(20,), model={"num_classes": 0}, sampling={"guidance": 0})
    lines: list[str] = []
    record = sweep_guidance(
        SweepRequest(plain, guidance=(0, 1), attn_temp=(1.0, 0.5), denoise=(1.0,), start=4, final=8), lines.append
    )
    assert "skipped: guidance 1 with attention temperature 1 has no effect without labels" in lines
    assert len(record["rounds"][0]["points"]) == 2
    untrained, _ = make_run(steps=(20,), name="untrained", train={"label_dropout": 0}, sampling={"guidance": 0})
    with pytest.raises(EvaluationError, match=r"train\.label_dropout=0"):
        sweep_guidance(request(untrained))
    with pytest.raises(EvaluationError, match="--start 100 must lie between 2 and the final number of samples, 64"):
        sweep_guidance(request(untrained, start=100))
    with pytest.raises(EvaluationError, match="--guidance -1 must be"):
        sweep_guidance(request(untrained, guidance=(-1,)))


@pytest.mark.case("S03")
def test_the_first_round_fits_the_last_where_nobody_says_how_many(run_dir):
    """The demo's runs score 300 samples, fewer than a first round of larger ones."""
    record = sweep_guidance(request(run_dir, guidance=(0, 1), start=0, final=16), lambda _: None)
    assert [part["num_samples"] for part in record["rounds"]] == [8, 16]


def test_a_setting_that_loses_samples_is_never_chosen(run_dir, monkeypatch):
    from tarflow.evaluation.samples.draw import Sampler

    honest = Sampler.noise

    def noise(self, indices):
        rows = honest(self, indices)
        return rows * torch.nan if self.sampling.settings.guidance > 0 else rows

    monkeypatch.setattr(Sampler, "noise", noise)
    record = sweep_guidance(request(run_dir), lambda _: None)
    assert record["best"]["guidance"] == 0
    assert {p["lost"] for p in record["rounds"][0]["points"] if p["guidance"]} == {8}
    with pytest.raises(EvaluationError, match="every setting of the sweep lost more than 5%"):
        sweep_guidance(request(run_dir, guidance=(1, 2)), lambda _: None)
