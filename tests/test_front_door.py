"""Every verb follows the one pattern of `tarflow/cli.py`, and the front door finds all of them."""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import tarflow.cli

ROOT = Path(__file__).resolve().parent.parent


def verbs(table: dict[str, tuple[str, str]], *above: str) -> Iterator[tuple[str, str]]:
    """(words, module) of every verb, those below another one included; the one above comes first."""
    for name, (module, _) in table.items():
        words = (*above, name)
        yield " ".join(words), module
        yield from verbs(getattr(importlib.import_module(module), "VERBS", {}), *words)


ALL = dict(verbs(tarflow.cli.VERBS))
VERBS_ABOVE_OTHERS = {"data", "checkpoint"}


def command(words: str) -> ModuleType:
    return importlib.import_module(ALL[words])


def test_every_file_of_a_commands_folder_is_a_verb_or_the_options_that_verbs_share() -> None:
    files = {
        f"tarflow.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for path in ROOT.glob("*/commands/*.py")
        if path.stem not in ("__init__", "options")
    }
    assert files == set(ALL.values())


@pytest.mark.parametrize("words", ALL)
def test_a_verb_has_an_example_of_itself_its_options_and_a_run_function(words: str) -> None:
    module = command(words)
    assert module.EXAMPLE.startswith("example")
    assert f"\n  tarflow {words} " in module.EXAMPLE
    assert module.EXAMPLE.endswith("\n")
    assert hasattr(module, "VERBS") == (words in VERBS_ABOVE_OTHERS)
    if words not in VERBS_ABOVE_OTHERS:
        parser = argparse.ArgumentParser(prog=words)
        module.add_arguments(parser)
        assert len(parser.format_usage()) > len(f"usage: {words} [-h]\n")
        assert callable(module.run)


def test_options_of_all_verbs_load_nothing_heavy() -> None:
    """Of the top level and of the verbs below `data` and `checkpoint`, in one interpreter."""
    program = (
        "import argparse, importlib, sys, tarflow.cli\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module(name)\n"
        "    if hasattr(module, 'add_arguments'): module.add_arguments(argparse.ArgumentParser())\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'pydantic', 'yaml', 'matplotlib', 'PIL', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *ALL.values()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", ["data prepare", "checkpoint export"])
def test_a_verb_below_a_verb_has_its_own_help(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tarflow.cli.main([*words.split(), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: tarflow {words} ")
    assert command(words).EXAMPLE in shown


@pytest.mark.parametrize("words", ["data", "checkpoint"])
def test_help_of_a_verb_above_others_lists_them(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tarflow.cli.main([words, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name, (_, summary) in command(words).VERBS.items():
        assert f"    {name} " in shown
        assert summary.split()[0] in shown


@pytest.mark.parametrize("verb", ["train", "submit"])
@pytest.mark.parametrize("option", ["--run-dir", "--run"])
def test_the_run_directory_has_one_name_and_an_alias(verb: str, option: str) -> None:
    args = tarflow.cli.parse([verb, "c.yaml", option, "runs/a", "optim.lr=1"])
    assert args.run == Path("runs/a")
    assert args.overrides == ["optim.lr=1"]
    assert " --run " not in command(verb).EXAMPLE


def test_torchrun_passes_run_dir_on() -> None:
    """Its parser completes abbreviations of its own options, also behind `-m tarflow`: `--run` never arrives."""
    from torch.distributed.run import get_args_parser

    words = ["train", "c.yaml", "--run-dir", "runs/a", "--accept-new-data", "--init-from", "w.safetensors"]
    args = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", "tarflow", *words])
    assert args.training_script_args == words
