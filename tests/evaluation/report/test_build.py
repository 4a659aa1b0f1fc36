"""The report: one page that needs nothing else, says what it must, and escapes what comes from a run."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import tarflow.cli
from tarflow.evaluation.report.build import write_report
from tarflow.evaluation.report.curves import by_settings
from tarflow.evaluation.report.headline import alike, find_headline
from tarflow.evaluation.report.history import read_history, thin
from tarflow.evaluation.report.plots import Curve, Plot, svg
from tarflow.evaluation.run_config import choose
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.records import read_object, write_object
from tarflow.trainer.errors import TrainerError

pytestmark = pytest.mark.usefixtures("fake_features")


def log_rows(run_dir, rows):
    with open(run_dir / "metrics.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def row(images, loss=1.0):
    return {
        "step": images // 16, "images_seen": images, "train/loss": loss, "train/bits_per_dim": loss / 0.693 + 8.3,
        "optim/lr": 1e-3, "optim/grad_norm": 2.0, "throughput/images_per_sec": 800.0, "train/mse_z": 1.0,
    }  # fmt: skip


START = {"event": "start", "images_seen": 0, "step": 0}


class Page(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


@pytest.fixture(scope="module")
def evaluated_once(tmp_path_factory):
    """A folder for the run of `finished`, which is made once."""
    return tmp_path_factory.mktemp("evaluated") / "run"


@pytest.fixture
def finished(make_run, evaluated_once):
    if evaluated_once.exists():
        run_dir, config = make_run(steps=())
        shutil.rmtree(run_dir)
    else:
        run_dir, config = make_run()
        log_rows(run_dir, [START, *[row(16 * s, 3 - s / 20) for s in range(1, 21)]])
        evaluate(run_dir, False, WorkerOptions(), lambda _: None)
        run_dir.rename(evaluated_once)
    shutil.copytree(evaluated_once, run_dir)
    return run_dir, config


def test_the_page_needs_nothing_but_itself(finished):
    run_dir, _ = finished
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value is not None
            assert value.startswith(("data:image/png;base64,", "#")), value
        assert not name.startswith("on")
    assert "http://" not in text.replace("http-equiv", "")
    assert "https://" not in text
    assert "@import" not in text
    assert re.findall(r"url\(([^)]*)\)", text) == re.findall(r"url\((#plot\d+-[^)]*)\)", text)
    assert "default-src 'none'" in text


def test_the_highest_peak_of_memory_is_on_the_page(finished):
    run_dir, _ = finished
    assert "peak GPU memory" not in write_report(run_dir).read_text()
    log_rows(run_dir, [row(16 * s) | {"memory/peak_allocated_gb": peak} for s, peak in ((21, 31.26), (22, 30.0))])
    text = write_report(run_dir).read_text()
    assert "peak GPU memory" in text
    assert "31.3 GB" in text


def test_the_page_says_what_it_must(finished):
    run_dir, config = finished
    text = write_report(run_dir).read_text()
    result = json.loads((run_dir / "evals/images-000000000320/result.json").read_text())
    for wanted in (
        f"{result['fd_efficientnet_lite0']:.2f}", f"{result['bits_per_dim']:.4f}", f"{result['label_agreement']:.1%}",
        "Bits per dimension", "Fréchet distance (fd_efficientnet_lite0)", "Learning rate", "Throughput", "Loss",
        "Samples over training", "Before and after denoising", "Without and with guidance", "Nearest training images",
        "From noise to image", "160 images seen", "320 images seen", "Rows from top to bottom: 0, 1, 2",
    ):  # fmt: skip
        assert wanted in text, wanted
    for section, values in config.model_dump(mode="json").items():
        for key in values:
            assert f"{section}.{key}<" in text
    assert text.count("<svg") == 8
    # both grids over training, three classes, two pairs, neighbours, trajectory
    assert text.count("data:image/png") == 11
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_names_from_a_run_are_escaped(make_run):
    hostile = "<script>alert(1)<&script>'\" onload=x"
    run_dir, _ = make_run(steps=(20,), name=hostile)
    log_rows(run_dir, [START, row(320)])
    evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    path = run_dir / "evals/images-000000000320/result.json"
    changes = {"grid_rows": ["<b>zero</b>", "one"], "weights": "<i>raw</i>", "warnings": ["<u>odd</u>"]}
    write_object(path, read_object(path) | changes)
    text = write_report(run_dir).read_text()
    for tag in ("<script", "<b>", "<i>", "<u>"):
        assert tag not in text
    assert "&lt;b&gt;zero&lt;/b&gt;" in text
    assert "&lt;script&gt;alert(1)" in text
    assert not any(name.startswith("on") for name, _ in Page(text).attributes)


def test_a_run_that_has_only_begun_has_a_report_too(make_run):
    run_dir, _ = make_run(steps=())
    text = write_report(run_dir).read_text()
    assert "No evaluation yet" in text
    assert "train.max_images" in text
    assert "<svg" not in text
    Page(text)
    log_rows(run_dir, [START, row(16, float("nan")), row(32)])
    Page(write_report(run_dir, run_dir / "other.html").read_text())
    assert (run_dir / "other.html").is_file()


def test_no_run_no_report(tmp_path):
    with pytest.raises(TrainerError, match="no run directory"):
        write_report(tmp_path / "nothing")


def test_a_failed_result_is_shown_as_such(make_run, save_checkpoint):
    run_dir, config = make_run(steps=())
    save_checkpoint(run_dir, config, 20, 320, scale=float("inf"))
    evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    assert "24 of 24 samples are not finite" in write_report(run_dir).read_text()


def test_steps_done_again_after_a_restart_count_once(make_run):
    run_dir, _ = make_run(steps=())
    log_rows(run_dir, [START, row(16, 5.0), row(32, 4.0), row(48, 3.0), {"event": "save", "images_seen": 32}])
    log_rows(run_dir, [{"event": "resume", "images_seen": 32, "step": 2}, row(48, 2.5), row(64, 2.0)])
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"images_seen": 80, "train/lo')  # killed while writing
    history = read_history(run_dir)
    assert history.series("train/loss") == [(16, 5.0), (32, 4.0), (48, 2.5), (64, 2.0)]
    assert history.restarts == [32]
    assert history.training_seconds == pytest.approx(64 / 800)
    assert "1 restart<" in write_report(run_dir).read_text()


def test_results_of_other_settings_are_listed_but_not_on_the_curves(finished):
    run_dir, config = finished
    evaluate(run_dir, False, WorkerOptions(newest_only=True, overrides=["sampling.guidance=3"]), lambda _: None)
    history = read_history(run_dir)
    assert len(history.results) == 3
    headline = find_headline(history.results, config)
    assert headline is not None
    assert [(r.images_seen, r.values["settings"]["sampling"]["guidance"]) for r in alike(history.results, headline.result)] == [
        (160, 1.0), (320, 1.0),
    ]  # fmt: skip
    assert list(by_settings(history, headline)) == ["ema-0.100"]
    assert "w=3 on ab" in write_report(run_dir).read_text()


def test_every_width_of_average_has_its_curve_and_its_error_bar(finished):
    run_dir, config = finished
    for weights in ("raw", "ema-0.050"):
        evaluate(run_dir, False, WorkerOptions(overrides=[f"evaluation.weights={weights}"]), lambda _: None)
    evaluate(run_dir, False, WorkerOptions(overrides=["evaluation.weights=raw", "sampling.seed=7"]), lambda _: None)
    history = read_history(run_dir)
    headline = find_headline(history.results, config)
    assert headline is not None
    groups = by_settings(history, headline)
    assert {name: [r.images_seen for r in results] for name, results in groups.items()} == {
        "ema-0.100": [160, 320], "raw": [160, 320], "ema-0.050": [160, 320],
    }  # fmt: skip
    assert all(r.values["distance_stderr"] > 0 for results in groups.values() for r in results)
    text = write_report(run_dir).read_text()
    for title in ("Fréchet distance (fd_efficientnet_lite0)", ">Bits per dimension<"):
        picture = next(part for part in text.split("<svg")[1:] if title in part)
        for name in groups:
            assert f"{name}<" in picture


def sweep_record(name, distances):
    """A sweep of one round; `distances`: (guidance, distance), the best of which is that of guidance 1."""
    points = [{"guidance": g, "denoise": 1.0, "attn_temp": 1.0, "distance": d} for g, d in distances]
    chosen = {"guidance": 1, "denoise": 1.0, "attn_temp": 1.0}
    return {
        "name": name, "weights": "raw", "weights_sha256": "0" * 64, "step": 20, "images_seen": 320, "metric": "fd_x",
        "rounds": [{"num_samples": 500, "points": points}], "chosen": chosen, "distance": dict(distances)[1],
        "features": {}, "reference": {}, "settings": {},
    }  # fmt: skip


def test_guidance_curves_come_from_results_and_from_sweeps(finished):
    run_dir, _ = finished
    for guidance in (0, 3):
        evaluate(
            run_dir, False, WorkerOptions(newest_only=True, overrides=[f"sampling.guidance={guidance}"]), lambda _: None
        )
    (curve,) = read_history(run_dir).over("guidance").values()
    assert [value for value, _ in curve] == [0, 1, 3]
    record = sweep_record("images-000000000320-abc", ((0, 9.0), (1, 5.0), (2, None)))
    write_object(run_dir / "sweeps/images-000000000320-abc/sweep.json", record)
    (run_dir / "sweeps/images-000000000320-torn").mkdir()
    (run_dir / "sweeps/images-000000000320-torn/sweep.json").write_text("{")
    said: list[str] = []
    text = write_report(run_dir, log=said.append).read_text()
    assert any("images-000000000320-torn/sweep.json (the record of a sweep) is damaged" in line for line in said)
    Page(text)
    assert "Distance over guidance weight" in text
    assert "images-000000000320: 500 samples" in text
    assert "denoise 1, attention temperature 1" not in text  # a single curve needs no legend
    assert "Distance over denoising multiplier" not in text


def test_the_scores_of_a_result_are_on_the_page(finished):
    run_dir, _ = finished
    text = write_report(run_dir).read_text()
    result = json.loads((run_dir / "evals/images-000000000320/result.json").read_text())
    for key in ("precision", "recall", "density", "coverage"):
        assert f">{key}</div><div class='value'>{result[key]:.3f}<" in text
    assert f"{result['kd_efficientnet_lite0']:.4f}" in text


@pytest.mark.case("S06", "S11")
def test_the_page_identifies_network_weights_noise_and_every_sampling_setting(finished):
    run_dir, _ = finished
    text = write_report(run_dir).read_text()
    result = json.loads((run_dir / "evals/images-000000000320/result.json").read_text())
    assert result["weights_sha256"] in text
    for key, value in (
        ("features.sha256", "f00d"), ("reference.fingerprint", result["reference"]["fingerprint"]),
        ("settings.sampling.noise_std", "0.1"), ("settings.sampling.denoise", "1.0"), ("settings.num_samples", "24"),
        ("settings.sampling.guidance", "1.0"),
    ):  # fmt: skip
        assert f"<td>{key}</td><td>{value}</td>" in text


def test_without_kept_features_the_error_bar_comes_from_the_chunks(make_run):
    run_dir, _ = make_run(steps=(20,), evaluation={"chunk_samples": 6, "keep_features": 0, "num_samples": 150})
    evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    plain = json.loads((run_dir / "evals/images-000000000320/result.json").read_text())
    evaluate(run_dir, False, WorkerOptions(overrides=["evaluation.keep_features=150"]), lambda _: None)
    (other,) = (r.values for r in read_history(run_dir).results if not r.plain)
    assert "kd_efficientnet_lite0" not in plain
    assert plain["fd_efficientnet_lite0"] == other["fd_efficientnet_lite0"]
    assert plain["distance_stderr"] == pytest.approx(other["distance_stderr"], rel=0.4)


def test_restarts_are_named(finished):
    run_dir, _ = finished
    log_rows(run_dir, [{"event": "resume", "images_seen": 160, "step": 10}, row(176)])
    assert "Restarted at 160 images seen." in write_report(run_dir).read_text()


def evaluated(run_dir, *overrides, newest=True):
    return evaluate(run_dir, False, WorkerOptions(newest_only=newest, overrides=list(overrides)), lambda _: None).done


def card(text, label):
    """The value on a card."""
    found = re.search(f"<div class='label'>{label}</div><div class='value'>([^<]*)<", text)
    assert found is not None, label
    return found[1]


@pytest.mark.case("N12")
def test_a_result_of_other_settings_alone_is_shown_with_what_differs(make_run):
    run_dir, _ = make_run()
    (result,) = evaluated(run_dir, "sampling.guidance=3", "evaluation.num_samples=30")
    text = write_report(run_dir).read_text()
    Page(text)
    assert "No evaluation yet" not in text
    assert card(text, "fd_efficientnet_lite0") == f"{result['fd_efficientnet_lite0']:.2f}"
    assert "no result under the run&#x27;s own settings yet" in text
    assert "guidance 3 instead of 1" in text
    assert "num_samples 30 instead of 24" in text
    assert "Fréchet distance (fd_efficientnet_lite0)" in text, "the curve goes with the headline"
    assert text.count("(headline)") == 1


@pytest.mark.case("N12")
def test_the_headline_is_the_newest_result_under_the_runs_own_settings(finished):
    run_dir, config = finished
    evaluated(run_dir, "sampling.guidance=3")
    newest = read_history(run_dir).results
    headline = find_headline(newest, config)
    assert headline is not None
    assert (headline.result.folder.name, headline.differs) == ("images-000000000320", {})
    assert "images-000000000320 (headline)</td>" in write_report(run_dir).read_text()


@pytest.mark.case("N12", "N11")
def test_a_sweeps_choice_moves_headline_curves_and_pictures_to_it(finished, capsys):
    """The results from before stay on the curves, as a line of their own that names its setting."""
    run_dir, _ = finished
    choose(run_dir, {"guidance": 2.0}, "sweeps/step-00000020-abc")
    text = write_report(run_dir).read_text()
    assert "no result under the run&#x27;s own settings yet; this one has guidance 1 instead of 2" in text
    (result,) = evaluated(run_dir)
    text = write_report(run_dir).read_text()
    assert card(text, "fd_efficientnet_lite0") == f"{result['fd_efficientnet_lite0']:.2f}"
    assert "guidance=2.0: chosen by sweeps/step-00000020-abc" in text
    picture = next(part for part in text.split("<svg")[1:] if "Fréchet distance (fd_efficientnet_lite0)" in part)
    assert "ema-0.100<" in picture
    assert "ema-0.100, guidance 1.0<" in picture
    assert text.count("<figcaption>320 images seen, fd_efficientnet_lite0") == 1, (
        "one grid: of the only result with these settings"
    )
    assert tarflow.cli.main(["report", str(run_dir)]) == 0
    assert f"samples: {run_dir}/evals/{result_folder(run_dir, result)}/grid.png" in capsys.readouterr().out


def result_folder(run_dir, result):
    return next(
        r.folder.name for r in read_history(run_dir).results if r.values["settings_hash"] == result["settings_hash"]
    )


@pytest.mark.case("N12")
def test_images_seen_is_the_newest_that_is_known(make_run):
    """A save after the last line of figures; a resume that goes back."""
    run_dir, _ = make_run(steps=())
    log_rows(run_dir, [START, row(160), {"event": "save", "images_seen": 176, "step": 11}])
    assert card(write_report(run_dir).read_text(), "images seen") == "176"
    log_rows(run_dir, [{"event": "resume", "images_seen": 160, "step": 10}])
    assert card(write_report(run_dir).read_text(), "images seen") == "160"


def test_rows_of_a_grid_carry_the_names_that_training_noted(finished):
    run_dir, _ = finished
    (run_dir / "data.json").write_text(json.dumps({"classes": ["smiley <3", "food"]}))
    assert "Rows from top to bottom: smiley &lt;3, food, 2." in write_report(run_dir).read_text()


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
def test_a_browser_finds_nothing_wrong_and_asks_for_nothing(make_run, tmp_path):
    """Headless Chromium logs the page's console and every connection that it opens."""
    run_dir, _ = make_run(steps=(20,), name="<img src=x onerror=console.error(1)>&'$x$")
    log_rows(run_dir, [START, *[row(16 * s, 3 - s / 20) for s in range(1, 21)]])
    evaluate(run_dir, False, WorkerOptions(), lambda _: None)
    path = run_dir / "evals/images-000000000320/result.json"
    rows = ["<script>console.error('class')</script>", "<img src='http://127.0.0.1:9/y'>", "$x$"]
    write_object(path, read_object(path) | {"grid_rows": rows})
    shutil.copy(write_report(run_dir), tmp_path / "page.html")
    netlog, shot = tmp_path / "net.json", tmp_path / "shot.png"
    done = subprocess.run(
        ["chromium", "--no-sandbox", "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
         "--v=0", "--disable-background-networking", "--disable-component-update", "--no-first-run",
         f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={netlog}", "--window-size=1200,1600",
         f"--screenshot={shot}", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert shot.stat().st_size > 20_000
    assert "CONSOLE" not in done.stderr
    # Whatever the browser fetches for itself, no request comes from the page.
    asked = set(re.findall(r'"url":"([^"]*)"', netlog.read_text()))
    assert not [url for url in asked if "127.0.0.1" in url], asked


def test_the_watch_on_the_browser_would_see_a_request_and_a_message(tmp_path):
    """The page forbids both by its policy; without the policy they would happen."""
    text = "<img src='http://127.0.0.1:9/x'><script>console.error('heard')</script>"
    (tmp_path / "bad.html").write_text(text)
    if not shutil.which("chromium"):
        pytest.skip("no chromium on this machine")
    netlog = tmp_path / "net.json"
    done = subprocess.run(
        ["chromium", "--no-sandbox", "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={netlog}", f"--screenshot={tmp_path / 's.png'}",
         (tmp_path / "bad.html").as_uri()],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert "heard" in done.stderr
    assert "127.0.0.1:9/x" in netlog.read_text()


def test_long_curves_are_thinned():
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    thinned = thin(points, 1000)
    assert len(thinned) <= 1000
    assert thinned[-1][0] == 10_000
    assert all(0.3 < y < 0.7 for _, y in thinned[:-1])
    assert thin(points[:10], 1000) == points[:10]


def test_a_plot_takes_the_colours_of_the_page_and_keeps_its_style_to_itself():
    picture = svg(Plot("A & B", [Curve("x", [(0, 1), (1, 2)])], restarts=[1]), "k")
    assert picture.startswith('<svg role="img" aria-label="A &amp; B"')
    assert "currentColor" in picture
    assert "#010203" not in picture
    assert "<style" not in picture
    assert all(name.startswith("k-") for name in re.findall(r'\bid="([^"]*)"', picture))


def test_what_is_counted_has_no_ticks_between_whole_numbers():
    points = [(0, -0.62), (1, -0.56), (2, -0.69), (3, -0.65)]
    blocks = svg(Plot("By block", [Curve("block", points, marked=True)], x_label="block"), "k")
    numbers = set(re.findall(r">([0-9.]+)</text>", blocks))
    assert {"0", "1", "2", "3"} <= numbers
    assert "0.5" not in numbers
    widths = svg(Plot("By guidance", [Curve("w", [(0, 1), (0.5, 2), (1, 1.5)])], x_label="w"), "k")
    assert "0.2" in set(re.findall(r">([0-9.]+)</text>", widths))
