"""What a user can cause ends in one line, for every verb: the table of `tests/helpers/message_table.py`, and Ctrl-C at a terminal.

`pytest -s tests/test_messages.py` prints the table.
"""

import argparse
import ast
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import tarflow.cli
from tests.helpers.message_table import VERBS
from tests.helpers.programs import program
from tests.helpers.waiting import until
from tests.test_front_door import ALL, VERBS_ABOVE_OTHERS

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
Row = dict[str, Any]
# What needs no room on a disk, and what finds no job to cancel.
WITHOUT_FAULT = {("checkpoint prune", "full"), ("cancel", "locked"), ("cancel", "read-only"), ("cancel", "full")}
# Refused by their own rooms, as a wrong setting.
OWN_WORDS_FOR_A_FULL_DISK = {"checkpoint export", "submit"}


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    # Not in pytest's own folder, which a user without rights cannot look into.
    with tempfile.TemporaryDirectory(prefix="tarflow-table-", ignore_cleanup_errors=True) as folder:
        done = subprocess.run([sys.executable, "-m", "tests.helpers.message_table", folder], cwd=ROOT, env=ENV,
                              capture_output=True, text=True, timeout=600)  # fmt: skip
        print(f"\n{done.stdout}")
        assert done.returncode == 0, done.stderr[-3000:]
        yield list(json.loads(Path(folder, "table.json").read_text()))


def said(row: Row) -> str:
    """The message without the notes of what was inferred before."""
    return "\n".join(line for line in row["message"].splitlines() if not line.startswith("note: "))


def faults(table: list[Row]) -> Iterator[Row]:
    for row in table:
        if "Ctrl-C" not in row["fault"] and (row["verb"], row["fault"]) not in WITHOUT_FAULT:
            yield row


@pytest.mark.case("N14")
def test_the_table_holds_every_verb() -> None:
    words = {verb.partition(" (")[0].partition(" --")[0] for verb in VERBS}
    assert words == set(ALL) - VERBS_ABOVE_OTHERS


@pytest.mark.case("N14")
def test_every_fault_is_one_line_and_its_exit_code(table: list[Row]) -> None:
    assert len(list(faults(table))) > 120
    for row in faults(table):
        if row["fault"] == "run is read-only" and row["code"] == 0:
            continue  # whoever reads needs no room in it
        full = row["fault"] == "full" and row["verb"] not in OWN_WORDS_FOR_A_FULL_DISK
        assert row["code"] == (1 if full else 2), row
        words = row["verb"].partition(" (")[0].partition(" --")[0]
        assert said(row).startswith(f"tarflow {words}: error: "), row
        assert len(said(row).splitlines()) == 1, row
        for inside in ("Traceback", "[Errno", "Error:", ".tmp:"):
            assert inside not in said(row), row


@pytest.mark.case("N14")
def test_what_could_not_be_written_is_named_with_its_option(table: list[Row]) -> None:
    for row in faults(table):
        if row["fault"] in ("locked", "read-only", "full"):
            if row["message"].startswith("tarflow evaluate: error: cannot write reference statistics to "):
                assert f"{row['fault']}/" in row["message"].partition("; `tarflow reference --out")[0], row
                continue
            option = re.search(r"error: (--out|--run-dir|--sheet|--report|OUT|RUN) (\S+?)[: ]", row["message"])
            assert option, row
            assert re.search(rf"(^|/){row['fault']}/", option[2]), row


@pytest.mark.case("N14")
def test_nothing_half_written_is_left(table: list[Row]) -> None:
    assert [row for row in table if row["left"] and row["code"]] == []


@pytest.mark.case("N14")
def test_ctrl_c_ends_every_verb_without_a_word(table: list[Row]) -> None:
    """Or it was over already; a training has saved, `logs` finds none."""
    rows = [row for row in table if "Ctrl-C" in row["fault"]]
    for row in rows:
        codes = {"train": {75, 130, 0}, "logs": {2, 130}}.get(row["verb"], {130, 0})
        assert row["code"] in codes, row
        assert row["left"] == [], row
        assert row["verb"] == "logs" or not said(row) or said(row).startswith("(stdout)"), row
    assert sum(row["code"] == 130 for row in rows) >= len(rows) // 3


@pytest.mark.case("N14")
def test_ctrl_c_at_a_terminal_reaches_the_processes_of_a_command_too() -> None:
    """They say nothing of it either, not even in their first moments."""
    process = subprocess.Popen(program("sleeping_verb"), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)  # fmt: skip
    until("two processes", lambda: len(children(process.pid)) == 2, every_s=0.005)
    begun = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 130
    assert [pid for pid in begun if Path(f"/proc/{pid}").exists()] == []


def children(pid: int) -> list[str]:
    found: list[str] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += thread.read_text().split()
    return found


# --- advice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran"], "tarflow: error: argument VERB: invalid choice: 'tran'; did you mean train?"),
        (["data", "prepar"], "tarflow data: error: argument VERB: invalid choice: 'prepar'; did you mean prepare?"),
        (["xyzzy"], "invalid choice: 'xyzzy' (there are data, init, train, "),
        (
            ["train"],
            "tarflow train: error: the following arguments are required: CONFIG.yaml (see `tarflow train --help`)",
        ),
        (["train", "a.yaml", "--run-dirr=x"], "unrecognized arguments: --run-dirr=x; did you mean --run-dir?"),
        (["sample", "run", "--out", "x", "--labls", "1"], "did you mean --labels?"),
    ],
)
@pytest.mark.case("N14")
def test_wrong_usage_is_one_line_with_the_nearest_word(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        tarflow.cli.main(words)
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in err
    assert err.count("\n") == 1


OTHER_PROGRAMS = {
    "--gpus-per-task",
    "--gpu-bind",
    "--ntasks",
    "--ntasks-per-node",
    "--no-deps",
    "--force-reinstall",
    "--ignore-scripts",
}


@pytest.mark.case("N14")
def test_advice_names_verbs_and_options_that_exist() -> None:
    options = {*OTHER_PROGRAMS, "--help", "--version"}
    for module in map(importlib.import_module, ALL.values()):
        parser = argparse.ArgumentParser()
        getattr(module, "add_arguments", lambda parser: None)(parser)
        options |= {name for action in parser._actions for name in action.option_strings}
    checked = 0
    for top in ("models", "data_pipeline", "trainer", "evaluation", "cluster", "tarflow"):
        for path in (ROOT / top).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for text in texts(tree):
                for verb, below in re.findall(r"`tarflow ([a-z-]+)(?: ([a-z-]+))?", text):
                    words = f"{verb} {below}" if verb in VERBS_ABOVE_OTHERS and below else verb
                    assert words in ALL, f"{path.relative_to(ROOT)}: there is no `tarflow {words}`"
                    checked += 1
            for error in (node for node in ast.walk(tree) if isinstance(node, ast.Raise)):
                for text in texts(error):
                    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
                        assert option in options, f"{path.relative_to(ROOT)}: there is no option {option}"
                        checked += 1
    assert checked > 80


def texts(tree: ast.AST) -> list[str]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


# --- home directories ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", sorted(set(ALL) - VERBS_ABOVE_OTHERS))
@pytest.mark.case("F19")
def test_a_tilde_is_the_home_directory_in_every_path_of_every_verb(words: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = argparse.ArgumentParser()
    importlib.import_module(ALL[words]).add_arguments(parser)
    argv, paths = words.split(), []
    for action in parser._actions:
        if action.type is Path or (not action.option_strings and action.type is None and not action.choices):
            if action.dest in ("overrides", "name"):
                argv += ["mnist5k"] if action.dest == "name" else []
                continue
            paths.append(action.dest)
            argv += [f"{action.option_strings[0]}=~/x y"] if action.option_strings else ["~/x y"]
        elif action.required:
            argv.append(f"{action.option_strings[0]}=1")
    args = vars(tarflow.cli.parse(argv))
    assert paths
    for name in paths:
        assert str(args[name][0] if isinstance(args[name], list) else args[name]) == "/home/me/x y", name


@pytest.mark.case("F19")
def test_a_tilde_is_the_home_directory_in_every_setting_that_is_a_path(tmp_path: Path, monkeypatch: Any) -> None:
    from tarflow.cluster.submission.profile import load_profile
    from tarflow.trainer.config.files import load_config

    monkeypatch.setenv("HOME", "/home/me")
    names = ("data.train", "data.validation", "data.cache_dir", "evaluation.features_file", "evaluation.reference")
    demo = (ROOT / "configs" / "demo.yaml").read_text()
    (tmp_path / "a.yaml").write_text(demo.replace("data/mnist5k/", "~/t/"))
    assert load_config(tmp_path / "a.yaml").data.train == "/home/me/t/train"
    config = load_config(tmp_path / "a.yaml", [f"{name}=~/x" for name in names])
    for name in names:
        section, _, key = name.partition(".")
        assert str(getattr(getattr(config, section), key)) == "/home/me/x"
    (tmp_path / "p.yaml").write_text("python: ~/env/bin/python\n")
    assert load_profile(tmp_path / "p.yaml").python == "/home/me/env/bin/python"


@pytest.mark.case("N14")
def test_too_little_memory_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tarflow.data_pipeline.commands import info

    def run(args: object) -> int:
        raise MemoryError

    monkeypatch.setattr(info, "run", run)
    assert tarflow.cli.main(["data", "info", "x"]) == 1
    assert capsys.readouterr().err == "tarflow data info: error: not enough memory on this machine for what was asked\n"


@pytest.mark.parametrize("words", [["reference", "x"], ["score", "x", "--against", "y"]], ids=lambda words: words[0])
@pytest.mark.case("N14")
def test_a_side_that_no_model_has_is_refused(words: list[str], capsys: Any) -> None:
    words = [*words, "--size", "99999", *(["--channels", "3"] if words[0] == "reference" else [])]
    assert tarflow.cli.main(words) == 2
    assert "--size must be at most 16384 pixels, got 99999" in capsys.readouterr().err
