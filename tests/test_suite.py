"""What the suite says of itself is so."""

from pathlib import Path

from tests.conftest import LIST, SLOW_S, file_of, read_list

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
