"""`data verify`: every problem is found, in one process or several, over shards, with bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.index.mds import write_mds
from tarflow.data_pipeline.prepare import verify as verify_module
from tarflow.data_pipeline.prepare.contact_sheet import contact_sheet
from tarflow.data_pipeline.prepare.verify import verify
from tarflow.data_pipeline.storage.open_index import open_index


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.case("D02")
def test_every_problem_is_counted_and_named(tmp_path: Path, lab: SimpleNamespace, processes: int) -> None:
    picture = lab.image_bytes
    lab.write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("0.cls", b"0"), ("1.png", picture(1)), ("1.cls", b"5")])
    lab.write_tar(tmp_path / "b.tar", [("2.png", b"broken"), ("2.cls", b"1"), ("0.png", picture(3)), ("0.cls", b"0")])
    lab.write_tar(
        tmp_path / "c.tar", [("3.png", picture(1)), ("3.cls", b"1"), ("4.png", picture(4, 5)), ("4.cls", b"0")]
    )
    shards = sorted(tmp_path.glob("*.tar"))
    index, _ = build_index(tmp_path, shards, classes=["x", "y"])
    report = verify(index, processes=processes)
    assert report.problems == {"key_in_two_shards": 1, "label_out_of_range": 1, "undecodable": 1}
    assert (report.shards, report.samples, report.identical) == (3, 6, 1)
    assert report.labels == {0: 3, 1: 2, 5: 1}
    assert (report.smallest, report.largest) == ((5, 5), (8, 8))
    text = "\n".join(report.lines())
    for piece in (
        "a.tar, sample '1': label 5 is outside 0..1",
        "b.tar, sample '2': not an image",
        "b.tar: key '0' is also in",
    ):
        assert piece in text
    with shards[2].open("r+b") as file:
        file.truncate(900)
    shards[0].unlink()
    report = verify(index, processes=processes)
    assert report.problems == {"damaged_shard": 1, "index_differs": 1, "unreadable_shard": 1, "undecodable": 1}
    assert "a.tar: No such file" in "\n".join(report.lines())


def test_a_label_that_changed_without_moving_anything_is_noticed(tmp_path: Path, lab: SimpleNamespace) -> None:
    for label in (b"1", b"0"):
        lab.write_tar(tmp_path / "a.tar", [("0.png", lab.image_bytes(0)), ("0.cls", label)])
        if label == b"1":
            index, _ = build_index(tmp_path, [tmp_path / "a.tar"])
    assert verify(index).problems == {"index_differs": 1}


def test_repeats_are_found_over_many_buckets(
    make_set: Callable[..., Path], lab: SimpleNamespace, tmp_path: Path
) -> None:
    root = make_set([40, 40])
    shards = sorted(root.glob("*.tar"))
    (root / "again.tar").write_bytes(shards[0].read_bytes())
    index, _ = build_index(root, [*shards, root / "again.tar"])
    report = verify(index)
    assert report.problems == {"key_in_two_shards": 40}
    assert report.identical == 40


def test_the_rules_of_the_index_are_those_of_the_check(tmp_path: Path, lab: SimpleNamespace) -> None:
    """Labels out of JSON members, and MDS shards."""
    meta = [json.dumps({"meta": {"class": i % 2}}).encode() for i in range(4)]
    members = [pair for i in range(4) for pair in ((f"{i}.png", lab.image_bytes(i)), (f"{i}.json", meta[i]))]
    (tmp_path / "tar").mkdir()
    lab.write_tar(tmp_path / "tar" / "a.tar", members)
    index, _ = build_index(tmp_path / "tar", [tmp_path / "tar" / "a.tar"], label_field="json:meta.class")
    report = verify(index)
    assert (report.problems, report.labels) == ({}, {0: 2, 1: 2})
    write_mds(tmp_path / "mds", ((lab.image_bytes(i), i % 2) for i in range(20)), 1500)
    index, _ = build_index(tmp_path / "mds", [tmp_path / "mds"])
    assert len(index.shard_sizes) > 1
    report = verify(index)
    assert (report.problems, report.samples) == ({}, 20)


def test_remote_data_are_not_dragged_over_the_network(make_set: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"shard file:///.*shard-0000\.tar is remote"):
        verify(open_index(f"file://{make_set([3])}"))


def test_marks_are_spread_over_files_and_sorted_one_by_one(tmp_path: Path) -> None:
    marks = verify_module._Marks(tmp_path / "m")
    hashes = np.random.default_rng(0).integers(0, 2**63, 3000, dtype=np.uint64)
    hashes[2000:] = hashes[:1000]
    hashes[2999] = hashes[2998] = hashes[0]
    table = np.zeros(3000, verify_module._MARK)
    table["hash"], table["sample"] = hashes, np.arange(3000)
    for piece in np.split(table, 7 * [0] + [500, 1700]):
        marks.add(piece)
    assert len(list((tmp_path / "m").iterdir())) > 100
    found = sorted(marks.repeated())
    assert found == sorted([(i, 2000 + i) for i in range(998)] + [(0, 2998), (0, 2999)])


def test_the_contact_sheet_shows_bad_samples_grey(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_tar(tmp_path / "a.tar", [("0.png", lab.image_bytes(200)), ("1.png", b"broken")])
    index, _ = build_index(tmp_path, [tmp_path / "a.tar"])
    sheet = contact_sheet(index, 10, 4)
    assert sheet.shape == (6, 12, 3)
    assert sheet[0, 0].tolist() == [200, 0, 77]
    assert sheet[0, 6].tolist() == [128, 128, 128]
    assert sheet[5, 0].tolist() == [255, 255, 255]
