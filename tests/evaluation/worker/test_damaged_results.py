"""What decides refuses a file that cannot be believed, or sets it aside and says so: nothing is overwritten or removed."""

import json
import os
import re

import pytest

from tarflow.evaluation import results
from tarflow.evaluation.run_config import run_config
from tarflow.evaluation.sweep.candidates import SweepRequest
from tarflow.evaluation.sweep.guidance import sweep_guidance
from tarflow.evaluation.worker.follow import WorkerOptions, evaluate
from tarflow.records import DamagedFileError, append_record_line, read_lines, read_object, write_object
from tarflow.trainer.config.chosen_sampling import chosen_sampling, save_choice

pytestmark = pytest.mark.usefixtures("fake_features")
NAME = "images-000000000320"


def digit(path):
    """Change one digit of a figure: valid JSON, another number."""
    text = path.read_text()
    found = re.search(r'"(?:fd_\w+|bits_per_dim|distance|guidance)": \d+\.\d*?([1-8])', text)
    assert found is not None
    at = found.start(1)
    path.write_text(text[:at] + str(int(text[at]) + 1) + text[at + 1 :])


def other_run(path):
    write_object(path, read_object(path) | {"run": "0" * 32})


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def evaluated(run_dir, lines=None):
    return evaluate(run_dir, False, WorkerOptions(), (lambda _: None) if lines is None else lines.append).done


@pytest.mark.case("H06")
def test_a_result_that_cannot_be_believed_is_set_aside_said_and_made_again(make_run):
    run_dir, _ = make_run(steps=(20,))
    assert len(evaluated(run_dir)) == 1
    path = run_dir / f"evals/{NAME}/result.json"
    before = path.read_bytes()
    for number, damage in enumerate((digit, other_run, pipe), 1):
        damage(path)
        lines: list[str] = []
        assert len(evaluated(run_dir, lines)) == 1, damage
        assert path.read_bytes() == before
        aside = f"damaged-{NAME}" + (f"-{number}" if number > 1 else "")
        assert (run_dir / "evals" / aside / "grid.png").exists()
        assert any(f"set aside as {aside}, evaluated again" in line for line in lines)
    assert results.scan(run_dir)[1] == []
    rows = read_lines(run_dir / "evals.jsonl").rows
    assert [row["name"] for row in rows] == [NAME], "it was announced before, with the same figures"


@pytest.mark.case("H05", "H06")
def test_a_damaged_line_of_results_is_written_again(make_run):
    run_dir, _ = make_run(steps=(10, 20))
    evaluated(run_dir)
    path = run_dir / "evals.jsonl"
    whole = {row["name"]: row for row in read_lines(path).rows}
    for work in (run_dir / "evals").glob("images-*/work.json"):
        write_object(work, read_object(work) | {"time": 1e9})  # long ago: its own worker is not about to do it
    first, second = path.read_text().splitlines()
    path.write_text(re.sub(r'("fd_\w+": \d)', r"\g<1>7", first) + "\n" + second[: len(second) // 2])
    said: list[str] = []
    assert evaluated(run_dir, said) == []
    assert f"{path}: 1 damaged line left out (1); its last line is cut off; missing lines are written again" in said
    lines = read_lines(path)
    assert len(lines.damaged) == 2
    assert {row["name"] for row in lines.rows} == whole.keys()
    for row in lines.rows:
        assert {k: v for k, v in row.items() if k != "time"} == {
            k: v for k, v in whole[row["name"]].items() if k != "time"
        }


@pytest.mark.case("H06")
def test_lines_of_another_run_are_not_taken_for_this_ones(make_run):
    run_dir, _ = make_run(steps=(20,))
    evaluated(run_dir)
    work, path = run_dir / f"evals/{NAME}/work.json", run_dir / "evals.jsonl"
    write_object(work, read_object(work) | {"time": 1e9})
    (row,) = read_lines(path).rows
    path.unlink()
    append_record_line(path, row | {"run": "0" * 32})
    said: list[str] = []
    evaluated(run_dir, said)
    foreign = f"{path} holds lines that are not results of this run: 1"
    assert f"{foreign}; missing lines are written again" in said
    assert [line["run"] == row["run"] for line in read_lines(path).rows] == [False, True]
    assert results.scan(run_dir)[1] == [foreign]


@pytest.mark.parametrize(
    "make", [pipe, lambda path: (path.unlink(), path.mkdir()), lambda path: (path.unlink(), path.symlink_to("x"))]
)
@pytest.mark.case("H06")
def test_what_is_no_file_of_lines_is_refused_before_any_work(make_run, make):
    run_dir, _ = make_run(steps=(20,))
    append_record_line(run_dir / "evals.jsonl", {"name": "x"})
    make(run_dir / "evals.jsonl")
    write_object(run_dir / "evals/x/result.json", {})
    with pytest.raises(DamagedFileError, match=r"evals\.jsonl is damaged .* not a regular file"):
        evaluated(run_dir)
    assert not (run_dir / f"evals/{NAME}").exists()


def sweep(run_dir, lines=None, **options):
    asked = {"guidance": (0.0, 1.0), "start": 6, "final": 12, **options}
    return sweep_guidance(SweepRequest(run_dir, **asked), (lambda _: None) if lines is None else lines.append)


@pytest.mark.case("H06")
def test_a_sweeps_record_that_cannot_be_believed_chooses_nothing(make_run, monkeypatch):
    run_dir, _ = make_run(steps=(20,))
    record = sweep(run_dir, choose="none")
    path = run_dir / "sweeps" / record["name"] / "sweep.json"
    whole = path.read_text()

    def best_is_another(path):
        values = read_object(path)
        write_object(
            path, values | {"best": values["best"] | {"guidance": 1.0 - values["best"]["guidance"]}, "chosen": None}
        )

    for damage, says in (
        (digit, "checksum"), (pipe, "not a regular file"), (best_is_another, "best: it is not the best of the last round"),
        (lambda path: write_object(path, read_object(path) | {"name": "images-000000000320-other"}), "name: it names"),
    ):  # fmt: skip
        damage(path)
        with pytest.raises(DamagedFileError, match=f"{says}.*remove its folder to do the sweep again"):
            sweep(run_dir, choose="best")
        assert chosen_sampling(run_dir) == ({}, "")
        path.unlink()
        path.write_text(whole)
    sweep(run_dir, choose="best")
    assert run_config(run_dir).sampling.guidance == record["best"]["guidance"]


@pytest.mark.parametrize("kind", ["digit", "pipe", "folder", "link to nothing", "cut", "list"])
@pytest.mark.case("H06")
def test_a_choice_that_cannot_be_believed_is_refused_with_the_way_out(make_run, kind):
    run_dir, _ = make_run(steps=(20,))
    save_choice(run_dir, {"guidance": 2.25}, "sweeps/x")
    path = run_dir / "sampling.json"
    if kind in ("folder", "link to nothing"):
        path.unlink()
    damage = {
        "digit": digit, "pipe": pipe, "folder": lambda path: path.mkdir(), "cut": lambda path: os.truncate(path, 30),
        "link to nothing": lambda path: path.symlink_to("nothing"), "list": lambda path: path.write_text("[]"),
    }  # fmt: skip
    damage[kind](path)
    with pytest.raises(
        DamagedFileError, match=r"sampling\.json \(a sweep's choice\) .*remove it to go by the run's own"
    ):
        evaluated(run_dir)
    assert not list((run_dir / "evals").glob("*")) if (run_dir / "evals").exists() else True


@pytest.mark.case("H06")
def test_a_plan_whose_numbers_were_changed_is_refused(tmp_path):
    from tarflow.evaluation.shared_work import SharedWork

    SharedWork(tmp_path / "work", {"batch_size": 3}, 60)
    path = tmp_path / "work/plan.json"
    for changes, says in (
        ({"batch_size": 0}, "batch_size: 0 is out of range"), ({"batch_size": 1 << 60}, "is out of range"), ({"lease_s": "x"}, "lease_s"),
        ({"batch_size": 2.5}, "batch_size"), ({"batch_size": True}, "batch_size"),
    ):  # fmt: skip
        write_object(path, {"batch_size": 3, "lease_s": 60.0} | changes)
        with pytest.raises(DamagedFileError, match=f"{says}.*remove .*/work to begin this work again"):
            SharedWork(tmp_path / "work", {"batch_size": 3}, 60)
    write_object(path, {"lease_s": 60.0})
    with pytest.raises(DamagedFileError, match="batch_size: it is missing"):
        SharedWork(tmp_path / "work", {"batch_size": 3}, 60)
    write_object(path, {"batch_size": 8, "lease_s": 60.0})
    path.write_text(path.read_text().replace("8", "9"))
    with pytest.raises(DamagedFileError, match="checksum"):
        SharedWork(tmp_path / "work", {"batch_size": 3}, 60)
    path.write_text(json.dumps({"batch_size": 8, "lease_s": 60}))  # of a version before the checksum
    assert SharedWork(tmp_path / "work", {"batch_size": 3}, 60).plan["batch_size"] == 8
