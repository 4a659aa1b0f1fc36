"""A resume reads a checkpoint once, on all ranks together, and all of them learn what was found."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from tarflow.files import crc32
from tarflow.trainer.checkpoint import commit as ckpt
from tarflow.trainer.checkpoint import marker
from tarflow.trainer.checkpoint.find import committed, newest_intact
from tarflow.trainer.checkpoint.tensors import write_tensors
from tarflow.trainer.config.files import load_config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel.world import process_group, world_from_env
from tarflow.trainer.resilience.exit_codes import FINISHED
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.together import decide_together
from tarflow.trainer.train import train
from tests.helpers.ranks import launch_ranks

FILES = 12


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, as if a dozen ranks had written them."""
    create_run(tmp_path / "run")
    for step in (1, 2):
        folder = ckpt.temporary_dir(tmp_path / "run", step * 8)
        write_tensors(folder, {"model/w": torch.ones(3)})
        (folder / "config.yaml").write_text("")
        for number in range(FILES):
            (folder / f"__{number + 1}_0.distcp").write_bytes(bytes([number]) * 10_000)
        ckpt.commit(tmp_path / "run", folder, step, step * 8, {"data": "f00"})
    return tmp_path / "run"


def found_by_a_rank(run: Path, broken: str) -> tuple[Any, list[str], int]:
    """The name of the checkpoint or an error, what rank 0 was warned of, and the bytes that this rank has read."""
    world, read, warned = world_from_env(), [0], list[str]()

    def reading(path: Path) -> int:
        if path.name == broken:
            raise OSError(errno.EIO, "the disk is gone", str(path))
        read[0] += path.stat().st_size
        return crc32(path)

    marker.crc32 = reading  # in this process, which ends here
    with process_group(world, torch.device("cpu"), 60):
        try:
            checkpoint = decide_together(world, lambda look: newest_intact(run, warned.append, look))
            return checkpoint.name if checkpoint else None, warned, read[0]
        except (TrainerError, OSError) as error:
            return str(error), warned, read[0]


def test_each_rank_reads_its_share_and_all_learn_what_was_found(run: Path) -> None:
    whole = committed(run)[-1].num_bytes
    values = launch_ranks(found_by_a_rank, 4, run, "").values
    assert {name for name, _, _ in values} == {"images-000000000016"}
    read = [count for _, _, count in values]
    assert sum(read) == whole  # every file once
    assert max(read) - min(read) <= 10_000


@pytest.mark.parametrize("number", [1, 5, 12])
def test_a_damaged_file_is_found_whoever_reads_it(run: Path, number: int) -> None:
    file = committed(run)[-1].path / f"__{number}_0.distcp"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    values = launch_ranks(found_by_a_rank, 3, run, "").values
    assert {name for name, _, _ in values} == {"images-000000000008"}
    assert f"the checksum of its file {file.name} is wrong" in values[0][1][0]


def test_a_list_of_tensors_that_lies_is_found(run: Path) -> None:
    newest = committed(run)[-1]
    assert marker.damage(newest, 0, 2) is None
    assert marker.damage(newest, 1, 2) is None
    sizes = {name: 1 if name == "__0_0.distcp" else size for name, size in newest.sizes.items()}
    lies = marker.Checkpoint(newest.path, newest.step, newest.images_seen, newest.info | {
        "files": {name: facts | {"size": sizes[name]} for name, facts in newest.info["files"].items()}
    })  # fmt: skip
    assert marker.damage(lies, 0, 2) is None
    assert "its place is not within the 1 bytes" in str(marker.damage(lies, 1, 2))


def test_a_disk_that_fails_one_rank_is_an_error_on_all(run: Path) -> None:
    values = launch_ranks(found_by_a_rank, 3, run, "__7_0.distcp").values
    assert {"__7_0.distcp" in text and "the disk is gone" in text for text, _, _ in values} == {True}


def test_an_error_of_the_decision_is_raised_on_all(tmp_path: Path) -> None:
    create_run(tmp_path / "run")
    folder = tmp_path / "run/checkpoints/images-000000000008"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").write_text("{}")
    values = launch_ranks(found_by_a_rank, 2, tmp_path / "run", "").values
    assert {"COMMITTED marker is damaged" in text for text, _, _ in values} == {True}


def resumed(config: Path, run: Path, images: int) -> tuple[int, int]:
    """Exit code, and the bytes that this rank has read to check the checkpoint."""
    read = [0]

    def reading(path: Path) -> int:
        read[0] += path.stat().st_size if path.suffix == ".distcp" else 0
        return crc32(path)

    marker.crc32 = reading
    return train(load_config(config, [f"train.max_images={images}"]), run), read[0]


def test_training_resumes_so(tiny_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert launch_ranks(resumed, 2, tiny_config, run, 32).values == [(FINISHED, 0)] * 2
    whole = sum(size for name, size in committed(run)[-1].sizes.items() if name.endswith(".distcp"))
    (first, one), (second, other) = launch_ranks(resumed, 2, tiny_config, run, 64).values
    assert first == second == FINISHED
    assert one + other == whole
    assert 0 < one < 0.7 * whole
