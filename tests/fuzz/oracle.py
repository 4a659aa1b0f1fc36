"""What came of a command beside a damaged file, held against what the same command does when nothing is damaged."""

import io
import json
import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import pyarrow
from pyarrow import parquet

from tests.fuzz.mutations import Damage
from tests.fuzz.server import BROKEN, Ran
from tests.fuzz.verbs import Verb


class Outcome(Enum):
    """The first five are as it should be, the others are faults."""

    RIGHT = "the same figures and files as without the damage"
    REFUSED = "one clear error that names the file; nothing written, nothing removed"
    SHOWN = "what is shown says what is damaged"
    NOTED = "other figures, and it says which file is damaged"
    OTHER = "other figures from a file that says something else, and may"
    TRACEBACK = "an exception or a signal ended it"
    HANG = "it did not end in time"
    SILENT = "a figure differs without a word"
    LOST = "a checkpoint, a result or a file of the user's was removed or overwritten"
    UNCLEAR = "it was refused, but the message does not say which file, or not in words"
    LEFT = "it was refused, and something was left that looks like a result"
    FELL = "it only shows, and showed nothing for one bad file"
    RAW = "control characters out of a file reached the terminal"


GOOD = (Outcome.RIGHT, Outcome.REFUSED, Outcome.SHOWN, Outcome.NOTED, Outcome.OTHER)
FAULTS = tuple(one for one in Outcome if one not in GOOD)
REFUSALS = (1, 2, 3, 4)  # exit codes that the verbs' help texts list

# What a command notes of itself on the way; nothing that anyone reads as a figure.
_PASSING = re.compile(
    r"(^|/)(log\.txt|\.lock|rank-\d+\.json|work\.json|fontlist[^/]*|\.private/.*)$|(^|/)\.private/|/pins/|/claims/|/tensorboard/"
)
_NEW_EACH_TIME = re.compile(r"/slurm/(jobs/|code-|config-)")  # named by their moment
# What anyone would take for a finished piece of work.
_RESULT = re.compile(
    r"\.(png|npz|safetensors|pth|html|svg|tar|parquet|distcp)$|(^|/)(result|sweep|sampling|run|data)\.json$|COMMITTED$|evals\.jsonl$"
)
_VOLATILE = {
    "time",
    "seconds",
    "total_s",
    "stall_s",
    "goodput/share",
    "goodput/useful_s",
    "goodput/held_s",
    "host",
    "pid",
    "created",
    "code",
    "date",
}
_IN_PASSING = [
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?"), "DATE"),
    (re.compile(r"\b\d+:\d\d(:\d\d)?\b|\b\d+(\.\d+)? ?(s|ms|min|h)\b( ago)?"), "TIME"),
    (re.compile(r"TIME TIME|TIMETIME"), "TIME"),
    (re.compile(r"\b\d+(\.\d+)? (img/s|images/s)"), "SPEED"),
    (re.compile(r"\bpid \d+"), "PID"),
    (re.compile(r" +"), " "),
]
_WORDS = re.compile(
    r"damaged|not readable|unreadable|cannot be read|not written by tarflow|left out|torn|no json|broken|unknown|another run",
    re.I,
)
_LEAKS = re.compile(
    r"\[Errno|object at 0x|NoneType|errors\.pydantic|KeyError|TypeError|ValueError|AttributeError|Traceback"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Clean:
    """What a command does in a sound home."""

    ran: Ran
    printed: str
    products: dict[str, Any]

    @classmethod
    def of(cls, ran: Ran, before: dict[str, bytes]) -> "Clean":
        return cls(ran, in_essence(ran.out), new_in(products(ran, before), before))


def products(ran: Ran, before: dict[str, bytes]) -> dict[str, Any]:
    """What a command has written, by value: path -> what is new in it. None: it is gone."""
    found: dict[str, Any] = {}
    for name, content in ran.changed.items():
        if _PASSING.search(name) or _NEW_EACH_TIME.search(name):
            continue
        old = before.get(name)
        if content is None:
            found[name] = None
        elif old and name.endswith(".jsonl") and content.startswith(old):
            found[name] = ("more", value_of(name, content[len(old) :].lstrip(b"\n")))
        else:
            found[name] = ("whole", value_of(name, content))
    return found


def value_of(name: str, content: bytes) -> Any:
    """A file's content without what no two runs of a command have in common."""
    if name.endswith((".jsonl", ".json", "COMMITTED")):
        rows = []
        for text in (
            content.decode(errors="replace").splitlines() if name.endswith("l") else [content.decode(errors="replace")]
        ):
            try:
                rows.append(_lasting(json.loads(text)))
            except (ValueError, RecursionError):
                rows.append(text)
        return rows
    if name.endswith(".parquet"):
        return _rows(content)
    if name.endswith((".html", ".md", ".yaml", ".svg", ".txt")):
        return in_essence(content.decode(errors="replace"))
    return content


def _rows(content: bytes) -> Any:
    """A table without the times of the files that it speaks of."""
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (OSError, ValueError, pyarrow.ArrowException):
        return content
    return table.schema.metadata, {
        name: table[name].to_pylist() for name in table.column_names if name != "modified_ns"
    }


def _lasting(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            k: _lasting(v)
            for k, v in tree.items()
            if k not in _VOLATILE and not k.startswith(("throughput/", "memory/", "time/")) and k != "checksum"
        }
    return [_lasting(item) for item in tree] if isinstance(tree, list) else tree


def in_essence(text: str) -> str:
    """A text without times and speeds."""
    for pattern, word in _IN_PASSING:
        text = pattern.sub(word, text)
    return text


@dataclass(frozen=True)
class Question:
    """A case: which file was damaged and how, under which verb."""

    path: str  # of the damaged file in the home
    names: tuple[str, ...]  # one of which a message must hold
    own_words: bool  # the user's own file, which may say anything
    done: Damage
    verb: Verb


def judge(case: Question, ran: Ran, clean: Clean, sound: dict[str, bytes], hurt: bytes) -> tuple[Outcome, str]:
    """The outcome, and what it is seen by. `sound`: the files of the home; `hurt`: the damaged one's content."""
    said = ran.out + ran.err
    if ran.code is None:
        return Outcome.HANG, f"no end after {ran.seconds:.0f} s"
    if ran.code < 0 or ran.code == BROKEN or "Traceback (most recent call last)" in said:
        return Outcome.TRACEBACK, f"exit {ran.code}: {_last_line(ran.err or ran.out)}"
    made = new_in(products(ran, {**sound, case.path: hurt}), sound)
    for name in made:  # what was only moved with its folder
        if ran.changed[name] == hurt and name in clean.ran.changed and clean.ran.changed[name] == sound[case.path]:
            made[name] = clean.products[name]
    if lost := _lost(case, ran, clean, sound):
        return Outcome.LOST, f"exit {ran.code}: {lost}"
    if found := _CONTROL.search(said.replace("\r", "")):
        return Outcome.RAW, f"{found[0]!r} is printed"
    if case.done.place:  # what would have been written into the file
        made.pop(case.path, None)
        clean = replace(clean, products={name: value for name, value in clean.products.items() if name != case.path})
    same = made == clean.products and (not case.verb.prints or in_essence(ran.out) == clean.printed)
    if ran.code == 0 and same:
        return Outcome.RIGHT, ""
    if ran.code != 0:
        return _refused(case, ran, clean, made, sound)
    return _differs(case, ran, clean, made)


def _refused(
    case: Question, ran: Ran, clean: Clean, made: dict[str, Any], sound: dict[str, bytes]
) -> tuple[Outcome, str]:
    message = ran.err.strip() or ran.out.strip()
    gone_or_moved = {None, *sound.values()}
    for name, value in made.items():
        if _RESULT.search(name) and clean.products.get(name, "") != value and ran.changed[name] not in gone_or_moved:
            return Outcome.LEFT, f"exit {ran.code} ({_last_line(message)}), but there is {name}"
    if ran.code not in REFUSALS:
        return Outcome.UNCLEAR, f"exit {ran.code} is in no help text"
    said = ran.out + ran.err
    if case.verb.shows:
        return Outcome.FELL, f"exit {ran.code}: {_last_line(message)}"
    if not any(name in said for name in case.names):
        return Outcome.UNCLEAR, f"no word of {case.names[0]}: {_last_line(message)}"
    if leak := _LEAKS.search(said):
        return Outcome.UNCLEAR, f"{leak[0]!r} in the message: {_last_line(message)}"
    if said.count(": error: ") > 1:
        return Outcome.UNCLEAR, f"several errors: {message}"
    return Outcome.REFUSED, _last_line(message)


def _differs(case: Question, ran: Ran, clean: Clean, made: dict[str, Any]) -> tuple[Outcome, str]:
    """It went through, with other figures."""
    pages = "".join(_text(content) for name, content in ran.changed.items() if name.endswith(".html"))
    known = set(in_essence(clean.ran.out + clean.ran.err).splitlines())
    new = "\n".join(line for line in in_essence(ran.out + ran.err).splitlines() if line not in known) + pages
    what = next(
        (name for name in {**made, **clean.products} if made.get(name, "") != clean.products.get(name, "")),
        "what it prints",
    )
    if case.verb.shows:
        if _WORDS.search(new) or any(name in new for name in case.names):
            return Outcome.SHOWN, ""
    elif any(name in new for name in case.names) or (case.verb.prints and _WORDS.search(new)):
        return Outcome.NOTED, f"{what} differs: {_last_line(new)}"
    if case.own_words or case.done.valid:
        return Outcome.OTHER, ""
    return Outcome.SILENT, f"{what} differs: {_difference(made.get(what), clean.products.get(what), ran, clean)}"


def _lost(case: Question, ran: Ran, clean: Clean, sound: dict[str, bytes]) -> str:
    """A file that was there and is not any more, while the command leaves it alone when nothing is damaged."""
    for name, content in ran.changed.items():
        if name not in sound or _PASSING.search(name) or name in clean.ran.changed:
            continue
        if sound[name] in ran.changed.values() or _aside(name, ran):
            continue
        if content is None:
            return f"{name} is gone"
        if not content.startswith(sound[name]) and value_of(name, content) != value_of(name, sound[name]):
            return f"{name} is overwritten"
    return ""


def _aside(name: str, ran: Ran) -> bool:
    """Whether it was put aside whole, under a name that says so."""
    base = name.rpartition("/")[2]
    return any(content is not None and other != name and other.endswith(base) and re.search(r"aside|damaged|superseded|before", other)
               for other, content in ran.changed.items())  # fmt: skip


def new_in(made: dict[str, Any], sound: dict[str, bytes]) -> dict[str, Any]:
    """Products without the files that were only written again, or are again what they were before the damage."""
    new = {}
    for name, value in made.items():
        old = value_of(name, sound[name]) if name in sound else None
        if value is not None and value == ("whole", old):
            continue
        if value is not None and value[0] == "more" and old:  # a row that was damaged, again
            value = "more", [row for row in value[1] if row not in old]
        new[name] = value
    return new


def _text(content: bytes | None) -> str:
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", (content or b"").decode(errors="replace"))


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(nothing)"


def _difference(made: Any, clean: Any, ran: Ran, sound: Clean) -> str:
    """Where two values part."""
    a, b = (str(made), str(clean)) if made != clean else (in_essence(ran.out), sound.printed)
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return f"{a[max(0, at - 20) : at + 60]!r} was {b[max(0, at - 20) : at + 60]!r}"
