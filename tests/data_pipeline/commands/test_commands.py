"""`tarflow data ...` as a user types it: output, exit codes, help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tarflow.cli import parse
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.loading.evaluation_batches import evaluation_batches
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.loading.shape import ImageShape
from tarflow.data_pipeline.storage.open_index import open_index
from tarflow.errors import UserError

VERBS = ["prepare", "fetch", "index", "info", "verify"]


def tarflow_data(*words: object) -> int:
    args = parse(["data", *(str(word) for word in words)])
    return args.command.run(args)


def test_prepare_index_info_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(
        tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (30, 9, 9, 3), dtype=np.uint8),
        labels=np.arange(30) % 3,
    )  # fmt: skip
    out = tmp_path / "out"
    assert tarflow_data("prepare", tmp_path / "a.npz", out, "--size", 8, "--val-fraction", 0.2) == 0
    assert "train: 24 samples" in capsys.readouterr().out
    assert tarflow_data("info", out / "val", "--sheet", tmp_path / "sheet.png", "--count", 5, "--tile", 16) == 0
    text = capsys.readouterr().out
    for piece in ("samples      6", "shards       1", "image size   8 x 8", "fingerprint  ", "      0           2  0"):
        assert piece in text
    assert Image.open(tmp_path / "sheet.png").size == (3 * 18, 2 * 18)
    before = open_index(out / "train").fingerprint
    assert tarflow_data("index", out / "train") == 0
    assert open_index(out / "train").fingerprint == before
    assert tarflow_data("verify", out / "train", "--report", tmp_path / "report.json") == 0
    assert "no problems found" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["samples"], report["labels"]) == (24, {"0": 8, "1": 8, "2": 8})


def test_index_by_pattern(tmp_path: Path, lab: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write_shards(tmp_path / "deep", [3, 2, 4])
    pattern = f"{tmp_path}/deep/shard-{{0000..0001}}.tar"
    assert tarflow_data("index", pattern, f"{tmp_path}/deep/shard-0001.tar", "--out", tmp_path / "set") == 0
    captured = capsys.readouterr()
    assert "2 shards, 5 samples" in captured.out
    assert "named twice" in captured.err
    index = open_index(tmp_path / "set")
    assert index.shard_path(1).resolve() == (tmp_path / "deep" / "shard-0001.tar").resolve()
    assert tarflow_data("index", f"{tmp_path}/deep/*.tar") == 0
    assert open_index(tmp_path / "deep").num_samples == 9


@pytest.mark.case("D02")
def test_verify_names_every_problem(tmp_path: Path, lab: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    good = [("0.png", lab.image_bytes(0)), ("0.cls", b"0")]
    lab.write_tar(tmp_path / "a.tar", [*good, ("1.png", b"broken"), ("1.cls", b"1")])
    lab.write_tar(tmp_path / "b.tar", [*good, ("2.png", lab.image_bytes(2)), ("2.cls", b"-3")])
    (tmp_path / "classes.json").write_text('["x", "y"]')
    assert tarflow_data("index", tmp_path) == 0
    assert tarflow_data("verify", tmp_path) == 1
    text = capsys.readouterr().out
    assert "key_in_two_shards 1, label_out_of_range 1, undecodable 1" in text
    assert "a.tar, sample '1': not an image" in text
    assert "b.tar, sample '2': label -3 is outside 0..1" in text
    with (tmp_path / "b.tar").open("r+b") as file:
        file.truncate(900)
    assert tarflow_data("verify", tmp_path) == 1
    assert "damaged_shard 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "nowhere"], "no data set at nowhere"),
        (["index", "nothing-*.tar"], "matches no file"),
        (["fetch", "cifar", "out"], "known are mnist5k"),
        (["prepare", "nowhere", "out", "--size", "8"], "there is nothing at nowhere"),
    ],
)
def test_user_errors_are_for_users(words: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        tarflow_data(*words)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    "words", [["prepare", "a", "b"], ["prepare", "a", "b", "--size", "x"], ["nothing"], [], ["info"]]
)
@pytest.mark.case("K01")
def test_values_of_the_wrong_type_are_refused_by_the_parser(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tarflow_data(*words)
    assert caught.value.code == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tarflow_data(verb, "--help")
    assert caught.value.code == 0
    assert f"tarflow data {verb} " in capsys.readouterr().out.split("example:")[1]


def test_the_parser_and_the_package_load_nothing_heavy() -> None:
    code = (
        "import argparse, importlib, sys\nfrom tarflow.data_pipeline.commands.data import VERBS\n"
        "for module, _ in VERBS.values(): importlib.import_module(module).add_arguments(argparse.ArgumentParser())\n"
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'PIL', 'webdataset') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert done.stdout == "[]\n"


def test_the_worker_does_not_load_torch() -> None:
    """A worker starts in a moment and stays small; torch would cost two seconds and hundreds of megabytes each."""
    code = "import sys, tarflow.data_pipeline.loading.worker; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    assert done.stdout == "False\n"


def test_prepare_into_mds_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same images, labels and order of writing as in tars; info and verify know what they look at."""
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(30) % 3)
    for container in ("mds", "webdataset"):
        words = ["prepare", tmp_path / "a.npz", tmp_path / container, "--size", 8, "--container", container]
        assert tarflow_data(*words, "--val-fraction", 0.2) == 0
    for split, count in (("train", 24), ("val", 6)):
        sets = [DataSettings.of(tmp_path / form / split) for form in ("mds", "webdataset")]
        (ours,), (theirs,) = (list(evaluation_batches(data, ImageShape(8, num_classes=3), 30)) for data in sets)
        assert len(ours.ids) == count
        assert (ours.images == theirs.images).all()
        assert (ours.labels == theirs.labels).all()
    capsys.readouterr()
    assert tarflow_data("info", tmp_path / "mds" / "train") == 0
    assert "(mds shards)" in capsys.readouterr().out
    before = open_index(tmp_path / "mds" / "train").fingerprint
    assert tarflow_data("index", tmp_path / "mds" / "train") == 0
    assert open_index(tmp_path / "mds" / "train").fingerprint == before
    assert tarflow_data("verify", tmp_path / "mds" / "train") == 0
    np.savez(tmp_path / "b.npz", images=images, labels=np.arange(30) - 1)
    with pytest.raises(DataError):
        tarflow_data("prepare", tmp_path / "b.npz", tmp_path / "b", "--size", 8, "--container", "mds")
    assert not (tmp_path / "b").exists()
