"""`tarflow init`: a configuration that fits the data, whatever they are, and that `train --dry-run` accepts."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tarflow.cli
from tarflow.trainer.config.files import load_config
from tarflow.trainer.start.suggest import suggest


def make(folder: Path, number: int, size: int, channels: int, classes: int, val: float = 0.0) -> Path:
    from tarflow.data_pipeline.prepare.sources import open_source
    from tarflow.data_pipeline.prepare.write import Options, prepare

    arrays: dict[str, Any] = {"labels": np.arange(number) % classes} if classes else {}
    pixels = np.random.default_rng(0).integers(0, 256, (number, size, size, channels), dtype=np.uint8)
    file = folder.with_suffix(".npz")
    np.savez(file, images=pixels, **arrays)
    prepare(open_source(file), folder, Options(size=size, val_fraction=val))
    return folder


@pytest.mark.parametrize(
    ("number", "size", "channels", "classes", "val", "expected"),
    [
        (40, 32, 3, 4, 0.2, (32, 4, 3, 4, 32)),  # the README's case: colour, held-out images beside
        (7, 37, 1, 0, 0.0, (36, 6, 1, 0, 4)),  # a prime side, grey, no labels, fewer images than a batch
        (3, 1, 3, 1, 0.0, (1, 1, 3, 1, 2)),  # one pixel, one class
        (2, 300, 1, 2, 0.0, (256, 16, 1, 2, 2)),  # larger than a first run should have
    ],
)
@pytest.mark.case("N02")
def test_init_writes_a_configuration_that_fits(
    tmp_path: Path, capsys, number: int, size: int, channels: int, classes: int, val: float, expected: tuple[int, ...]
) -> None:
    data, out = make(tmp_path / "my set", number, size, channels, classes, val), tmp_path / "my.yaml"
    assert tarflow.cli.main(["init", str(data), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}; next: tarflow train {out} --run-dir runs/my" in said
    config = load_config(out)
    model = config.model
    assert (model.image_size, model.patch_size, model.in_channels, model.num_classes) == expected[:4]
    assert config.train.global_batch_size == expected[4]
    assert (config.data.train, config.data.validation) == (
        (f"{data}/train", f"{data}/val") if val else (str(data), None)
    )
    assert tarflow.cli.main(["train", str(out), "--dry-run"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert [note for note in notes if "data.validation is not set" not in note] == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.case("N02")
def test_images_of_several_sizes_are_not_enlarged_for_the_most_part(tmp_path: Path) -> None:
    import tarfile

    from PIL import Image

    from tarflow.data_pipeline.index.build import build_index

    (tmp_path / "wild").mkdir()
    with tarfile.open(tmp_path / "wild" / "a.tar", "w") as tar:
        for k, side in enumerate([20, 48, 50, 64, 90]):
            buffer = io.BytesIO()
            Image.new("RGB", (side, 100), (200, 10, 10)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{k}.png")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    build_index(tmp_path / "wild", [tmp_path / "wild" / "a.tar"])
    text = suggest(str(tmp_path / "wild"))
    assert "image_size: 50  # half of the images have 50 px or more" in text


@pytest.mark.case("N02")
def test_labels_that_some_images_lack_are_not_asked_of_the_others(tmp_path: Path, capsys) -> None:
    import tarfile

    from tarflow.data_pipeline.index.build import build_index

    data = make(tmp_path / "set", 6, 8, 3, 2)
    shard = next(data.glob("*.tar"))
    with tarfile.open(shard) as tar:
        members = [(m, file.read()) for m in tar.getmembers() if (file := tar.extractfile(m))]
    with tarfile.open(shard, "w") as tar:
        for member, content in members:
            if member.name != "00000002.cls":
                tar.addfile(member, io.BytesIO(content))
    build_index(data, [shard])
    assert tarflow.cli.main(["init", str(data), "--out", str(tmp_path / "my.yaml")]) == 0
    assert "num_classes: 0  # 1 of the images have no label" in (tmp_path / "my.yaml").read_text()


@pytest.mark.case("N02")
def test_the_model_suits_the_number_of_images(tmp_path: Path) -> None:
    from dataclasses import replace
    from unittest.mock import patch

    import tarflow.trainer.start.suggest as module

    data = make(tmp_path / "set", 8, 16, 3, 2)
    widths = []
    for number in (8, 50_000, 5_000_000):
        seen = module.survey(module.DataSettings.of(data))
        assert seen.index is not None
        seen.index.num_samples = number
        seen = replace(seen, facts=replace(seen.facts, num_samples=number))
        with patch.object(module, "survey", lambda _, seen=seen: seen):
            text = suggest(str(data))
        (width,) = re.findall(r"^  channels: (\d+)", text, re.MULTILINE)
        widths.append(int(width))
    assert widths == [128, 384, 768]


@pytest.mark.case("N02")
def test_init_never_replaces_a_file_and_names_what_is_no_data_set(tmp_path: Path, capsys) -> None:
    data, out = make(tmp_path / "set", 4, 8, 3, 2), tmp_path / "my.yaml"
    out.write_text("mine")
    assert tarflow.cli.main(["init", str(data), "--out", str(out)]) == 2
    assert f"--out {out} already exists" in capsys.readouterr().err
    assert out.read_text() == "mine"
    for wrong in (tmp_path / "nowhere", tmp_path):
        assert tarflow.cli.main(["init", str(wrong), "--out", str(tmp_path / "new.yaml")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("tarflow init: error: ")
        assert str(wrong) in said
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("data/cats", "cats"),
        ("data/cats/train", "cats"),
        ("./cats/", "cats"),
        ("http://host/cats/", "cats"),
        (".", "data"),
    ],
)
def test_the_file_is_named_after_the_data(data: str, name: str) -> None:
    from tarflow.trainer.commands.init import _name

    assert _name(data) == name
