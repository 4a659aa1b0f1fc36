"""Numbers on the command line: of every verb, each is bounded before anything is done."""

import argparse
from pathlib import Path
from typing import Any

import pytest

import tarflow.cli
from tarflow.cli import BOUNDS, out_of_bounds
from tests.test_front_door import ALL, VERBS_ABOVE_OTHERS, command

HUGE = ("nan", "inf", "-inf", "1e400", "1e300", "-1e300", "9" * 400, "-" + "9" * 400, "-7")


def numeric(words: str) -> tuple[argparse.ArgumentParser, list[argparse.Action]]:
    parser = argparse.ArgumentParser(prog=words)
    command(words).add_arguments(parser)
    return parser, [action for action in parser._actions if action.type in (int, float) and not action.choices]


@pytest.mark.case("H10")
def test_no_number_of_any_verb_is_without_bounds() -> None:
    names, tried = set(), 0
    for words in set(ALL) - VERBS_ABOVE_OTHERS:
        parser, actions = numeric(words)
        for action in actions:
            names.add(action.dest)
            kind: Any = action.type
            for text in HUGE:
                try:
                    value = kind(text)
                except ValueError:  # argparse says so
                    continue
                if action.dest == "seed" and text == "-7":
                    continue
                wrong = out_of_bounds(parser, argparse.Namespace(**{action.dest: value}))
                assert wrong, (words, action.dest, text)
                assert action.option_strings[0] in wrong
                assert len(wrong) < 200
                tried += 1
            least, most = BOUNDS.get(action.dest, (0, 10**15))
            for value in (least, most):
                assert out_of_bounds(parser, argparse.Namespace(**{action.dest: kind(value)})) is None
    assert tried > 200
    assert set(BOUNDS) <= names | {"guidance", "denoise", "attn_temp"}, "a bound of an option that is gone"


@pytest.mark.parametrize(
    "words",
    [
        ("train", "c.yaml", "--ranks", "1000000"),
        ("train", "c.yaml", "--world-size", "-3", "--dry-run"),
        ("sample", "run", "--out", "x", "--guidance", "nan"),
        ("sample", "run", "--out", "x", "--columns", "999999999"),
        ("status", "run", "--watch", "--every", "-1"),
        ("status", "run", "--watch", "--every", "inf"),
        ("data", "index", "set", "--processes", "100000"),
    ],
    ids=" ".join,
)
@pytest.mark.case("H10")
def test_the_front_door_refuses_in_one_line(words: tuple[str, ...], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert tarflow.cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert "argument --" in shown.err
    assert list(tmp_path.iterdir()) == []
