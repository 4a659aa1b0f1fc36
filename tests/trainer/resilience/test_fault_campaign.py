"""Deaths of every kind in one run, and the same bits in the end: `benchmarks.fault_campaign`, short."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.effort import draws

ROOT = Path(__file__).resolve().parents[3]
KILLS = draws(20)


def test_fault_campaign_ends_with_the_same_bits(tmp_path: Path) -> None:
    """20 deaths in CI, 5 elsewhere; the whole 200 are run by hand."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fault_campaign", "--kills", str(KILLS), "--check", "--json", str(report)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    bars = {bar["name"]: bar for bar in json.loads(report.read_text())["bars"]}
    assert all(bar["met"] for bar in bars.values())
    assert bars["deaths"]["value"] == KILLS
    assert bars["tensors that differ from the uninterrupted run"]["value"] == 0
    assert bars["samples not trained exactly once per epoch"]["value"] == 0
    assert bars["pointer ahead of the data"]["value"] == 0
