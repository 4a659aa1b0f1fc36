"""Every kind of file that the product reads, damaged in every way, under every verb that reads it (`tests/fuzz`).

    python -m benchmarks.fuzz --cases 300 --check
    python -m benchmarks.fuzz --only run.json --verb train --show
    python -m benchmarks.fuzz --replay run.json train 17

A case is right when the figures are the same as without the damage, or when there is one clear error that names the file.
"""

import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Bar, finish, parse_args
from tests.fuzz.campaign import Fuzzer, Row, campaign, cases, prepare
from tests.fuzz.oracle import FAULTS, GOOD, Outcome


def main() -> int:
    args = parse_args(
        __doc__ or "",
        (
            ("--cases", {"type": int, "default": 300, "metavar": "N", "help": "of each kind of file"}),
            (
                "--each",
                {"action": "store_true", "help": "N under each verb, rather than N dealt out among a kind's verbs"},
            ),
            ("--only", {"action": "append", "default": [], "metavar": "KIND"}),
            ("--verb", {"action": "append", "default": [], "metavar": "VERB"}),
            ("--seed", {"type": int, "default": 0}),
            ("--processes", {"type": int, "default": 2, "metavar": "N"}),
            ("--show", {"action": "store_true", "help": "print every faulty case"}),
            ("--replay", {"nargs": 3, "metavar": ("KIND", "VERB", "N"), "help": "run one case, print all of it"}),
        ),
    )
    folder = Path(tempfile.mkdtemp(prefix="tarflow-fuzz-"))
    begin = time.monotonic()
    try:
        prepare(folder)
        if args.replay:
            return replay(folder, args.seed, *args.replay)
        todo = list(cases(10 if args.quick else args.cases, args.only, args.verb, each=args.each))
        rows = []
        for row in campaign(folder, todo, args.seed, args.processes):
            rows.append(row)
            if args.show and row.fault:
                print(f"--replay {row.kind!r} {row.verb!r} {row.number}  {row}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    bars = [Bar(f"cases that ended in {fault.name} ({fault.value})", count(rows, fault), at_most=0) for fault in FAULTS]
    print(f"{len(rows)} cases in {time.monotonic() - begin:.0f} s, seed {args.seed}")
    return finish(args, table(rows), ("file", "verb", *(one.name for one in Outcome)), bars)


def count(rows: Sequence[Row], outcome: Outcome) -> int:
    return sum(row.outcome is outcome for row in rows)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each kind and verb, in the order of their lists."""
    counts = Counter((row.kind, row.verb, row.outcome) for row in rows)
    pairs = dict.fromkeys((row.kind, row.verb) for row in sorted(rows, key=lambda row: (row.kind, row.verb)))
    return [[kind, verb, *(str(counts[kind, verb, one] or ".") for one in (*GOOD, *FAULTS))] for kind, verb in pairs]


def replay(folder: Path, seed: int, kind: str, verb: str, number: str) -> int:
    row, ran, content = Fuzzer(folder, seed).case(kind, verb, int(number))
    print(f"{row}\n--- exit code {ran.code}, {ran.seconds:.2f} s; output:\n{ran.out}\n--- errors:\n{ran.err}")
    print(
        "--- written or removed:",
        *(f"{name}{' (gone)' * (after is None)}" for name, after in ran.changed.items()),
        sep="\n  ",
    )
    print(f"--- the damaged file, {len(content)} bytes:\n{content[:2000]!r}")
    return int(row.fault)


if __name__ == "__main__":
    sys.exit(main())
