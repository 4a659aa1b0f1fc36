"""The program for GPU machines runs: its ways are gone on the CPU, with a small model."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ["denoise_memory", "no_host_sync", "save_is_a_snapshot", "guarded_adamw", "numbers", "repeatable", "decoding"]


def test_every_check_but_the_slow_ones_runs_on_the_cpu_and_meets_its_bars(tmp_path: Path) -> None:
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--tiny", "--check", "--only", *CHECKS]
    done = subprocess.run(
        [*program, "--json", str(tmp_path / "rows")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["check"] for row in rows] == CHECKS
    assert not [row for row in rows if "ERROR" in row]
    assert "MISSED" not in done.stdout
    assert done.stdout.count("met ") >= 5
