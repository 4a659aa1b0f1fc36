"""`tarflow checkpoint`: list, verify, export and prune, on the checkpoints of a real run."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tarflow.cli
from tarflow.models.weights import load_weights_file
from tarflow.trainer.checkpoint.find import committed, find
from tarflow.trainer.checkpoint.metadata import read_metadata
from tarflow.trainer.checkpoint.pins import pinned
from tarflow.trainer.checkpoint.tensors import load_weights
from tarflow.trainer.config.files import load_config
from tarflow.trainer.run_dir import writer_lock
from tests.helpers.checkpoints import forge


@pytest.fixture(scope="module")
def trained(start, tiny_data, tmp_path_factory) -> Path:
    """A run with five checkpoints, steps 1 to 5."""
    import yaml

    folder = tmp_path_factory.mktemp("trained")
    tree = {
        "data": {"train": str(tiny_data)},
        "model": {"image_size": 8, "patch_size": 2, "in_channels": 1, "channels": 64, "num_blocks": 2,
                  "layers_per_block": 1, "num_classes": 3},
        "train": {"global_batch_size": 16, "max_images": 80},
        "checkpoint": {"every_images": 16, "keep_latest": -1},
        "log": {"tensorboard": False},
    }  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    assert start(folder / "c.yaml", folder / "runs" / "run", ranks=1)["codes"] == [0]
    return folder / "runs" / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def steps(run: Path) -> list[int]:
    return [c.step for c in committed(run)]


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_list_shows_what_is_there_and_what_is_not_used(run: Path, capsys) -> None:
    (run / "checkpoints" / "images-000000000144.tmp").mkdir()
    (run / "checkpoints" / "images-000000000064.damaged").mkdir()
    with pinned(find(run, 2), owner="evaluation"):
        assert tarflow.cli.main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["1", "2", "3", "4", "5"]
    assert lines[2].endswith("pinned")
    assert lines[5].endswith("newest")
    assert "images-000000000144.tmp: not used: a save was interrupted" in lines
    assert any(line.startswith("images-000000000064.damaged: set aside") for line in lines)


def test_verify_reads_every_byte_of_every_file(run: Path, capsys) -> None:
    assert tarflow.cli.main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("sound: ") == 5
    victim = find(run, 3)
    for name, facts in victim.info["files"].items():
        for at in (0, facts["size"] // 2, facts["size"] - 1):  # whichever byte it is
            flip(victim.path / name, at)
            assert tarflow.cli.main(["checkpoint", "verify", str(run), "--step", "3"]) == 1
            assert f"images-000000000048: DAMAGED: the checksum of its file {name} is wrong" in capsys.readouterr().out
            flip(victim.path / name, at)
    assert tarflow.cli.main(["checkpoint", "verify", str(run)]) == 0
    (victim.path / "config.yaml").unlink()
    assert tarflow.cli.main(["checkpoint", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert "images-000000000048: DAMAGED: its file config.yaml is missing" in out
    assert tarflow.cli.main(["checkpoint", "verify", str(run), "--step", "7"]) == 2
    assert "usable steps: 1, 2, 4, 5" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(("asked", "meant"), [("auto", "ema-0.100"), ("raw", "raw"), ("ema-0.050", "ema-0.050")])
@pytest.mark.case("T06")
def test_export_writes_the_set_that_was_asked_for_and_names_it(
    trained: Path, tmp_path: Path, capsys, suffix: str, asked: str, meant: str
) -> None:
    out = tmp_path / f"weights{suffix}"
    assert tarflow.cli.main(["checkpoint", "export", str(trained), "--out", str(out), "--weights", asked]) == 0
    assert f"weights {meant} of images-000000000080" in capsys.readouterr().out
    model = load_config(trained / "config.yaml").model
    config, weights = load_weights_file(out, model if suffix == ".pth" else None)
    assert config == model
    expected = load_weights(find(trained), meant)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert not list((trained / "checkpoints" / "pins").iterdir())


@pytest.mark.case("T06")
def test_export_refuses_and_writes_nothing(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "old.pth").write_text("mine")

    def refused(*arguments: str) -> str:
        assert tarflow.cli.main(["checkpoint", "export", str(run), *arguments]) == 2
        return str(capsys.readouterr().err)

    assert "holds no weights 'ema-0.2'; it holds: ema-0.050, ema-0.100, raw" in refused(
        "--out", str(tmp_path / "a.pth"), "--weights", "ema-0.2"
    )
    assert "must end in .safetensors, or in .pth" in refused("--out", str(tmp_path / "a.bin"))
    assert "exists" in refused("--out", str(tmp_path / "old.pth"))
    assert "does not exist" in refused("--out", str(tmp_path / "none" / "a.pth"))
    assert "usable steps: 1, 2, 3, 4, 5" in refused("--out", str(tmp_path / "a.pth"), "--step", "6")
    pieces = read_metadata(find(run, 5).path, find(run, 5).sizes)
    for weights, name in (("ema-0.100", "ema-0.100"), ("raw", "model")):
        piece = pieces[f"{name}/blocks.0.proj_in.weight"].pieces[0]
        flip(find(run, 5).path / piece.file, piece.start + piece.length // 2)
        assert "the checksum of its file" in refused("--out", str(tmp_path / "a.pth"), "--weights", weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.pth", "run"]


@pytest.mark.case("T04")
def test_prune_follows_retention_and_keeps_the_newest_and_the_pinned(run: Path, capsys) -> None:
    prune = ["checkpoint", "prune", str(run)]
    assert tarflow.cli.main(prune) == 0  # the run keeps all
    assert steps(run) == [1, 2, 3, 4, 5]
    for few, why in (("0", "at least 2, or -1"), ("1", "at least 2, or -1"), ("-2", "out of bounds")):
        assert tarflow.cli.main([*prune, "--keep-latest", few]) == 2
        assert why in capsys.readouterr().err
    with pinned(find(run, 1), owner="reader"):
        assert tarflow.cli.main([*prune, "--keep-latest", "2", "--keep-every-images", "48"]) == 0
    assert "removed images-000000000032" in capsys.readouterr().out
    assert steps(run) == [1, 3, 4, 5]
    assert tarflow.cli.main([*prune, "--keep-latest", "2"]) == 0
    assert steps(run) == [4, 5]
    assert (run / "checkpoints" / "latest").read_text().strip() == "images-000000000080"


@pytest.mark.case("T04")
def test_prune_never_removes_the_last_whole_one_nor_works_beside_a_writer(run: Path, capsys) -> None:
    prune = ["checkpoint", "prune", str(run), "--keep-latest", "2"]
    for step in (4, 5):
        flip(next(find(run, step).path.glob("*.distcp")), 7)
    assert tarflow.cli.main(prune) == 2
    assert "the newest 2 checkpoints" in capsys.readouterr().err
    assert steps(run) == [1, 2, 3, 4, 5]
    with writer_lock(run):
        code = tarflow.cli.main(["checkpoint", "prune", str(run), "--keep-latest", "3"])
    assert code == 2
    assert "is in use by another process" in capsys.readouterr().err
    assert steps(run) == [1, 2, 3, 4, 5]


def test_prune_removes_what_was_set_aside_only_when_asked(run: Path) -> None:
    aside = run / "checkpoints" / "images-000000000144.damaged"
    aside.mkdir()
    assert tarflow.cli.main(["checkpoint", "prune", str(run)]) == 0
    assert aside.exists()
    assert tarflow.cli.main(["checkpoint", "prune", str(run), "--damaged"]) == 0
    assert not aside.exists()


def test_what_is_no_run_is_said(tmp_path: Path, capsys) -> None:
    assert tarflow.cli.main(["checkpoint", "list", str(tmp_path / "none")]) == 2
    assert "no run directory at" in capsys.readouterr().err


@pytest.mark.case("V02")
def test_rewind_sets_the_later_ones_aside_and_says_what_comes_next(run: Path, capsys) -> None:
    rewind = ["checkpoint", "rewind", str(run)]
    assert tarflow.cli.main(rewind) == 2
    assert "--images N" in capsys.readouterr().err
    flip(next(find(run, 2).path.glob("*.distcp")), 7)
    assert tarflow.cli.main([*rewind, "--step", "2"]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert steps(run) == [1, 2, 3, 4, 5]
    assert tarflow.cli.main([*rewind, "--images", "48"]) == 0
    assert "resumes from images-000000000048" in capsys.readouterr().out
    assert steps(run) == [1, 2, 3]
    assert (run / "checkpoints" / "latest").read_text().strip() == "images-000000000048"
    assert tarflow.cli.main(["checkpoint", "list", str(run)]) == 0
    assert "images-000000000080.aside: set aside by `checkpoint rewind`" in capsys.readouterr().out
    assert tarflow.cli.main(["checkpoint", "prune", str(run), "--damaged"]) == 0
    assert len(list((run / "checkpoints").glob("*.aside"))) == 2
    assert tarflow.cli.main(["checkpoint", "prune", str(run), "--aside"]) == 0
    assert steps(run) == [1, 2, 3]
    assert not list((run / "checkpoints").glob("*.aside"))


@pytest.mark.parametrize(
    "words",
    [
        "sample {run} --out {out} --num 1 --device cpu", "checkpoint export {run} --out {out}.safetensors",
        "ema {run} --relative-std 0.07 --out {out}.safetensors", "evaluate {run} --newest --device cpu",
        "train {config} --run-dir {out} --init-from {run}", "train {config} --run-dir {run}", "checkpoint verify {run}",
        "checkpoint rewind {run} --images 80", "checkpoint list {run}", "checkpoint prune {run} --keep-latest 2",
    ],
)  # fmt: skip
@pytest.mark.case("H01")
def test_no_verb_runs_what_a_strangers_run_hides(run: Path, tmp_path: Path, capsys, words: str) -> None:
    """In every checkpoint's metadata, sizes and checksums made to fit."""
    mark = tmp_path / "ran"
    for checkpoint in committed(run):
        (checkpoint.path / ".metadata").write_bytes(pickle.dumps(Runs(mark)))
        forge(checkpoint.path)
    config = tmp_path / "c.yaml"
    config.write_text((run / "config.yaml").read_text().partition("\n")[2])
    call = words.format(run=run, out=tmp_path / "out", config=config).split()
    done = tarflow.cli.main(call)
    said = capsys.readouterr()
    assert not mark.exists()
    assert done == (0 if call[1] == "list" else 1 if call[1] == "verify" or call[0] == "evaluate" else 2), said.err
    if done and call[1] != "prune":
        assert "not part of the metadata of tensors" in said.out + said.err
    assert len(committed(run)) == 5
    assert not list(tmp_path.glob("out*"))


class Runs:
    """Unpickled, it leaves a file: what harm would be done by."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))
