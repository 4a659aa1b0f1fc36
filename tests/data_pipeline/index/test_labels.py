"""One bound on labels, wherever they come from; and pictures that are not read are counted by name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarflow.cli import main
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.index.index import FORMAT_VERSION
from tarflow.data_pipeline.index.labels import MAX_CLASSES, check_label, parse_label
from tarflow.data_pipeline.index.mds import write_mds
from tarflow.data_pipeline.loading.choose_reader import data_facts
from tarflow.data_pipeline.loading.settings import DataSettings
from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.data_pipeline.storage.open_index import open_index
from tests.helpers.loaders import make_loader

WILD = 5_000_000_000_000
BEYOND = rf"the label is {WILD}, classes are numbered from 0 to at most 999999"


def write_tar(lab: SimpleNamespace, root: Path, label: bytes, field: str = "cls", good: bytes = b"0") -> Path:
    """A shard of two samples, of which the second has this label."""
    root.mkdir(exist_ok=True)
    images = [lab.image_bytes(i) for i in range(2)]
    lab.write_tar(
        root / "a.tar", [("0.png", images[0]), (f"0.{field}", good), ("1.png", images[1]), (f"1.{field}", label)]
    )
    return root / "a.tar"


@pytest.mark.case("F16")
def test_a_label_beyond_the_bound_is_named_with_shard_and_key(tmp_path: Path, lab: SimpleNamespace) -> None:
    path = write_tar(lab, tmp_path, b"%d" % WILD)
    with pytest.raises(DataError, match=rf"shard .*a\.tar: member '1\.cls': {BEYOND}"):
        build_index(tmp_path, [path])
    index, report = build_index(tmp_path, [path], on_error="skip")
    assert (index.num_samples, index.num_classes, report.problems) == (1, 1, {"malformed_label": 1})
    inside = write_tar(lab, tmp_path / "json", json.dumps({"label": WILD}).encode(), "json", b"{}")
    with pytest.raises(DataError, match=rf"member '1\.json': {BEYOND}"):
        build_index(tmp_path / "json", [inside], label_field="json:label")


@pytest.mark.parametrize("label", [MAX_CLASSES, 2**63 - 1, -WILD])
@pytest.mark.case("F16")
def test_mds_columns(tmp_path: Path, lab: SimpleNamespace, label: int) -> None:
    write_mds(tmp_path, ((lab.image_bytes(i), 123_456 + i) for i in range(2)), 1 << 20)
    shard = next(tmp_path.glob("*.mds"))
    here, there = ((value).to_bytes(8, "little", signed=True) for value in (123_457, label))
    shard.write_bytes(shard.read_bytes().replace(here, there))
    with pytest.raises(DataError, match=rf"shard .*\.mds, sample 1, column 'label': the label is {label}, classes are"):
        build_index(tmp_path, [tmp_path])


@pytest.mark.case("F16")
def test_streams_and_prepared_sources(tmp_path: Path, lab: SimpleNamespace) -> None:
    path = write_tar(lab, tmp_path / "s", b"%d" % WILD)
    with (
        make_loader(path, reader="stream", image_size=8, channels=3, global_batch_size=2, num_classes=3) as loader,
        pytest.raises(DataError, match=rf"a\.tar, sample '1'.*{BEYOND}"),
    ):
        list(itertools.islice(loader, 1))
    images = np.zeros((2, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, WILD]))
    pq.write_table(pa.table({"image": [lab.image_bytes(0)] * 2, "label": [0, WILD]}), tmp_path / "a.parquet")
    for name in ("a.npz", "a.parquet"):
        with pytest.raises(DataError, match=rf"holds the label {WILD} \(row 1\): .* at most 999999"):
            open_source(tmp_path / name)


@pytest.mark.case("F16")
def test_an_index_that_holds_one_is_refused_before_anything_is_counted(
    tmp_path: Path, lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As version 0.1 wrote it: `data info` then asked for 36 TiB."""
    monkeypatch.setattr("tarflow.data_pipeline.index.labels.check_label", lambda label: label)
    with pytest.raises(DataError):
        build_index(tmp_path, [write_tar(lab, tmp_path, b"%d" % WILD)])
    monkeypatch.undo()
    for verb in ("info", "verify"):
        assert main(["data", verb, str(tmp_path)]) != 0
        said = capsys.readouterr().err
        assert f"a.tar, sample '1': the label is {WILD}" in said
        assert "--on-error skip" in said
    with pytest.raises(DataError, match=r"sample '1': the label is"):
        data_facts(DataSettings.of(tmp_path))
    with pytest.raises(DataError, match=r"sample '1': the label is"):
        open_index(tmp_path)
    assert FORMAT_VERSION == 1


@pytest.mark.case("F16")
def test_what_a_label_may_look_like() -> None:
    assert [parse_label(text, {}) for text in (b" 7\n", b"+7", b"007", b"999999", b"-1", "\u00a07".encode())] == [
        7, 7, 7, 999_999, -1, 7,
    ]  # fmt: skip
    assert check_label(999_999) == 999_999
    for odd in (
        b"3.0",
        b"True",
        b"1e3",
        b"0x1",
        b"1_000",
        "\u0663".encode(),
        "\u00b2".encode(),
        b"1 2",
        b"--1",
        b"",
        b"nan",
    ):
        with pytest.raises(ValueError, match="the label is"):
            parse_label(odd, {})
    for wild in (b"1000000", b"9" * 39, b"-1000000"):
        with pytest.raises(ValueError, match="classes are numbered from 0 to at most 999999"):
            parse_label(wild, {})
    assert parse_label(b"1000000", {"1000000": 4}) == 4  # a class of that name


@pytest.mark.case("F11")
def test_tars_hold_what_the_decoder_reads_and_name_what_it_does_not(tmp_path: Path, lab: SimpleNamespace) -> None:
    read = ("AVIF", "avif"), ("JPEG2000", "jp2"), ("TGA", "tga"), ("ICO", "ico")
    members = [(f"{i}.{extension}", lab.image_bytes(i, format=format)) for i, (format, extension) in enumerate(read)]
    members += [("x.heic", b"heic"), ("y.heic", b"heic"), ("z.a.jxl", b"jxl"), ("w.txt", b"text")]
    lab.write_tar(tmp_path / "a.tar", members)
    index, report = build_index(tmp_path, [tmp_path / "a.tar"])
    assert index.num_samples == 4
    assert report.ignored == {"unreadable_heic": 2, "unreadable_jxl": 1, "no_image": 1}
    assert "ignored members: no_image 1, unreadable_heic 2, unreadable_jxl 1" in report.lines()
    with make_loader(tmp_path, image_size=8, channels=3, global_batch_size=4) as loader:
        batch = next(iter(loader))
    assert sorted(batch.ids.tolist()) == [0, 1, 2, 3]
    lab.write_tar(tmp_path / "b.tar", members[4:])
    with pytest.raises(
        DataError, match=r"no sample found in any of the 1 shards .*unreadable_heic 2, unreadable_jxl 1"
    ):
        build_index(tmp_path, [tmp_path / "b.tar"])
