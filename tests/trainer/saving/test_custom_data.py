"""A run on a user's own data and transform, killed and continued with other ranks, sees what one uninterrupted process saw."""

import json
import os
import shutil
import signal
import zlib
from pathlib import Path

import pytest

from tarflow.errors import UserError
from tarflow.records import load_record
from tarflow.trainer.config.files import load_config
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.hooks import Hook
from tarflow.trainer.resilience.exit_codes import FINISHED
from tarflow.trainer.start.check import check_start
from tarflow.trainer.start.record import DataRecord
from tarflow.trainer.step_inputs import StepInput
from tarflow.trainer.train import train
from tests.helpers.ranks import launch_ranks
from tests.helpers.runs import write_config

ROOT = Path(__file__).resolve().parents[3]
BATCH, STEPS, KILLED_AT = 12, 14, 9
HERE = "tests.helpers.own_data"


class NoteImages(Hook):
    """Writes down what each rank gets, and dies by kill -9 at a step, if it is told one."""

    def __init__(self, run: Path, killed_at: int | None) -> None:
        self.run, self.killed_at = run, killed_at

    def on_batch(self, batch: StepInput) -> None:
        rows = zip((batch.slots + batch.images_seen).tolist(), batch.ids.tolist(), batch.pixels)
        seen = [[place, number, zlib.crc32(image.contiguous().numpy().tobytes())] for place, number, image in rows]
        with open(self.run / "seen.jsonl", "a") as file:
            file.write(json.dumps(seen) + "\n")
        if batch.images_seen == (self.killed_at or -1) * BATCH:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_note(config: Path, overrides: list[str], run: Path, killed_at: int | None = None) -> int:
    return train(load_config(config, overrides, own=True), run, hooks=[NoteImages(run, killed_at)])


def seen(run: Path) -> dict[int, tuple[int, int]]:
    """Position -> id and checksum of the image; steps that were taken twice saw the same."""
    found: dict[int, tuple[int, int]] = {}
    for line in (run / "seen.jsonl").read_text().splitlines():
        for place, number, checksum in json.loads(line):
            assert found.setdefault(place, (number, checksum)) == (number, checksum), place
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("custom") / "custom.yaml", Path("train"),
        data={"dataset": f"{HERE}:Spots", "transform": f"{HERE}:shift", "validation": "held-24"},
        train={"global_batch_size": BATCH, "max_images": STEPS * BATCH}, checkpoint={"every_images": 4 * BATCH},
        model={"channels": 16, "head_channels": 8}, parallel={"backend": "ddp"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def killed(config: Path) -> Path:
    """Two ranks with data workers, killed at step 9 after the save at step 8."""
    run = config.parent / "killed"
    ended = launch_ranks(train_and_note, 2, config, ["data.num_workers=1"], run, KILLED_AT, may_fail=True)
    assert ended.codes == [-signal.SIGKILL] * 2, ended.output
    return run


def test_killed_and_continued_on_other_ranks_it_sees_the_same_images_in_the_same_order(
    config: Path, killed: Path
) -> None:
    whole, run = config.parent / "whole", config.parent / "continued"
    assert launch_ranks(train_and_note, 1, config, [], whole).values == [FINISHED]
    shutil.copytree(killed, run)
    before = seen(run)
    assert launch_ranks(train_and_note, 3, config, [], run).values == [FINISHED] * 3
    expected = seen(whole)
    assert seen(run) == expected
    assert sorted(expected) == list(range(STEPS * BATCH))
    assert 8 * BATCH < len(before) < len(expected)
    losses = [
        [json.loads(line).get("train/loss") for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
        for folder in (whole, run)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_the_run_records_function_file_and_fingerprint(killed: Path) -> None:
    record = load_record(killed / "data.json", DataRecord)
    assert record.place == f"{HERE}:Spots('train')"
    assert record.fingerprint.startswith("custom-96-")
    assert record.classes == ["left", "middle", "right"]
    for code, name in ((record.dataset, "Spots"), (record.transform, "shift")):
        assert code is not None
        assert code.name == f"{HERE}:{name}"
        assert code.file == str(ROOT / "tests/helpers/own_data.py")
    log = (killed / "log.txt").read_text()
    assert f"note: data.dataset={HERE}:Spots of {ROOT}/tests/helpers/own_data.py, called with data.train='train'" in log
    assert "classes are named by its attribute classes (3)" in log
    assert f"note: data.transform={HERE}:shift of " in log
    assert record.validation is not None
    assert record.validation.transform is None


def test_changed_data_are_an_error_that_names_both_sides_unless_accepted(config: Path, killed: Path) -> None:
    said = rf"at \d+ images: {HERE}:Spots\('train'\) with .* custom-96-\w+ then, {HERE}:Spots\('train-95'\) with custom-95-\w+ now"
    other = load_config(config, ["data.train=train-95"], own=True)
    with pytest.raises(TrainerError, match=rf"{said} \(data.train, data.dataset\); .*--accept-new-data"):
        train(other, killed)


def test_a_dry_run_compares_labels_and_model_as_far_as_it_looks(config: Path, tmp_path: Path) -> None:
    unnamed = [f"data.dataset={HERE}:numbers", "data.train=60", "data.validation=30"]
    start = check_start(load_config(config, unnamed, own=True), tmp_path / "run", 1)
    assert start.lines()[0] == "data: 60 images, 8 x 8, grey, labels; held out: 30 images"
    for overrides, said in (
        (
            [*unnamed, "model.num_classes=2"],
            "model.num_classes=2, but an image of .*:numbers\\('60'\\) has the label 2",
        ),
        (["model.num_classes=2"], "model.num_classes=2, but the data in .*:Spots\\('train'\\) have 3 classes"),
        ([f"data.transform={HERE}:careless"], "careless: image 0 comes out differently"),
    ):
        with pytest.raises(UserError, match=said):
            check_start(load_config(config, overrides, own=True), tmp_path / "run", 1)


def test_ranks_with_different_data_are_refused_before_the_first_step(config: Path, tmp_path: Path) -> None:
    overrides = [f"data.dataset={HERE}:OfProcess", "data.validation=null"]
    ended = launch_ranks(train_and_note, 2, config, overrides, tmp_path / "run", may_fail=True)
    assert FINISHED not in ended.codes
    assert "rank 1 has another data set than rank 0: fingerprint custom-96-" in ended.output
    assert "sort what is listed from a folder or a set" in ended.output
    assert not (tmp_path / "run/checkpoints").exists()


def test_code_that_changed_since_the_last_start_is_said_and_kept(config: Path, tmp_path: Path) -> None:
    """Not an error: the fingerprint is the same. Every change stays listed, with the checkpoint at which it came."""
    own, run = tmp_path / "own.py", tmp_path / "run"
    source = (ROOT / "tests/helpers/own_data.py").read_text()
    own.write_text(source)

    def started(images: int) -> str:
        words = [f"data.dataset={own}:Spots", f"data.transform={own}:shift", f"train.max_images={images}"]
        before = len((run / "log.txt").read_text()) if run.exists() else 0
        ended = launch_ranks(train_and_note, 1, config, [*words, f"checkpoint.every_images={images}"], run)
        assert ended.values == [FINISHED]
        return (run / "log.txt").read_text()[before:]

    assert "come from other code" not in started(2 * BATCH)
    digest = [load_record(run / "data.json", DataRecord).dataset.digest]  # type: ignore[union-attr]
    assert "come from other code" not in started(3 * BATCH)
    own.write_text(source + "\n# another comment\n")
    log = started(4 * BATCH)
    record = load_record(run / "data.json", DataRecord)
    digest.append(record.dataset.digest)  # type: ignore[union-attr]
    for name, function in (("dataset", "Spots"), ("transform", "shift")):
        assert (
            f"note: data.{name}: {own}:{function} (SHA-256 {digest[0]}) when the run was last started, {own}:{function} "
            f"(SHA-256 {digest[1]}) now: images after images-{3 * BATCH:012d} come from other code than those before"
        ) in log
    assert "come from other code" not in started(5 * BATCH)
    own.write_text(source)
    assert "come from other code" in started(6 * BATCH)
    changed = load_record(run / "data.json", DataRecord).changed
    assert [(one.setting, one.checkpoint) for one in changed] == [
        (f"data.{name}", f"images-{number * BATCH:012d}") for number in (3, 5) for name in ("dataset", "transform")
    ]
    assert [one.now.digest for one in changed[::2] if one.now] == [digest[1], digest[0]]
