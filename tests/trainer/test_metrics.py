"""What a training shows while it runs: what matters fits a narrow terminal, the rest stands in log.txt."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from tarflow.evaluation.report.logged import read_metrics
from tarflow.trainer.tracking.logger import MetricLogger

ROW = {
    "train/loss": -0.1234, "train/bits_per_dim": 4.123, "optim/grad_norm": 12.34, "optim/lr": 1e-4,
    "throughput/images_per_sec": 1234.4,
}  # fmt: skip
TOTAL = 1_281_167_000


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`terminal(80)`: the log of a run on a terminal of 80 columns."""
    made: list[MetricLogger] = []

    def make(width: int | None) -> MetricLogger:
        monkeypatch.setenv("TERM", "xterm")  # a dumb terminal is taken to have 80 columns
        console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
        made.append(MetricLogger(tmp_path, (), TOTAL, console=console))
        return made[0]

    yield make
    for log in made:
        log.close()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.case("N13")
def test_a_progress_bar_of_any_width_has_its_bar_and_its_figures(terminal, width: int) -> None:
    log = terminal(width)
    log.metrics(123456, TOTAL // 2, TOTAL, ROW)
    shown = io.StringIO()
    Console(width=width, color_system=None, file=shown).print(log._progress.get_renderable())
    (line,) = shown.getvalue().splitlines()
    assert len(line) <= width
    assert line.startswith(" 50.0% ━━━━━"), "a bar that can be seen"
    assert "4.123 bits/dim | 1234 img/s" in line
    assert "ETA" in line
    assert ("loss -0.1234 | grad 12.34 | lr 1.00e-04" in line) == (width == 200)


@pytest.mark.parametrize(("columns", "shown"), [("80", True), ("60", True), ("40", False)])
def test_the_bar_takes_one_line_of_the_columns_that_it_is_told(
    terminal, monkeypatch, columns: str, shown: bool
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    log = terminal(None)
    log.metrics(123456, TOTAL // 2, TOTAL, ROW | {"throughput/images_per_sec": 123456.0})
    written = io.StringIO()
    Console(color_system=None, file=written).print(log._progress.get_renderable())
    (line,) = written.getvalue().splitlines()
    assert len(line) <= int(columns)
    assert line.startswith(" 50.0% ━━━")
    assert "4.123 bits/dim" in line
    assert ("| 123456 img/s" in line) == shown


@pytest.mark.case("N13")
def test_a_line_begins_with_what_one_looks_for_first(tmp_path: Path, capsys) -> None:
    log = MetricLogger(tmp_path, (), TOTAL)
    log.metrics(123456, TOTAL // 2, TOTAL, ROW)
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line[:80].startswith("step 123456 | 50.0% | ETA 144:09:03 | 4.123 bits/dim | 1234 img/s |")
    assert line.endswith("| 640,583,500/1,281,167,000 images | loss -0.1234 | grad 12.34 | lr 1.00e-04")
    assert (tmp_path / "log.txt").read_text().rstrip().endswith(line)


@pytest.mark.case("N13")
def test_what_is_only_recorded_is_not_on_the_screen(tmp_path: Path, capsys) -> None:
    log = MetricLogger(tmp_path, (), TOTAL)
    log.record("the configuration of this start:\ndata:\n  train: x")
    log.info("model: small")
    log.close()
    assert capsys.readouterr().out == "model: small\n"
    assert "the configuration of this start:\ndata:\n  train: x\n" in (tmp_path / "log.txt").read_text()


@pytest.mark.case("H06")
def test_lines_of_figures_are_sealed_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = MetricLogger(tmp_path, (), TOTAL)
    log.event("start", images_seen=0, step=0)
    for step in (5, 10, 15):
        log.metrics(step, 16 * step, TOTAL, {**ROW, "train/loss": 0.25 * step})
    log.metrics(20, 320, TOTAL, {**ROW, "train/loss": math.nan, "train/bits_per_dim": math.inf})
    log.close()
    path = tmp_path / "metrics.jsonl"
    found = read_metrics(tmp_path)
    assert [row.get("train/loss") for row in found.rows] == [None, 1.25, 2.5, 3.75, None]
    assert found.flaws == []
    path.write_text(path.read_text().replace('"train/loss": 2.5', '"train/loss": 2.4'))
    found = read_metrics(tmp_path)
    assert [row["step"] for row in found.rows] == [0, 5, 15, 20]
    assert found.flaws == [f"{path}: 1 damaged line left out (3)"]
    with open(path, "a") as file:
        file.write('{"step": 25, "images_seen": 400, "train/loss": 9.0}\n')  # of a hand that forgot the checksum
    assert len(read_metrics(tmp_path).rows) == 4
