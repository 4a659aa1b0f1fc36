"""`tarflow train`: what is refused before a process starts, and what the help says."""

import sys
from pathlib import Path

import pytest

import tarflow.cli
from tarflow.trainer.commands import train
from tarflow.trainer.resilience import exit_codes
from tarflow.trainer.resilience.exit_codes import USAGE


def test_wrong_numbers_and_ranks_within_ranks_are_refused(
    tiny_config: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    command = ["train", str(tiny_config), "--run", str(tmp_path / "run")]
    assert tarflow.cli.main([*command, "--ranks", "0"]) == USAGE
    assert "--ranks 0 must be at least 1" in capsys.readouterr().err
    assert tarflow.cli.main([*command, "--max-restarts", "-1"]) == USAGE
    monkeypatch.setenv("RANK", "1")
    assert tarflow.cli.main([*command, "--ranks", "2"]) == USAGE
    assert "this process is a rank already (RANK=1)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_names_every_exit_code() -> None:
    codes = [value for name, value in vars(exit_codes).items() if name.isupper()]
    assert len(codes) == 6
    words = train.EXAMPLE.replace(",", " ").replace("(", " ").split()
    assert [code for code in codes if str(code) not in words] == []


@pytest.mark.case("V07")
def test_torchrun_hands_the_run_directory_on() -> None:
    """`--run`, the short name, is the beginning of options of torchrun's own, which some versions of Python refuse."""
    from torch.distributed.run import parse_args

    words = ["--nproc-per-node", "2", "-m", "tarflow", "train", "c.yaml", "--run-dir", "X", "train.seed=1"]
    parsed = parse_args(words)
    assert (parsed.training_script, parsed.module) == ("tarflow", True)
    assert parsed.training_script_args == ["train", "c.yaml", "--run-dir", "X", "train.seed=1"]
    args = tarflow.cli.parse(parsed.training_script_args)
    assert (args.run, args.overrides) == (Path("X"), ["train.seed=1"])


@pytest.mark.case("V07")
def test_the_pages_never_give_torchrun_a_run_that_it_refuses() -> None:
    """The short name is for commands that this project reads itself."""
    pages = [train.EXAMPLE, *(p.read_text() for p in [Path("README.md"), *Path("docs").glob("*.md")])]
    lines = [line for page in pages for line in page.splitlines() if "torchrun --" in line and "tarflow train" in line]
    assert len(lines) >= 2
    assert [line for line in lines if "--run " in line] == []


@pytest.mark.case("N13")
def test_an_error_stands_alone(tiny_config: Path, tmp_path: Path, capsys) -> None:
    """Fifty lines of settings stood before it. In a dry run as well."""
    run = tmp_path / "run"
    for command in (["--run-dir", str(run), "data.train=nowhere"], ["--dry-run", "--world-size", "7"]):
        assert tarflow.cli.main(["train", str(tiny_config), *command]) == USAGE
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1, said.err


@pytest.mark.case("N13")
def test_a_start_shows_a_short_header_and_keeps_the_configuration_in_the_log(
    tiny_config: Path, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    assert tarflow.cli.main(["train", str(tiny_config), "--run-dir", str(run), "train.max_images=32"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 10
    assert "global_batch_size" not in said
    log = (run / "log.txt").read_text()
    assert "the configuration of this start:\ndata:" in log
    assert (run / "config.yaml").read_text().partition("\n")[2] in log


@pytest.mark.case("N13")
def test_deepspeeds_old_names_are_not_said_at_every_step_and_all_else_is(monkeypatch) -> None:
    import types
    import warnings

    import torch

    from tarflow.trainer.parallel.zero import import_deepspeed

    for name in ("deepspeed", "deepspeed.comm", "deepspeed.comm.torch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["deepspeed"], "comm", sys.modules["deepspeed.comm"], raising=False)
    monkeypatch.setattr(sys.modules["deepspeed.comm"], "torch", sys.modules["deepspeed.comm.torch"], raising=False)
    old = "`torch.distributed.reduce_scatter_tensor` is deprecated. Please use `torch.distributed.reduce_scatter_single` instead."
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        import_deepspeed(torch.device("cpu"))
        warnings.warn_explicit(old, FutureWarning, "c10d_logger.py", 83, module="torch.distributed.c10d_logger")
        warnings.warn_explicit(old, FutureWarning, "mine.py", 83, module="mine")
        warnings.warn_explicit("x is deprecated", FutureWarning, "x.py", 1, module="torch.distributed.c10d_logger")
    assert [str(w.message) for w in shown] == [old, "x is deprecated"]
