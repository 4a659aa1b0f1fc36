"""Several runs on one page: what differs between them stands beside each other, and nothing is fetched."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

import tarflow.cli
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.report.compare import MOST, write_comparison
from tarflow.records import append_record_line
from tarflow.trainer.errors import TrainerError
from tests.helpers.results import write_result

HOSTILE = "<img src=x onerror=console.error(1)>&'$x$"


def log_rows(run_dir, slope, rate=800.0):
    append_record_line(run_dir / "metrics.jsonl", {"event": "start", "images_seen": 0, "step": 0})
    for step in range(1, 21):
        append_record_line(run_dir / "metrics.jsonl", {
            "step": step, "images_seen": 16 * step, "train/loss": 3 - slope * step, "train/bits_per_dim": 8 - slope * step,
            "optim/lr": 1e-3, "optim/grad_norm": 2.0, "throughput/images_per_sec": rate, "goodput/share": 0.9,
        })  # fmt: skip


def add_result(run_dir, config, distance, colour, **more):
    path = write_result(
        run_dir, config, "images-000000000320", fd_efficientnet_lite0=distance, distance_stderr=0.5, bits_per_dim=4.25, **more
    )  # fmt: skip
    Image.new("RGB", (120, 90), colour).save(path.parent / "grid.png")


@pytest.fixture
def three(make_run):
    """Three runs, of which the second was not evaluated and the third has a hostile name and other settings."""
    first, config = make_run(steps=(), name="base")
    log_rows(first, 0.05)
    add_result(first, config, 31.5, "red")
    second, _ = make_run(steps=(), name="fast", optim={"lr": 0.002})
    log_rows(second, 0.07)
    third, config = make_run(steps=(), name=HOSTILE, optim={"lr": 0.004}, evaluation={"num_samples": 48})
    log_rows(third, 0.06)
    add_result(third, config, 12.25, "blue", num_samples=48, samples={"asked": 48, "used": 48, "nonfinite": 0})
    return [first, second, third]


class Cells(HTMLParser):
    """The rows of all tables as lists of text."""

    def __init__(self, text):
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data

    def row(self, first):
        (found,) = (row for row in self.rows if row[0] == first)
        return found[1:]


def test_results_and_settings_that_differ_stand_side_by_side(three, tmp_path):
    text = write_comparison(three, tmp_path / "page.html").read_text()
    cells = Cells(text)
    assert cells.row("setting") == ["base", "fast", HOSTILE]
    assert cells.row("fd_efficientnet_lite0") == ["31.50 ± 0.50", "–", "12.25 ± 0.50"]
    assert cells.row("bits per dimension") == ["4.2500", "–", "4.2500"]
    assert cells.row("images seen") == ["320"] * 3
    assert cells.row("optim.lr") == ["0.0001", "0.002", "0.004"]
    assert cells.row("evaluation.num_samples") == ["24", "24", "48"]
    assert cells.row("evaluated with num_samples") == ["24", "–", "48"]
    assert "were not computed under the same settings" in text
    settings = {row[0] for row in cells.rows if row and re.fullmatch(r"[a-z_]+\.[a-z_]+", row[0])}
    assert settings == {"optim.lr", "evaluation.num_samples"}, "what is equal has no row"


def test_curves_lie_over_each_other_and_a_run_keeps_its_colour(three, tmp_path):
    text = write_comparison(three, tmp_path / "page.html").read_text()
    pictures = dict(re.findall(r'<svg role="img" aria-label="([^"]*)"(.*?)</svg>', text, re.DOTALL))
    assert list(pictures) == [
        "Loss", "Bits per dimension, training", "Bits per dimension, held-out images", "Learning rate", "Gradient norm",
        "Throughput", "Goodput", "Fréchet distance (fd_efficientnet_lite0)",
    ]  # fmt: skip
    for name in ("base<", "fast<", "onerror=console.error(1)&gt;&amp;'$x$<"):
        assert name in pictures["Loss"], name
    distance = pictures["Fréchet distance (fd_efficientnet_lite0)"]
    assert "fast<" not in distance, "it was not evaluated"
    for colour in ("#3b82f6", "#10b981"):  # of the first and the third run
        assert colour in distance
        assert colour in pictures["Loss"]
    assert "#f59e0b" not in distance
    assert text.count("data:image/png") == 2
    assert re.findall(r"<(?:script|link|iframe|object|form)\b", text) == []
    assert re.findall(r"""(?:src|href)=["'](?!data:image/png;base64,|#)""", text) == []
    assert "<img src=x" not in text


def test_a_damaged_run_costs_its_own_part_alone(three, tmp_path):
    (three[0] / "config.yaml").write_text("train: [")
    (three[1] / "metrics.jsonl").write_bytes(b"\0" * 100)
    said: list[str] = []
    text = write_comparison(three, tmp_path / "page.html", said.append).read_text()
    assert "Damaged files, not shown" in text
    assert any("config.yaml" in line for line in said)
    assert any("metrics.jsonl" in line for line in said)
    assert Cells(text).row("evaluation.num_samples") == ["–", "24", "48"]
    assert Cells(text).row("images seen") == ["320", "0", "320"]


def test_what_is_not_a_run_is_refused_before_anything_is_written(three, tmp_path, capsys):
    out = tmp_path / "page.html"
    with pytest.raises(TrainerError, match="no run directory at"):
        write_comparison([*three, tmp_path / "none"], out)
    with pytest.raises(EvaluationError, match="is given twice"):
        write_comparison([three[0], three[1], three[0]], out)
    with pytest.raises(EvaluationError, match=f"{MOST + 1} runs are too many for one page: give at most {MOST}"):
        write_comparison([three[0]] * (MOST + 1), out)
    assert not out.exists()
    assert tarflow.cli.main(["report", *map(str, three[:2]), "--out", str(out)]) == 0
    assert f"report: {out}" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_it_at_any_width_and_asks_for_nothing(three, tmp_path, width):
    page = write_comparison(three, tmp_path / "page.html")
    netlog, shot = tmp_path / "net.json", tmp_path / "shot.png"
    # A page that is wider than its window would be scrolled sideways. Measured from outside, in a frame: no window of the
    # browser's is as narrow as a phone.
    (tmp_path / "measured.html").write_text(
        f'<iframe style="width: {width}px; height: 2400px; border: 0" srcdoc="{html.escape(page.read_text())}"></iframe>'
        "<script>onload = () => { const inside = document.querySelector('iframe').contentDocument.documentElement;"
        " document.title = `wide ${inside.scrollWidth} of ${inside.clientWidth}` }</script>"
    )
    browser = [
        "chromium", "--no-sandbox", "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
        "--v=0", "--disable-background-networking", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},2400",
    ]  # fmt: skip
    shown = subprocess.run(
        [*browser, f"--log-net-log={netlog}", f"--screenshot={shot}", page.as_uri()],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "CONSOLE" not in shown.stderr
    assert Image.open(shot).width == width
    asked = set(re.findall(r'"url":"([^"]*)"', netlog.read_text()))
    assert not [url for url in asked if "127.0.0.1" in url], asked
    dom = subprocess.run(
        [*browser, "--dump-dom", (tmp_path / "measured.html").as_uri()], capture_output=True, text=True, timeout=90
    )  # fmt: skip
    wide = re.search(r"<title>wide (\d+) of (\d+)</title>", dom.stdout)
    assert wide is not None
    assert int(wide[1]) <= int(wide[2]) <= width
