"""What a stranger wrote is shown by a terminal, and not obeyed."""

import re

import pytest

from tarflow.terminal import message, plain, plain_lines

OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tabby cat", "tabby cat"),
        ("Käse 猫 😀", "Käse 猫 😀"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J\x90q\x9c", r"\x9b2J\x90q\x9c"),
        ("gpj\u202eexe\u2066", r"gpj\u202eexe\u2066"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("a\u2028b\u2029c\x85d\x0be", r"a\u2028b\u2029c\x85d\x0be"),
        ("\udcff", r"\udcff"),
        ("[bold]not markup[/bold]", "[bold]not markup[/bold]"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
@pytest.mark.case("H11")
def test_one_line_in_which_everything_can_be_seen(text: str, shown: str) -> None:
    assert plain(text) == shown
    shown.encode("utf-8")


@pytest.mark.case("H11")
def test_every_character_is_shown_or_escaped() -> None:
    for start in range(0, 0x110000, 256):
        shown = plain("".join(map(chr, range(start, start + 256))), limit=10**4)
        assert shown.isprintable()
        assert not OBEYED.search(shown), hex(start)


@pytest.mark.case("H11")
def test_its_length_is_bounded_after_the_escapes() -> None:
    assert plain("x" * 200) == "x" * 200
    assert plain("x" * 201) == "x" * 199 + "…"
    assert len(plain("\x1b" * 10**6)) == 200
    assert plain("abcdef", limit=3) == "ab…"
    assert len(plain_lines("\n" * 10**6)) == 100_001


@pytest.mark.case("H11")
def test_lines_stay_lines_and_none_is_written_over() -> None:
    assert plain_lines("a\tb\nc\r\nd") == "a\tb\nc\nd"
    assert plain_lines(" 10%\r 20%\x1b[K") == " 10%\n 20%\\x1b[K"
    assert plain_lines("a\u2028b\x0cc") == "a\\u2028b\\x0cc"


@pytest.mark.case("H11")
def test_a_later_line_of_a_message_begins_with_white_space() -> None:
    assert message("bad name 'x\ntarflow: all is well\n\n  so'") == "bad name 'x\n  tarflow: all is well\n\n  so'"
