"""Kind x verb x case -> outcome. The same seed makes the same cases."""

import multiprocessing
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

from tests.fuzz import home
from tests.fuzz.kinds import KINDS
from tests.fuzz.mutations import Damage, damage
from tests.fuzz.oracle import FAULTS, Clean, Outcome, Question, judge
from tests.fuzz.server import HEAVY, MEMORY, Ran, Workplace, load
from tests.fuzz.verbs import VERBS


@dataclass(frozen=True)
class Row:
    """What came of a case."""

    kind: str
    verb: str
    number: int
    path: str
    damage: str
    outcome: Outcome
    seen: str
    seconds: float

    @property
    def fault(self) -> bool:
        return self.outcome in FAULTS

    def __str__(self) -> str:
        return f"{self.outcome.name}: {self.path}: {self.damage}: {self.seen}"


def prepare(folder: Path) -> None:
    """Make two homes, the second for swaps. This process loads nothing of what they need: its forks stay small."""
    os.environ["PATH"] = f"{folder / 'home' / 'bin'}:{os.environ['PATH']}"
    maker = multiprocessing.get_context("fork").Process(target=_make_homes, args=(folder,))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError("the homes could not be made: see above")


def _make_homes(folder: Path) -> None:
    for seed, name in enumerate(("home", "twin")):
        home.make(folder / name, seed)


class Fuzzer:
    """One process's copy of the home, and what each verb does in it when nothing is damaged."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.home, self.twin, self.seed = folder / "home", folder / "twin", seed
        self.place = Workplace(self.home, folder / f"at-{os.getpid()}")
        self.sound = {name: (self.home / name).read_bytes() for name in self.place.look}
        self._clean: dict[str, Clean] = {}

    def clean(self, verb: str) -> Clean:
        """Twice, so that what differs by itself is not taken for the damage's doing."""
        if verb not in self._clean:
            if not VERBS[verb].light:
                load(HEAVY)
            first = self._run(verb, memory=None)
            load(first.modules)
            again = self._run(verb)
            one, two = Clean.of(first, self.sound), Clean.of(again, self.sound)
            if first.code != 0:
                raise RuntimeError(
                    f"`{VERBS[verb].call}` ended with {first.code} in a sound home: {first.err}{first.out}"
                )
            if one.products != two.products or (VERBS[verb].prints and one.printed != two.printed):
                differing = [name for name in one.products if one.products[name] != two.products.get(name)]
                raise RuntimeError(
                    f"`{VERBS[verb].call}` does not do the same twice: {differing or [one.printed, two.printed]}"
                )
            self._clean[verb] = one
        return self._clean[verb]

    def case(self, kind: str, verb: str, number: int) -> tuple[Row, Ran, bytes]:
        """Run one case; what came of it, the command's own words, and the damaged file."""
        clean, about = self.clean(verb), KINDS[kind]
        rng = random.Random(zlib.crc32(f"{self.seed} {kind} {number}".encode()))
        files, twins = about.files(self.home), about.files(self.twin)
        place = rng.randrange(len(files))
        path, twin = files[place], self.twin / twins[min(place, len(twins) - 1)]
        file = self.place.folder / path
        done: list[tuple[Damage, bytes]] = []

        def hurt() -> None:
            what = damage(file, about.form, twin, self.place.folder, rng)
            if about.any_sound and what.twin:
                what = replace(what, valid=True)
            content = file.read_bytes() if file.is_file() and file.stat().st_size < 1 << 24 else b""
            done.append((what, content))

        ran = self._run(verb, hurt)
        what, content = done[0]
        question = Question(path, about.called(path), about.own_words, what, VERBS[verb])
        outcome, seen = judge(question, ran, clean, self.sound, content)
        return Row(kind, verb, number, path, what.text, outcome, seen, ran.seconds), ran, content

    def _run(self, verb: str, hurt: Callable[[], None] | None = None, memory: int | None = MEMORY) -> Ran:
        about = VERBS[verb]
        return self.place.run(
            about.action, about.limit_s, hurt, home.set_up_light if about.light else home.set_up, memory
        )


_fuzzer: Fuzzer


def _begin(folder: Path, seed: int) -> None:
    global _fuzzer
    _fuzzer = Fuzzer(folder, seed)


def _work(case: tuple[str, str, int]) -> Row:
    return _fuzzer.case(*case)[0]


def cases(
    number_of_each: int, kinds: Sequence[str] = (), verbs: Sequence[str] = (), each: bool = False
) -> Iterator[tuple[str, str, int]]:
    """So many cases of each kind, dealt out among its verbs, or (`each`) as many under each of them."""
    for name, kind in KINDS.items():
        mine = [verb for verb in kind.verbs if not verbs or verb in verbs]
        if (kinds and name not in kinds) or not mine:
            continue
        dealt = _dealt(mine)
        for number in range(number_of_each):
            for verb in mine if each else [next(dealt)]:
                yield name, verb, number


def _dealt(verbs: Sequence[str]) -> Iterator[str]:
    """Verbs in turn without an end; slow ones in each third round."""
    quick = [verb for verb in verbs if not VERBS[verb].slow] or verbs
    for number in count():
        yield from verbs if number % 3 == 0 else quick


def campaign(folder: Path, todo: Sequence[tuple[str, str, int]], seed: int = 0, processes: int = 2) -> Iterator[Row]:
    """The cases' rows as they come; those of light verbs first, from processes that have not loaded torch yet."""
    todo = sorted(todo, key=lambda case: not VERBS[case[1]].light)
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, partial(_begin, folder, seed)) as pool:
        yield from pool.imap_unordered(_work, todo, chunksize=4)
