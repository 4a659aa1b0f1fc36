"""Which data a run goes on with: by fingerprint, by the one that earlier versions knew, or not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tarflow.files import crc32
from tarflow.trainer.config.files import build_config, config_text
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.saving.resume import check_resume

TREE = {
    "data": {"train": "sets/a"},
    "model": {
        "image_size": 8,
        "patch_size": 4,
        "channels": 16,
        "num_blocks": 2,
        "layers_per_block": 1,
        "head_channels": 8,
    },
    "train": {"global_batch_size": 4, "max_images": 8, "noise": "uniform"},
}


def resume(tmp_path: Path, stored: str, *arguments: Any) -> list[str]:
    """What is said when a checkpoint that holds `stored` is resumed on data of these fingerprints."""
    config = build_config(TREE, "test", [])
    (tmp_path / "config.yaml").write_text(config_text(config))
    files = {"config.yaml": {"crc32": crc32(tmp_path / "config.yaml")}}
    info = {"data": stored, "files": files}
    checkpoint: Any = SimpleNamespace(path=tmp_path, info=info, step=3, images_seen=12, name="step-00000003")
    lines: list[str] = []
    fingerprint, accept, *former = arguments
    check_resume(checkpoint, config, fingerprint, accept, lines.append, *former)
    return lines


@pytest.mark.case("V04")
def test_a_run_of_an_earlier_version_goes_on_with_data_indexed_anew(tmp_path: Path) -> None:
    assert resume(tmp_path, "contents", "contents", False, "places") == []
    (line,) = resume(tmp_path, "places", "contents", False, "places")
    assert "names, sizes and labels are those at 12 images; what the shards held was not recorded then" in line
    assert "places -> contents" in line


@pytest.mark.case("V04")
def test_other_data_are_refused_and_an_old_index_is_named_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(
        TrainerError, match=r"another one than at 12 images \(fingerprint other -> contents\); .*--accept-new"
    ):
        resume(tmp_path, "other", "contents", False, "places")
    with pytest.raises(
        TrainerError, match=r"an earlier version, .*`tarflow data index sets/a` may show.*--accept-new-data"
    ):
        resume(tmp_path, "contents", "places", False, None)
    (line,) = resume(tmp_path, "other", "contents", True, "places")
    assert line.startswith("changed: the data set")
