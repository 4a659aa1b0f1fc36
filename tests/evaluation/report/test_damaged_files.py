"""What only shows survives any one bad file of a run: its row, page or line says what is damaged, all else stands."""

import html
import json
import os
import random
import re
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tarflow.cli
from tarflow.cluster.job.chain import Chain
from tarflow.cluster.status import rows
from tarflow.evaluation.report import curves
from tarflow.evaluation.report.build import write_report
from tarflow.evaluation.report.history import read_history
from tarflow.evaluation.results import read_result, scan
from tarflow.evaluation.run_config import run_config
from tarflow.records import DamagedFileError, append_record_line, read_lines, read_object, sealed, write_object
from tarflow.trainer.config.chosen_sampling import save_choice
from tarflow.trainer.config.files import parse_config
from tarflow.trainer.run_dir import create_run, save_config, write_identity
from tests.helpers.checkpoints import by_step
from tests.helpers.results import write_result

CONFIG = {
    "data": {"train": "nowhere"}, "train": {"global_batch_size": 16, "max_images": 3200, "noise_std": 0.1},
    "model": {"image_size": 8, "patch_size": 4, "in_channels": 1, "channels": 16, "num_blocks": 2, "layers_per_block": 1,
              "head_channels": 8, "num_classes": 0},
    "evaluation": {"num_samples": 16},
}  # fmt: skip
NAME = "step-00000010"
SWEEP = f"{NAME}-0123456789ab"


def sweep_record(name: str) -> dict[str, object]:
    best = {"guidance": 0.5, "denoise": 1.0, "attn_temp": 1.0}
    points = [best | {"distance": 9.5}, best | {"guidance": 1.0, "distance": 11.0}]
    return {
        "name": name, "weights": "raw", "weights_sha256": "0" * 64, "step": 10, "images_seen": 160, "metric": "fd_x",
        "rounds": [{"num_samples": 16, "points": points}], "best": best, "chosen": best, "unclear": [],
        "distance": 9.5, "distance_stderr": 0.5, "features": {}, "reference": {}, "settings": {},
    }  # fmt: skip


def make_run(path: Path) -> Path:
    """A run with one small file of every kind, though nothing was computed for it."""
    create_run(path)
    save_config(path, parse_config(CONFIG, "test"))  # with its checksum: half of it may be a configuration, too
    save_choice(path, {"guidance": 0.5}, f"sweeps/{SWEEP}")
    config = run_config(path)
    by_step(path, 10, 160)
    by_step(path, 20, 320)
    for step in (0, 5, 10, 15, 20):
        figures = {"throughput/images_per_sec": 20.0, "train/loss": 3.25 - step / 20, "optim/lr": 0.001}
        more = {"event": "start"} if step == 0 else figures
        append_record_line(path / "metrics.jsonl", {"step": step, "images_seen": 16 * step, "time": 1.0, **more})
    for step in (10, 20):
        result = write_result(path, config, f"step-{step:08d}", fd_x=12.5 + step, distance_stderr=0.25)
        write_object(result.with_name("work.json"), {"seconds": {"total": 3.0}, "time": 1e9})
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(result.with_name("grid.png"))
        append_record_line(path / "evals.jsonl", {"name": result.parent.name, "fd_x": 12.5 + step})
    write_object(path / "sweeps" / SWEEP / "sweep.json", sweep_record(SWEEP))
    (path / "heartbeats").mkdir()
    beat = {"rank": 0, "world_size": 1, "step": 20, "host": "elsewhere", "pid": 1, "job": "", "phase": "gone"}
    (path / "heartbeats/rank-0000.json").write_text(json.dumps(sealed(beat)))
    entry = {"job": "107", "kind": "train", "time": 1.0, "logs": "logs", "cluster": None, "host": "here"}
    (path / "slurm").mkdir()
    append_record_line(path / "slurm/jobs.jsonl", entry)
    chain = Chain.load(path / "slurm", "107")
    chain.begin(0, 0, "n1")
    chain.end(0, "finished at step 20 after 0 restarts")
    return path


FILES = {
    "run.json", "config.yaml", "metrics.jsonl", "evals.jsonl", "sampling.json", f"sweeps/{SWEEP}/sweep.json",
    f"evals/{NAME}/result.json", f"evals/{NAME}/work.json", f"checkpoints/{NAME}/COMMITTED", "slurm/jobs.jsonl",
    "slurm/chain-107.json", "heartbeats/rank-0000.json",
}  # fmt: skip
# Of these only a file in its place, or none at all, is looked at by those who show.
PICTURE = f"evals/{NAME}/grid.png"


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def put(path: Path) -> None:
        path.unlink()
        make(path)

    return put


def deep(path: Path) -> None:
    path.write_text('{"a":' * 5000 + "1" + "}" * 5000 + "\n")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "no object": lambda path: path.write_text("[1, 2]\n"),
    "empty object": lambda path: path.write_text("{}\n"),
    "rubbish": lambda path: path.write_bytes(bytes(range(256)) * 7),
    "deep": deep,
    "large": lambda path: os.truncate(path, 1 << 28),
    "folder": replaced(lambda path: path.mkdir()),
    "pipe": replaced(os.mkfifo),
    "link to nothing": replaced(lambda path: path.symlink_to("/nonexistent/file")),
    "link to itself": replaced(lambda path: path.symlink_to(path)),
}


# Lines that are not there yet, or not to their end, are no damage; a file without lines is one.
NO_DAMAGE = {
    ("metrics.jsonl", "cut"), ("heartbeats/rank-0000.json", "empty object"), ("slurm/chain-107.json", "empty object"),
    *((name, "empty") for name in ("metrics.jsonl", "evals.jsonl", "slurm/jobs.jsonl")),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in a folder, `a` and `b`."""
    folder = tmp_path_factory.mktemp("shown")
    make_run(folder / "runs/a")
    shutil.copytree(folder / "runs/a", folder / "runs/b")
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of them; no Slurm, and whoever waits for something that never comes is interrupted."""
    monkeypatch.setenv("PATH", "/nonexistent")
    shutil.copytree(made / "runs", tmp_path / "runs")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield tmp_path / "runs"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a verb prints; it must succeed."""
    capsys.readouterr()
    code = tarflow.cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    assert code == 0, (words, printed.err)
    assert "Traceback" not in printed.out + printed.err
    return printed.out


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are not drawn: what they are drawn of is written out."""
    monkeypatch.setattr(curves, "svg", lambda plot, key: f"<svg>{html.escape(str(plot.curves))}</svg>")


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.case("H05")
def test_whatever_one_file_is_the_other_runs_and_files_stand(runs: Path, light, capsys, name: str) -> None:
    a, b = runs / "a", runs / "b"
    now = time.time()
    sound = rows([a, b], now)
    assert [row.flaws for row in sound] == [(), ()]
    assert sound[0].score == "fd_x 32.50 @ 20"
    shown(capsys, "report", a)
    page = sections(a)
    for kind, damage in DAMAGES.items():
        if (name, kind) in NO_DAMAGE:
            continue
        damage(a / name)
        first, second = rows([a, b], now)
        assert second == sound[1], (name, kind)
        if not name.startswith("sweeps"):  # which the table does not look at
            assert any(name.removesuffix("/COMMITTED") in flaw for flaw in first.flaws), (name, kind, first.flaws)
        table = shown(capsys, "status", runs)
        assert re.search(r"^\S*b +\S", table, re.MULTILINE), table
        assert str(a) in table
        shown(capsys, "checkpoint", "list", a)
        said = shown(capsys, "report", a)
        if not name.startswith(("slurm", "heartbeats", "checkpoints")):
            assert "left out: " in said, (name, kind)
        for title, text in sections(a).items():
            if title not in ("Damaged files, not shown", *AFFECTED.get(name, ())):
                assert text == page[title], (name, kind, title)
        restore(a, b, name)


# Sections of the report that a file has a part in.
AFFECTED = {
    "config.yaml": {"", "Configuration"}, "metrics.jsonl": {"", "Training curves"}, "sampling.json": {"", "Configuration"},
    "run.json": {"", "Configuration"},
    f"sweeps/{SWEEP}/sweep.json": {"Guidance and denoising"},
    f"evals/{NAME}/result.json": {"Training curves", "Samples over training", "All results", "Guidance and denoising"},
    f"evals/{NAME}/work.json": {"All results"},
}  # fmt: skip


def sections(run: Path) -> dict[str, str]:
    """The sections of a report by title; the first has none."""
    text = (run / "report.html").read_text()
    parts = re.findall(r"<section>(?:<h2>(.*?)</h2>)?(.*?)</section>", text, re.DOTALL)
    return dict(parts)


def restore(run: Path, like: Path, name: str) -> None:
    path = run / name
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()
    shutil.copy2(like / name, path)


def flips(data: bytes, number: int, seed: int) -> Iterator[bytes]:
    """The data with one bit flipped, at places drawn once for all."""
    rng = random.Random(seed)
    for _ in range(number):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        yield data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


SEALED = sorted(FILES - {"config.yaml"})


@pytest.mark.parametrize("name", SEALED)
@pytest.mark.case("H06")
def test_no_flipped_bit_changes_what_is_shown_without_a_word(runs: Path, light, name: str) -> None:
    run, now = runs / "a", time.time()
    write_report(run)
    row, page = rows([run], now), sections(run)
    data = (run / name).read_bytes()
    for changed in flips(data, 25, seed=len(name)):
        (run / name).write_bytes(changed)
        said: list[str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_report(run, log=said.append)
            after, text = rows([run], now), sections(run)
        said = [line for line in said if line.startswith("left out: ")]
        if not said and not after[0].flaws:
            assert (after, text) == (row, page), changed
        elif said and not after[0].flaws:
            assert name.startswith("sweeps"), "which the table does not look at"
            assert after == row


HOSTILE: list[Any] = [
    None, [], {}, "x", -1, True, 1e308, -1e308, 5e-324, 10**30, 2**63, "\x1b]0;owned\x07", "<script>alert(1)</script>",
    "[red]$x$_^{", "a\nb", "\u202e" * 300,
]  # fmt: skip


def places(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Every field of nested plain values, by the keys that lead to it."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    if not path:
        return to
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], to)
    return copy


@pytest.mark.parametrize(
    "name", [f"evals/{NAME}/result.json", f"evals/{NAME}/work.json", f"sweeps/{SWEEP}/sweep.json", "sampling.json"]
)
@pytest.mark.case("H06", "H11")
def test_whatever_stands_in_a_field_the_page_and_the_table_are_made(runs: Path, light, capsys, name) -> None:
    """Of a file that a stranger wrote, say: its checksum fits."""
    run, values, rng = runs / "a", read_object(runs / "a" / name), random.Random(0)
    fields = list(places(values))
    for path in rng.sample(fields, min(len(fields), 25)):
        for hostile in rng.sample(HOSTILE, 2):
            write_object(run / name, changed(values, path, hostile))
            assert len(rows([run])) == 1
            text = write_report(run).read_text()
            assert "<script>" not in text
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text), (path, hostile)
    assert "\x1b" not in shown(capsys, "status", runs) + shown(capsys, "report", run)


@pytest.mark.case("H06")
def test_figures_at_their_bounds_are_drawn(runs: Path) -> None:
    """Files of versions before the checksum: nobody can tell that their digits were changed, but a plot can be made."""
    run = runs / "a"
    lines = [json.dumps(row) for row in read_lines(run / "metrics.jsonl").rows]
    text = "\n".join(lines)
    for old, new in (("3.0", "1e38"), ("20.0", "5e-324"), ("320", str(2**62)), ("0.001", "-1e38")):
        text = text.replace(old, new)
    (run / "metrics.jsonl").write_text(text + "\n")
    assert len(read_history(run).rows) == 4
    path = run / f"evals/{NAME}/result.json"
    figures = dict.fromkeys(("fd_x", "distance_stderr", "bits_per_dim", "bits_per_dim_stderr", "precision"), 1e38)
    write_object(path, read_object(path) | figures)
    said: list[str] = []
    assert write_report(run, log=said.append).read_text().count("<svg") >= 6
    assert said == [f"samples: {run}/evals/step-00000020/grid.png"], "they are figures"


@pytest.mark.case("H11")
def test_text_from_files_is_text_in_table_and_page(runs: Path, tmp_path: Path, capsys) -> None:
    name = "[red]x\x1b[2J\x1b]0;owned\x07<b>\n"
    run = tmp_path / name / "a"
    shutil.copytree(runs / "a", run)
    path = run / "evals/step-00000020/result.json"
    wicked = "fd_\x1b[31m<i>[blink]"
    write_object(
        path,
        read_object(path)
        | {wicked: 1.5, "weights": "<i>\x1b[1m", "warnings": ["\x9b5m<u>"], "grid_rows": ["\u202e<s>"], "fd_x": None},
    )
    write_object(run / "data.json", {"classes": ["\x1b[0m<em>"]})
    text = shown(capsys, "status", tmp_path / name)
    assert "\x1b" not in text
    assert r"[red]x\x1b[2J\x1b]0;owned\x07<b>\n/a" in text
    page = write_report(run).read_text()
    for tag in ("<b>", "<i>", "<u>", "<s>", "<em>", "\x1b", "\x9b", "\u202e"):
        assert tag not in page, tag


@pytest.mark.case("H06")
def test_another_runs_or_checkpoints_result_is_not_this_ones(runs: Path) -> None:
    a, b = runs / "a", runs / "b"
    write_identity(b, "0" * 32)
    found, flaws = scan(b)
    assert found == []
    assert [flaw.count("it belongs to the run") for flaw in flaws] == [1, 1]
    shutil.copytree(a / "evals/step-00000020", a / "evals/step-00000030")
    (damaged,) = scan(a)[1]
    assert "evals/step-00000030/result.json (a result) is damaged" in damaged
    assert "name: it names 'step-00000020', and is in 'step-00000030'" in damaged
    values = read_object(a / "evals/step-00000020/result.json")
    for key, value, says in (
        ("step", 21, "step: 21, and its name says 20"),
        ("settings_hash", "0" * 12, "is not the digest of its settings"),
        ("num_samples", 17, "contradicts"),
        ("checksun", "x", "has no field 'checksun'"),
    ):
        write_object(a / "evals/step-00000020/result.json", values | {key: value})
        with pytest.raises(DamagedFileError, match=says):
            read_result(a / "evals/step-00000020")
