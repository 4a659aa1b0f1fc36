"""The verbs as typed: exit codes, help without torch, errors without traceback."""

import subprocess
import sys

import pytest

import tarflow.cli
from tarflow.evaluation.commands.options import FAILED

VERBS = ("evaluate", "sample", "sweep-guidance", "report", "reference", "score")


def run(*arguments):
    return tarflow.cli.main([str(a) for a in arguments])


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_line_and_loads_no_torch(verb):
    code = (
        "import sys, tarflow.cli\n"
        f"try: tarflow.cli.main(['{verb}', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert f"example:\n  tarflow {verb} " in done.stdout


def test_the_whole_way_from_a_run_to_its_report(make_run, fake_features, tmp_path, capsys):
    run_dir, _ = make_run()
    assert run("evaluate", run_dir, "--once", "sampling.guidance=2", "--newest", "--threads", 1) == 0
    assert "step 20 (320 images): fd_efficientnet_lite0" in capsys.readouterr().out
    assert run("evaluate", run_dir, "sampling.guidance=2", "--newest") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run("sample", run_dir, "--out", tmp_path / "out", "--num", 4, "--labels", "0,none", "--no-annealed") == 0
    assert "grid: " in capsys.readouterr().out
    assert run("report", run_dir) == 0
    assert str(run_dir / "report.html") in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_scored_gives_exit_code_1(make_run, save_checkpoint, fake_features, capsys):
    run_dir, config = make_run(steps=())
    save_checkpoint(run_dir, config, 10, 160, averages=[])
    assert run("evaluate", run_dir, "--once") == FAILED
    assert "not evaluated: images-000000000160: checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "nowhere"), "no run directory at nowhere"),
        (("evaluate", "nowhere", "--watch", "--step", "3"), "--step selects one checkpoint"),
        (("evaluate", "nowhere", "--threads", "0"), "--threads must be at least 1, got 0"),
        (("sample", "nowhere", "--out", "x", "--num", "0"), "--num must be at least 1, got 0"),
        (("sample", "nowhere", "--out", "x", "--labels", "cat"), "no run directory at nowhere"),
        (("report", "nowhere"), "no run directory at nowhere"),
    ],
)
def test_wrong_arguments_are_one_message_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_report_names_the_grid_of_the_runs_own_settings(make_run, fake_features, capsys):
    run_dir, _ = make_run()
    assert run("evaluate", run_dir) == 0
    assert run("evaluate", run_dir, "--newest", "sampling.guidance=3") == 0
    assert run("report", run_dir) == 0
    assert f"samples: {run_dir}/evals/images-000000000320/grid.png" in capsys.readouterr().out
