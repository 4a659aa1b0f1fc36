"""All that is checked before a run is made, by every way of starting one; a run that goes on is not stopped for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tarflow.cli
from tarflow.errors import UserError
from tarflow.trainer.config.files import config_text
from tarflow.trainer.run_dir import create_run, save_config
from tarflow.trainer.start.check import check_start
from tarflow.trainer.start.record import recorded_classes


@pytest.fixture
def wrong(make_set, make_config, tmp_path: Path) -> Path:
    """A configuration whose held-out images are not there, with guidance that means nothing."""
    config = make_config(
        make_set("pictures"),
        data={"validation": str(tmp_path / "nope")},
        model={"num_classes": 0},
        sampling={"guidance": 2},
    )
    path = tmp_path / "wrong.yaml"
    path.write_text(config_text(config))
    return path


@pytest.mark.parametrize("words", [[], ["--dry-run"], ["--ranks", "2"], ["--dry-run", "--world-size", "2"]])
@pytest.mark.case("N03")
def test_every_way_to_train_refuses_before_anything_is_made(wrong: Path, tmp_path: Path, words, capsys) -> None:
    assert tarflow.cli.main(["train", str(wrong), "--run-dir", str(tmp_path / "run"), *words]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"tarflow train: error: data.validation={tmp_path}/nope: there is no data set at {tmp_path}/nope: the path does not exist "
        "(settings data.train, data.validation)",
        "  sampling.guidance=2.0 has no effect without labels while sampling.attn_temp=1: guided and unguided network are the same. "
        "Set sampling.attn_temp (for example 0.3), or sampling.guidance=0",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.case("N03")
def test_a_dry_run_without_its_data_is_one_line(wrong: Path, tmp_path: Path, capsys) -> None:
    words = [
        "train",
        str(wrong),
        "--dry-run",
        "data.validation=null",
        "sampling.guidance=0",
        f"data.train={tmp_path}/none",
    ]
    assert tarflow.cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        f"tarflow train: error: there is no data set at {tmp_path}/none: the path does not exist (settings data.train, data.validation)"
    ]


@pytest.mark.case("N02")
def test_a_dry_run_says_what_the_data_are(make_set, make_config, tmp_path: Path, capsys) -> None:
    path = tmp_path / "right.yaml"
    path.write_text(config_text(make_config(make_set("pictures"))))
    assert tarflow.cli.main(["train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "data: 12 images, 8 x 8, RGB, 4 classes\nnote: data.validation is not set" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [({"dp_replicate": 3}, 4, "is not the world size 4"), ({"dp_shard": 2}, 2, "needs parallel.backend=fsdp2")],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_made(
    make_set, make_config, parallel, world_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_start(make_config(make_set("pictures"), parallel=parallel), Path("no/run"), world_size)


def began(run: Path, config) -> None:
    """A run with a committed checkpoint, as far as a start looks at it."""
    create_run(run)
    save_config(run, config)
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "checkpoints" / "step-00000001" / "COMMITTED").write_text("{}")


@pytest.mark.case("N03")
def test_a_run_that_goes_on_hears_what_it_was_once_started_with_and_is_refused_what_is_new(
    make_set, make_config, tmp_path: Path
) -> None:
    data = make_set("pictures")
    held_out = {"validation": str(tmp_path / "gone")}
    old = make_config(data, data=held_out, sampling={"guidance": 2}, train={"label_dropout": 0})
    run = tmp_path / "run"
    with pytest.raises(UserError, match="there is no data set"):
        check_start(old, run, 1)
    began(run, old)
    notes = "\n".join(check_start(old, run, 1).notes)
    assert "there is no data set at" in notes
    assert "sampling.guidance=2.0 needs a model" in notes
    changed = make_config(data, data=held_out, sampling={"guidance": 3}, train={"label_dropout": 0})
    with pytest.raises(UserError, match=r"^sampling\.guidance=3\.0 needs a model"):
        check_start(changed, run, 1)
    with pytest.raises(UserError, match=r"^model\.num_classes=3, but the data"):  # training itself cannot go on
        check_start(make_config(data, model={"num_classes": 3}), run, 1)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"classes": 3}', "\xff"])
@pytest.mark.case("H06")
def test_a_damaged_record_of_the_data_is_refused_and_a_missing_one_is_said(
    make_set, make_config, tmp_path: Path, content: str
) -> None:
    config = make_config(make_set("pictures", classes=list("abcd")))
    began(tmp_path / "run", config)
    assert recorded_classes(tmp_path / "run") is None
    assert any("does not name its classes" in note for note in check_start(config, tmp_path / "run", 1).notes)
    (tmp_path / "run" / "data.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"data\.json .*is damaged.*or remove it: the names of the run's classes"):
        check_start(config, tmp_path / "run", 1)


def test_a_stream_is_told_what_the_evaluation_will_want(make_set, make_config) -> None:
    shard = next(make_set("pictures").glob("*.tar"))
    config = make_config(f"pipe:cat {shard}", optim={"warmup_images": 10})
    start = check_start(config, Path("no/run"), 1)
    assert start.lines()[0] == "data: a stream, whose length, image size and classes are not known"
    assert any("`tarflow evaluate` needs images with an index" in note for note in start.notes)


def test_the_checks_of_a_supervisor_and_a_login_node_load_no_torch() -> None:
    program = "import sys, tarflow.trainer.start.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=os.environ).returncode == 0
