"""What is known of a data set before training, here and behind an address."""

import json
from pathlib import Path

import numpy as np
import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.survey import survey
from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.data_pipeline.prepare.write import Options, prepare


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(40) % 2)
    source = open_source(tmp_path / "a.npz")
    source.classes = ["no", "yes"]
    prepare(source, tmp_path / "set", Options(size=6, shard_size=16))
    return tmp_path / "set"


def test_a_survey_says_what_there_is(pictures: Path) -> None:
    seen = survey(DataSettings.of(pictures))
    assert str(seen) == "40 images, 6 x 6, RGB, 2 classes"
    assert len(seen.looks) == 16
    described = json.loads(json.dumps(seen.describe()))
    assert described == {
        "place": str(pictures), "fingerprint": seen.facts.fingerprint, "num_samples": 40, "classes": ["no", "yes"],
        "num_classes": 2, "image_size": [6, 6], "channels": 3, "crop": "centre", "unchecked": None,
    }  # fmt: skip


def test_a_survey_writes_nothing_and_leaves_the_cache_alone(pictures: Path, tmp_path: Path) -> None:
    address = f"file://{pictures}"
    before = sorted(p for p in pictures.rglob("*"))
    seen = survey(DataSettings.of(address, cache_dir=str(tmp_path / "cache")))
    assert str(seen) == "40 images, 6 x 6, RGB, 2 classes"
    assert len(seen.looks) == 4
    assert sorted(p for p in pictures.rglob("*")) == before
    cached = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not any(p.stat().st_size >= (pictures / "shard-000000.tar").stat().st_size for p in cached)


def test_damage_is_named_at_once_or_passed_over_as_the_data_settings_say(pictures: Path) -> None:
    shard = pictures / "shard-000001.tar"
    shard.unlink()
    with pytest.raises(DataError, match=r"shard .*shard-000001\.tar, sample '.*': cannot open the shard"):
        survey(DataSettings.of(pictures))
    assert len(survey(DataSettings.of(pictures, on_error="skip")).looks) in range(8, 14)
