"""A random history of one run with real ranks: other batch sizes, worlds, backends and retention settings, kills in saves."""

import random
from pathlib import Path

import pytest

from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.marker import damage
from tarflow.trainer.resilience.exit_codes import FINISHED

POINTS = ("save.begin", "save.written", "save.renamed", "save.marked", "save.pointed")
WORLDS = ((1, "ddp"), (2, "ddp"), (2, "fsdp2"))
LIVES = 4


@pytest.mark.case("V01")
def test_a_random_history_of_real_ranks_ends_with_all_its_images(start, tiny_config, tmp_path: Path) -> None:
    dice, run, codes = random.Random(0), tmp_path / "runs" / "run", []
    there: list[int] = []
    for life in range(LIVES):
        ranks, backend = dice.choice(WORLDS)
        batch, keep = dice.choice((4, 6, 10, 16)), dice.choice((-1, 2))
        end = max(there, default=0) + 6 * batch
        last = life == LIVES - 1
        fault = "" if last else f"{dice.choice(POINTS)}@{dice.choice((1, 2))}/0=kill"
        settings = (
            f"train.global_batch_size={batch}", f"train.max_images={end}", f"checkpoint.every_images={2 * batch}",
            f"checkpoint.keep_latest={keep}", f"parallel.backend={backend}", "log.every_steps=1",
        )  # fmt: skip
        codes = start(tiny_config, run, *settings, ranks=ranks, fault=fault)["codes"]
        assert FINISHED not in codes or fault == ""
        found = committed(run)
        assert [damage(c) for c in found] == [None] * len(found)
        now = [c.images_seen for c in found]
        gone = set(there) - set(now)
        assert not gone or (keep == 2 and max(gone) < min(now[-2:]))  # only what two newer ones made superfluous
        assert max(now, default=0) >= max(there, default=0)
        steps = [c.step for c in found]
        assert steps == sorted(set(steps))
        there = now
    assert codes == [FINISHED] * ranks
    assert find(run).images_seen == end
    assert (run / "checkpoints" / "latest").read_text().strip() == f"images-{end:012d}"
