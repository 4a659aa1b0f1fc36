"""Some damaged files of each kind, dealt out among the verbs that read them: no faults. Twenty of each in CI; the long run is
`python -m benchmarks.fuzz --cases 300 --check`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.verbs import VERBS
from tests.helpers.effort import draws

ROOT = Path(__file__).resolve().parents[2]
CASES = draws(20)  # of each kind


@pytest.fixture(scope="module")
def faults() -> list[str]:
    """Lines of the faulty cases; how to run each again stands in it."""
    words = ["-m", "benchmarks.fuzz", "--cases", str(CASES), "--processes", "1", "--show", "--check"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("--replay")]
    assert done.returncode == bool(lines), done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{CASES * len(KINDS)} cases in " in done.stdout
    return lines


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_a_file_is_right_or_refused(faults, kind):
    assert [line for line in faults if line.startswith(f"--replay {kind!r} ")] == []


def test_every_verb_reads_something():
    assert {verb for kind in KINDS.values() for verb in kind.verbs} == set(VERBS)
