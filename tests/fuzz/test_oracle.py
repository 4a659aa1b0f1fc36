"""The oracle catches readers that are broken on purpose, and lets sound ones pass."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tarflow import records
from tarflow.records import DamagedFileError, Record, load_record, save_record
from tests.fuzz.mutations import Damage, damage
from tests.fuzz.oracle import Clean, Outcome, Question, judge
from tests.fuzz.server import Workplace
from tests.fuzz.verbs import Verb

DECIDES, SHOWS = Verb("decides", prints=True), Verb("shows", shows=True, prints=True)


class State(Record):
    """What the readers of these tests read."""

    way_out = "restore it from a copy"
    step: int


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """A home of a record and of two files that no reader may touch."""
    home = tmp_path / "home"
    (home / "checkpoints" / "images-16").mkdir(parents=True)
    (home / "checkpoints" / "images-16" / "weights.distcp").write_bytes(b"weights")
    (home / "result.json").write_text('{"fd": 3.0, "time": 1}')
    save_record(home / "state.json", State(step=7))
    return Workplace(home, tmp_path / "place")


def sound() -> int:
    """A reader as they should be."""
    try:
        step = load_record(Path("state.json"), State).step
    except (DamagedFileError, OSError) as error:
        os.write(2, f"tarflow: error: {error}\n".encode())
        return 2
    print(f"step {step}")
    return 0


def outcome(
    place: Workplace, reader, old: str, new: str, verb: Verb = DECIDES, limit_s: float = 5, valid: bool = False
) -> Outcome:
    """What the oracle says of a reader when a part of the record is replaced."""
    before = {name: (place.home / name).read_bytes() for name in place.look}
    clean = Clean.of(place.run(sound), before)
    assert clean.ran.code == 0
    file = place.folder / "state.json"
    hurt = file.read_text().replace(old, new).encode()

    def write() -> None:
        file.write_bytes(hurt)

    ran = place.run(reader, limit_s, write)
    question = Question("state.json", ("state.json",), False, Damage("", valid), verb)
    return judge(question, ran, clean, before, hurt)[0]


@pytest.mark.parametrize(("old", "new"), [("7", "8"), ("step", "stop"), ("}", ""), ("{", "{" * 5000), ("7", "1e400")])
def test_a_reader_that_refuses_is_as_it_should_be(place, old, new):
    assert outcome(place, sound, old, new) is Outcome.REFUSED


def test_bytes_that_mean_nothing_change_nothing(place):
    assert outcome(place, sound, "\n}", "\n\n}") is Outcome.RIGHT


def test_a_reader_that_ignores_the_checksum_is_silent(place):
    def careless() -> int:
        records._checksum = lambda value: value and "00000000"  # type: ignore[assignment, return-value]
        Path("state.json").write_text(Path("state.json").read_text().split(records.SEAL)[0].rstrip(' ,\n"') + "}")
        return sound()

    def unsealed() -> int:
        records.opened = lambda value: {k: v for k, v in value.items() if k != records.SEAL}
        return sound()

    assert outcome(place, unsealed, "7", "8") is Outcome.SILENT
    assert outcome(place, careless, "7", "8") is Outcome.LOST  # it writes over the evidence, too


def test_a_file_that_may_say_something_else_may(place):
    def unsealed() -> int:
        records.opened = lambda value: {k: v for k, v in value.items() if k != records.SEAL}
        return sound()

    assert outcome(place, unsealed, "7", "8", valid=True) is Outcome.OTHER


def test_a_reader_that_removes_or_overwrites_has_lost_it(place):
    def removes() -> int:
        Path("checkpoints/images-16/weights.distcp").unlink()
        return sound()

    def overwrites() -> int:
        Path("result.json").write_text('{"fd": 4.0, "time": 1}')
        return sound()

    def touches() -> int:
        Path("result.json").write_text('{"fd": 3.0, "time": 2}')  # the same result at another time
        return sound()

    def starts_afresh() -> int:
        save_record(Path("state.json"), State(step=0))
        return sound()

    assert outcome(place, removes, "7", "8") is Outcome.LOST
    assert outcome(place, overwrites, "7", "8") is Outcome.LOST
    assert outcome(place, starts_afresh, "7", "8") is Outcome.LOST
    assert outcome(place, touches, "7", "8") is Outcome.REFUSED


def test_what_is_put_aside_whole_is_not_lost(place):
    def sets_aside() -> int:
        Path("checkpoints/images-16").rename("checkpoints/images-16.aside")
        return sound()

    assert outcome(place, sets_aside, "7", "8") is Outcome.REFUSED


def test_a_traceback_and_a_crash_are_caught(place):
    def raises() -> int:
        raise KeyError("step")

    def prints_one() -> int:
        os.write(2, b"Traceback (most recent call last):\n  somewhere\n")
        return 2

    def crashes() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    for reader in (raises, prints_one, crashes):
        assert outcome(place, reader, "7", "8") is Outcome.TRACEBACK, reader.__name__


def test_a_hang_is_ended_and_caught(place):
    def waits_for_ever() -> int:
        time.sleep(1000)
        return 0

    begin = time.monotonic()
    assert outcome(place, waits_for_ever, "7", "8", limit_s=0.2) is Outcome.HANG
    assert time.monotonic() - begin < 30


def test_a_refusal_must_name_the_file_in_words(place):
    def mumbles() -> int:
        os.write(2, b"tarflow: error: the file is damaged\n")
        return 2

    def leaks() -> int:
        os.write(2, b"tarflow: error: state.json: 'NoneType' object is not subscriptable\n")
        return 2

    def leaves() -> int:
        Path("new").mkdir()
        Path("new/result.json").write_text("{}")
        return sound()

    assert outcome(place, mumbles, "7", "8") is Outcome.UNCLEAR
    assert outcome(place, leaks, "7", "8") is Outcome.UNCLEAR
    assert outcome(place, leaves, "7", "8") is Outcome.LEFT


def test_what_only_shows_survives_and_says_so(place):
    def shows() -> int:
        try:
            print(f"step {load_record(Path('state.json'), State).step}")
        except DamagedFileError:
            print("step ? (state.json is damaged)")
        return 0

    def guesses() -> int:
        print("step -")
        return 0

    def raw() -> int:
        print("step \x1b]0;title\x07")
        return 0

    assert outcome(place, shows, "7", "8", SHOWS) is Outcome.SHOWN
    assert outcome(place, sound, "7", "8", SHOWS) is Outcome.FELL
    assert outcome(place, guesses, "7", "8", SHOWS) is Outcome.SILENT
    assert outcome(place, raw, "7", "8", SHOWS) is Outcome.RAW


def test_a_place_is_put_right_after_whatever_happened_in_it(place):
    def ravages() -> int:
        Path("state.json").unlink()
        Path("state.json").mkdir()
        Path("state.json/inside").write_text("x")
        Path("result.json").write_text("")
        for file in Path("checkpoints/images-16").iterdir():
            file.unlink()
        Path("checkpoints/images-16").rmdir()
        Path("checkpoints/images-16").write_text("a file")
        Path("link").symlink_to("nowhere")
        return 0

    before = {name: (place.folder / name).read_bytes() for name in place.look}
    place.run(ravages)
    assert {
        str(p.relative_to(place.folder)): p.read_bytes() for p in place.folder.rglob("*") if not p.is_dir()
    } == before


@pytest.mark.parametrize("form", ["json", "bytes"])
def test_mutations_are_seeded_and_do_something(tmp_path, form):
    seen = set()
    for number in range(200):
        twice = []
        for name in ("a", "b"):
            file, twin = tmp_path / name / "state.json", tmp_path / "twin.json"
            file.parent.mkdir(exist_ok=True)
            save_record(file, State(step=7))
            save_record(twin, State(step=8))
            before = file.read_bytes()
            done = damage(file, form, twin, tmp_path, random.Random(number))
            after = file.read_bytes() if file.is_file() and file.stat().st_size < 1 << 20 else None
            twice.append((done, after))
            assert after != before or done.text.endswith("rewritten") or "swapped" in done.text, done
            if file.is_dir() and not file.is_symlink():
                (file / "something").unlink()
                file.rmdir()
            else:
                file.unlink()
        assert twice[0] == twice[1]
        seen.add(twice[0][1])
    assert len(seen) > 60


def test_seals_are_kept_made_to_fit_or_taken_off(tmp_path):
    """Of damaged records the loader believes those that someone sealed again or unsealed, and no other."""
    believed = set()
    for number in range(400):
        file = tmp_path / "state.json"
        save_record(file, State(step=7))
        done = damage(file, "json", file, tmp_path, random.Random(number))
        if file.is_file() and not file.is_symlink() and "checksum" in done.text:
            try:
                assert load_record(file, State).step != 7 or "1e400" in done.text
                believed.add(done.text.rpartition("; ")[2])
            except DamagedFileError:
                pass
        elif file.is_file() and done.text.startswith("step") and "1e400" not in done.text:
            with pytest.raises(DamagedFileError):
                load_record(file, State)
        if file.is_dir():
            (file / "something").unlink()
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
    assert believed == {"the checksum made to fit", "the checksum taken off"}
