"""The program for GPU machines runs whole, on the CPU, with a small model; it names what a CPU does not show."""

import json
import subprocess
from pathlib import Path

from benchmarks.gpu.__main__ import ONE, SEVERAL
from tests.helpers.warm import warm

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {
    "gathering": ["memory against the plan"],
    "environment": ["nvidia-smi"],
    "denoise_memory": ["bytes of the allocator"],
    "no_host_sync": ["set_sync_debug_mode"],
    "repeatable": ["code generation"],
    "decoding": ["bytes of the allocator"],
    "graphs": ["recording of graphs", "bytes of the allocator"],
    "rate": [
        "share of the peak rate", "bytes of the allocator", "memory against the plan", "times of kernels", "code generation",
    ],
}  # fmt: skip


def test_every_check_runs_on_the_cpu_and_meets_its_bars(tmp_path: Path) -> None:
    program = warm("benchmarks.gpu", "--tiny", "--check", "--json", tmp_path / "rows")
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["check"] for row in rows] == [check.__name__ for check in SEVERAL + ONE]
    assert not [row for row in rows if "ERROR" in row]
    assert {row["check"]: row["left out"] for row in rows if "left out" in row} == LEFT_OUT
    assert "MISSED" not in done.stdout
    assert done.stdout.count("met ") >= 15
