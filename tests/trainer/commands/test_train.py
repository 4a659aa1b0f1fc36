"""`tarflow train`: what is refused before a process starts, and what the help says."""

from pathlib import Path

import tarflow.cli
from tarflow.trainer.commands import train
from tarflow.trainer.resilience import exit_codes
from tarflow.trainer.resilience.exit_codes import USAGE


def test_wrong_numbers_and_ranks_within_ranks_are_refused(
    tiny_config: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    command = ["train", str(tiny_config), "--run", str(tmp_path / "run")]
    assert tarflow.cli.main([*command, "--ranks", "0"]) == USAGE
    assert "--ranks 0: 1 at least" in capsys.readouterr().err
    assert tarflow.cli.main([*command, "--max-restarts", "-1"]) == USAGE
    monkeypatch.setenv("RANK", "1")
    assert tarflow.cli.main([*command, "--ranks", "2"]) == USAGE
    assert "this is already one of several (RANK=1)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_names_every_exit_code() -> None:
    codes = [value for name, value in vars(exit_codes).items() if name.isupper()]
    assert len(codes) == 6
    words = train.EXAMPLE.replace(",", " ").replace("(", " ").split()
    assert [code for code in codes if str(code) not in words] == []
