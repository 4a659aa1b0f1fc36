"""Readers that go away: `| head -1` ends a command without a word, a training goes on to its log."""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tarflow.cli import main
from tarflow.cluster.commands import status
from tarflow.errors import UserError
from tarflow.terminal import Output, ReaderGoneError
from tests.helpers.data import prepared
from tests.helpers.programs import ENV, program
from tests.helpers.waiting import until
from tests.helpers.warm import warm
from tests.test_poor_file_system import CONFIG


def heed_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


COLD = [sys.executable, "-m", "tarflow"]


def start(*words: object, python: Sequence[str] = COLD, **options: Any) -> "subprocess.Popen[str]":
    """A verb as from a terminal, also where these tests themselves run under nohup."""
    return subprocess.Popen(
        [*python, *map(str, words)], env=ENV, text=True,
        preexec_fn=heed_hangup,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 1), dtype=np.uint8)
    return prepared(tmp_path_factory.mktemp("small"), images, np.arange(30) % 3)


@pytest.mark.parametrize("words", [["data", "info", "SET"], ["data", "verify", "SET", "--processes", "1"], ["--help"]])
@pytest.mark.case("F19")
def test_a_reader_that_goes_ends_a_command_without_a_word(small_set: Path, words: list[str]) -> None:
    process = start(*[str(small_set) if word == "SET" else word for word in words])
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == (0 if words == ["--help"] else 128 + signal.SIGPIPE)


@pytest.mark.case("N14")
def test_a_full_disk_under_the_output_is_one_line(small_set: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start("data", "info", small_set, stdout=full)
        _, err = process.communicate(timeout=60)
    assert err.startswith("tarflow data info: error: /dev/stdout: no space is left on its file system (")
    assert err.count("\n") == 1
    assert process.returncode == 1


@pytest.mark.case("F19")
def test_a_training_outlives_its_reader_and_saves_when_its_terminal_is_closed(small_set: Path, tmp_path: Path) -> None:
    """`tarflow train ... | head -1`, and then SIGHUP, as for SIGTERM."""
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(CONFIG | {"data": {"train": str(small_set), "num_workers": 1}}))
    settings = ("train.max_images=1_600_000", "checkpoint.every_images=1_600_000", "ema.snapshot_every_images=0")
    process = start("train", config, "--run-dir", run, *settings, python=warm("tarflow"))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("data:")
    process.stdout.close()
    until("step 3", lambda: (run / "log.txt").exists() and "step 3 " in (run / "log.txt").read_text())
    process.send_signal(signal.SIGHUP)
    assert process.stderr.read() == ""
    assert process.wait(60) == 75
    last = (run / "log.txt").read_text().splitlines()[-1]
    assert "stopped by SIGHUP at " in last
    assert last.endswith(" images, saved; the same command resumes from here")
    assert len(list((run / "checkpoints").glob("*/COMMITTED"))) == 1


@pytest.mark.parametrize(("ignored", "received"), [(True, "None"), (False, "SIGHUP")], ids=["nohup", "terminal"])
@pytest.mark.case("F19")
def test_nohup_stays_in_force(ignored: bool, received: str) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        done = subprocess.run(program("heed_hangup", "once"), env=ENV, capture_output=True, text=True, timeout=60)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.stdout.strip() == received


@pytest.mark.case("F19")
def test_ranks_are_told_that_the_terminal_of_their_supervisor_is_closed() -> None:
    process = subprocess.Popen(
        program("heed_hangup", "supervisor"), env=ENV, stdout=subprocess.PIPE, text=True, preexec_fn=heed_hangup
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 75
    process.stdout.close()


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize("ends", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_an_output_goes_nowhere_once_nobody_reads_it(ends: Callable[[], tuple[int, int]], lasting: bool) -> None:
    read, write = ends()
    output = Output(write, "standard output", lasting)
    assert output.write(b"1") == 1
    os.close(read)
    if lasting:
        assert output.write(b"22") == 2
    else:
        with pytest.raises(ReaderGoneError):
            output.write(b"22")
    assert os.write(write, b"333") == 3  # what a library or a child writes itself
    os.close(write)


@pytest.mark.case("H11")
def test_names_of_classes_reach_a_terminal_as_escapes(small_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tarflow.data_pipeline.commands.info import _print_classes
    from tarflow.data_pipeline.storage.open_index import open_index

    index = open_index(small_set)
    index.classes = ["cat\x1b]0;owned\x07\x1b[31m\nsamples      1,000,000\u202e", "dog", "x" * 10_000]
    _print_classes(index, 3)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"cat\x1b]0;owned\x07\x1b[31m\nsamples      1,000,000\u202e" in out
    assert len(out.splitlines()) == 4
    assert len(out) < 600


@pytest.mark.case("H11")
def test_the_line_of_an_error_shows_what_a_name_holds(tmp_path: Path) -> None:
    missing = tmp_path / "a\x1b[2J\ntarflow: finished.yaml"
    process = start("train", missing, "--run-dir", tmp_path / "run")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "\x1b" not in err
    assert "a\\x1b[2J\n  tarflow: finished.yaml" in err
    assert len(err.splitlines()) == 2


@pytest.mark.case("H11")
def test_whatever_is_printed_is_escaped_but_what_a_library_draws() -> None:
    done = subprocess.run(program("print_escapes"), env=ENV, capture_output=True, timeout=60)
    assert done.stdout.decode() == "a\\x1b[31m\\x9b1m\tb\n50%\\u202e\n\x1b[1mbar\x1b[0m\nafter\n"
    assert done.stderr == b"err\\x07\n"


@pytest.mark.case("F19")
def test_a_signal_that_comes_within_a_callback_of_the_interpreter_is_not_lost() -> None:
    """What rises in a weak reference's callback is only printed, and the program goes on."""
    done = subprocess.run(program("signal_in_callback"), env=ENV, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("ended True\n", "")


@pytest.mark.case("F19")
def test_what_was_cut_short_says_nothing_of_its_end_and_what_fails_by_itself_does() -> None:
    """An archive that was being written closes itself after its file: a Ctrl-C at that moment ended in a traceback."""
    asked, loud = (
        subprocess.run(program("signal_in_archive", *words), env=ENV, capture_output=True, text=True, timeout=60)
        for words in ((), ("loud",))
    )
    assert (asked.stdout, asked.stderr) == ("ended True\n", "")
    assert loud.stdout == "ended False\n"
    assert "seek of closed file" in loud.stderr


@pytest.mark.case("F19")
def test_an_error_that_a_library_makes_of_ctrl_c_is_the_end_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that a verb finds words for."""

    def read(args: Namespace) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise UserError("its tensors cannot be read") from None
        return 0

    monkeypatch.setattr(status, "run", read)
    assert main(["status", str(tmp_path)]) == 130
    assert capsys.readouterr().err == ""
