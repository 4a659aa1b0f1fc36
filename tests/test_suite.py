"""What the suite says of itself is so."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LIST, SLOW_S, file_of, read_list
from tests.helpers.ranks import free_port
from tests.helpers.waiting import PATIENCE_S, until
from tests.helpers.warm import warm

ROOT = LIST.parents[1]


def test_the_list_of_slow_tests_names_tests_that_there_are() -> None:
    """One that was renamed would be run by `make test-fast` until somebody wonders; `make slow-list` writes the list anew."""
    for name, seconds in read_list().items():
        assert seconds >= SLOW_S
        file = ROOT / file_of(name)
        assert file.exists(), name
        assert f"def {name.rpartition('::')[2]}(" in file.read_text(), name


def test_every_program_of_the_tests_says_what_it_does_and_is_started() -> None:
    folder = LIST.parent / "helpers" / "programs"
    texts = [path.read_text() for path in (*Path(__file__).parent.rglob("test_*.py"), *folder.glob("*.py"))]
    for program in sorted(folder.glob("[a-z]*.py")):
        assert program.read_text().startswith('"""'), program.name
        start = (
            f'program("{program.stem}"',
            f"programs/{program.name}",
            f'helpers.programs.{program.stem}"',
            f'"{program.name}"',
        )
        assert any(words in text for words in start for text in texts), program.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_warm_command_dies_by_a_signal_as_a_cold_one_does(number: signal.Signals) -> None:
    port = free_port()

    def answers() -> bool:
        with socket.socket() as other:
            return other.connect_ex(("127.0.0.1", port)) == 0

    process = subprocess.Popen(warm("http.server", port, "--bind", "127.0.0.1"), stderr=subprocess.DEVNULL)
    until("the command", answers)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == -number
    until("the end of the fork", lambda: not answers())


def test_a_warm_command_has_the_words_the_folder_and_the_exit_code_of_a_cold_one(tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text("{'a': 1}")
    for words in (["json.tool", "here.json"], ["json.tool", "--sort-keys", "-"]):
        cold, quick = (
            subprocess.run(start, cwd=tmp_path, input='{"b": 1, "a": 2}', capture_output=True, text=True)
            for start in ([sys.executable, "-m", *words], warm(*words))
        )
        assert (quick.returncode, quick.stdout, quick.stderr) == (cold.returncode, cold.stdout, cold.stderr)
