"""A start that has nothing to do, or is refused, writes nothing; one that goes on does not run back. Real processes."""

import shutil
from pathlib import Path

import pytest

from tarflow.trainer.checkpoint.find import find
from tarflow.trainer.resilience.exit_codes import FINISHED, USAGE
from tarflow.trainer.run_dir import writer_lock

SETTINGS = ("train.global_batch_size=12", "checkpoint.every_images=36", "log.every_steps=1", "log.tensorboard=true")


@pytest.fixture(scope="module")
def finished(start, tiny_data, tmp_path_factory) -> tuple[Path, Path]:
    """A configuration, and a run of it that has all its 72 images."""
    import yaml

    folder = tmp_path_factory.mktemp("finished")
    tree = {
        "data": {"train": str(tiny_data)},
        "model": {"image_size": 8, "patch_size": 2, "in_channels": 1, "channels": 64, "num_blocks": 2,
                  "layers_per_block": 1, "num_classes": 3},
        "train": {"global_batch_size": 12, "max_images": 72},
        "optim": {"lr": 1e-3, "warmup_images": 24},
    }  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    assert start(folder / "c.yaml", folder / "runs" / "run", *SETTINGS, ranks=1)["codes"] == [FINISHED]
    return folder / "c.yaml", folder / "runs" / "run"


@pytest.fixture
def config(finished) -> Path:
    return finished[0]


@pytest.fixture
def run(finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[1], tmp_path / "runs" / "run"))


def everything(run: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a run with its time and content; the lock's text says who held it last and is no record."""
    files = (p for p in run.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files} | {
        str(p): (p.stat().st_mtime_ns, b"") for p in run.rglob("*") if p.is_dir()
    }


def output(run: Path) -> str:
    return (run.parent.parent / f"{run.name}-output.txt").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.case("N10")
def test_a_finished_run_started_again_with_other_settings_is_left_as_it_is(start, config, run, ranks) -> None:
    before = everything(run)
    others = ("optim.lr=5e-4", "train.max_images=60", "parallel.backend=ddp")
    assert start(config, run, *SETTINGS, *others, ranks=ranks)["codes"] == [FINISHED] * ranks
    assert everything(run) == before
    (line,) = [line for line in output(run).splitlines() if "nothing to do" in line]
    assert f"{run} is finished, images-000000000072 has 72 of train.max_images=60; nothing is written" in line
    assert "not taken over: " in line
    assert "optim.lr: 0.001 -> 0.0005" in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_blocks=3", "model.num_blocks: 2 in the checkpoint, 3 now"),
        ("ema.decays=[0.9]", "ema.decays"),
        ("train.micro_batch_size=5", "does not divide"),
    ],
)
@pytest.mark.parametrize("images", [72, 144], ids=["finished", "to go on"])
@pytest.mark.case("N10")
def test_a_start_that_is_refused_writes_nothing(start, config, run, override, said, images) -> None:
    before = everything(run)
    settings = (*SETTINGS, f"train.max_images={images}", override)
    for ranks in (1, 2) if images == 144 else (1,):
        codes = start(config, run, *settings, ranks=ranks)["codes"]
        assert codes == ([USAGE] * 2 if ranks == 2 else [1])  # alone, the command line makes the error an exit code
        assert said in output(run)
        assert everything(run) == before


@pytest.mark.case("N10")
def test_a_start_beside_a_living_writer_writes_nothing(start, config, run) -> None:
    before = everything(run)
    with writer_lock(run):
        assert set(start(config, run, *SETTINGS, "train.max_images=144", ranks=2)["codes"]) == {USAGE}
    assert "is in use by another process" in output(run)
    assert everything(run) == before


@pytest.mark.case("N10")
def test_a_finished_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(start, config, run) -> None:
    next(find(run).path.glob("*.distcp")).write_bytes(b"cut")
    assert start(config, run, *SETTINGS, ranks=1)["codes"] == [FINISHED]
    assert "resuming at 36 images" in (run / "log.txt").read_text()
    assert find(run).images_seen == 72


@pytest.mark.case("F19")
def test_curves_of_a_killed_and_resumed_run_do_not_run_back(start, config, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "runs" / "killed"
    for fault in ("step@3=raise", "step@6=raise", ""):  # as it dies it writes out what it has, which goes past its save
        start(config, run, *SETTINGS, "checkpoint.asynchronous=false", ranks=1, fault=fault)
    resumed = [line for line in (run / "log.txt").read_text().splitlines() if "resuming at 36" in line]
    assert resumed
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for tag in ("train/loss", "optim/lr"):
        assert [point.step for point in events.Scalars(tag)] == [12, 24, 36, 48, 60, 72]
