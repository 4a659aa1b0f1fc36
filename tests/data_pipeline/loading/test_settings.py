"""Section `data`: what a loader that is used by itself makes of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.settings import DataSettings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_worker": 2}, r"data\.num_worker cannot be 2: extra inputs are not permitted"),
        ({"shuffle_block": 0}, r"data\.shuffle_block cannot be 0: input should be greater than 0"),
        ({"num_workers": "1.5"}, r"data\.num_workers cannot be '1\.5'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        DataSettings.of("somewhere", **setting)


def test_places_have_one_form() -> None:
    assert DataSettings.of(Path("a/b/")).train == DataSettings.of("a//b").train == "a/b"
    assert DataSettings.of(Path("s3://bucket/set")).train == "s3://bucket/set"
    assert DataSettings.of("pipe:cat a//b").train == "pipe:cat a//b"


def test_held_out_images_are_read_as_the_training_images_are() -> None:
    data = DataSettings.of("a", validation="b", on_error="skip", retries=1)
    assert data.held_out == DataSettings.of("b", on_error="skip", retries=1)
    assert DataSettings.of("a").held_out is None


def test_the_package_and_the_ground_of_the_front_door_load_no_pydantic() -> None:
    code = "import sys, tarflow, tarflow.cli; tarflow.cli.main(['--help'])"
    program = f"import atexit, sys; atexit.register(lambda: print('pydantic' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
