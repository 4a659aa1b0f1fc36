"""What rank 0 of 128 handles at a save and at a resume: `benchmarks.saves_at_scale`, short. Counts only, no times."""

import json
import subprocess
from pathlib import Path

from tests.helpers.warm import warm


def test_the_second_save_of_128_ranks_sends_no_item_and_four_ranks_read_a_quarter_each(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = warm("benchmarks.saves_at_scale", "--quick", "--json", report)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr[-3000:]
    counted = [bar for bar in json.loads(report.read_text())["bars"] if "unpickler" not in bar["name"]]
    assert len(counted) == 4
    assert [bar["name"] for bar in counted if not bar["met"]] == []
