"""One of 1,024 ranks on this machine: the plan of the largest model against the cost model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.config import TarFlowConfig
from models.cost import largest_piece, parameters
from models.flow import TarFlow

ROOT = Path(__file__).resolve().parents[2]


def test_one_of_1024_ranks_of_the_largest_model_holds_what_the_cost_model_says(tmp_path: Path) -> None:
    """In a process of its own: the fake process group would be this one's. A host sync in the step would fail it, too."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fake_ranks", "--quick", "--check", "--json", str(tmp_path / "out.json")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = {row[1]: row[2:4] for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows.keys() == {"weights", "gradients", "optimizer", "averages", "activations"}
    for kind, (allocated, expected) in rows.items():
        assert allocated == pytest.approx(expected, rel=0.1), kind
    assert rows["weights"][0] * 2**20 * 8 / 4 > 1.2e9  # eight pieces of 1.3 billion numbers


@pytest.mark.parametrize("pieces", [1, 3, 8, 1000])
def test_largest_piece_counts_rows_as_torch_cuts_them(pieces: int) -> None:
    shape = TarFlowConfig(image_size=12, patch_size=3, channels=128, num_blocks=2, layers_per_block=1, num_classes=7)
    with torch.device("meta"):
        whole = list(TarFlow(shape).parameters())
    assert largest_piece(shape, pieces) == sum(p.chunk(pieces)[0].numel() for p in whole)
    assert largest_piece(shape, 1) == parameters(shape)
    assert largest_piece(shape, pieces) >= parameters(shape) / pieces
