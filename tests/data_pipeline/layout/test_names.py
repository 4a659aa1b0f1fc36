"""Names of classes, files and shards as they come: stored whole, or refused before any work."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.index.classes import parse_classes
from tarflow.data_pipeline.layout.names import LONGEST, class_names, shown
from tarflow.data_pipeline.prepare.sources import open_source
from tarflow.data_pipeline.prepare.write import Options, prepare
from tarflow.data_pipeline.storage.open_index import open_index

LATIN = os.fsdecode(b"caf\xe9")
NFC, NFD = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))


def classes_of(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / name / "a.png")
    return root


@pytest.mark.case("F15")
def test_a_class_folder_that_is_not_utf8_is_refused_before_the_work(tmp_path: Path) -> None:
    source = classes_of(tmp_path / "in", LATIN, "tea")
    done = subprocess.run(
        [sys.executable, "-m", "tarflow", "data", "prepare", source, tmp_path / "out", "--size", "4"],
        capture_output=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.decode().endswith(r"the class name 'caf\xe9' is not UTF-8: rename it" + "\n")
    assert "Traceback" not in done.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.case("F15")
def test_files_that_are_not_utf8_are_read_and_shown(tmp_path: Path) -> None:
    source = classes_of(tmp_path / "in", "tea")
    (source / "tea" / "a.png").rename(source / "tea" / f"{LATIN}\n.png")
    prepare(open_source(source), tmp_path / "out", Options(size=4))
    assert open_index(tmp_path / "out").num_samples == 1
    (source / "tea" / f"{LATIN}\n.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"tea/caf\\xe9\\n\.png: not an image"):
        prepare(open_source(source), tmp_path / "out2", Options(size=4))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a\nb"], r"'a\nb' holds a control character"),
        (["a", "\x1b[31mred"], r"'\x1b[31mred' holds a control character"),
        (["a\u2028b"], "holds a control character"),
        ([""], "is empty"),
        (["  "], "is empty"),
        (["x" * (LONGEST + 1)], f"has {LONGEST + 1} characters"),
        ([NFC, NFD], "only in Unicode's composed and decomposed form"),
        (["cat", "cat "], "or in spaces"),
        (["cat", "cat"], "names a class twice: cat"),
        (["\udce9"], "is not UTF-8"),
    ],
)
@pytest.mark.case("F15")
def test_names_that_cannot_be_stored_or_told_apart(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        class_names(names, "here")
    assert message in str(caught.value)
    assert str(caught.value).startswith("here")
    (tmp_path / "classes.json").write_text(json.dumps(names))
    with pytest.raises(DataError):
        parse_classes(tmp_path / "classes.json")
    if len(set(names)) == len(names) and "\udce9" not in names:
        pq.write_table(pa.table({"image": [b"x"] * len(names), "label": names}), tmp_path / "a.parquet")
        with pytest.raises(DataError):
            open_source(tmp_path / "a.parquet")


@pytest.mark.case("F15")
def test_composed_and_decomposed_names_are_one_class_over_all_sources(tmp_path: Path, lab: SimpleNamespace) -> None:
    assert open_source(classes_of(tmp_path / "in", NFD)).classes == [NFC]
    (tmp_path / "classes.json").write_text(json.dumps(["tea", NFD]))
    lab.write_tar(
        tmp_path / "a.tar", [("a.png", b"x"), ("a.cls", NFC.encode()), ("b.png", b"x"), ("b.cls", NFD.encode())]
    )
    index, _ = build_index(tmp_path, [tmp_path / "a.tar"])
    assert (index.classes, index.rows(0).labels.tolist()) == (["tea", NFC], [1, 1])


@pytest.mark.case("F15")
def test_names_that_differ_in_case_are_two_classes_and_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.array(["a", "A", "b"]))
    source = open_source(tmp_path / "a.npz")
    assert source.classes == ["A", "a", "b"]
    assert source.notes[-1] == "classes that differ in case alone are kept apart: 'A' and 'a'"


@pytest.mark.case("F15")
def test_folders_and_shards_that_are_not_utf8_are_refused_before_the_work(tmp_path: Path, lab: SimpleNamespace) -> None:
    root = tmp_path / LATIN
    (shard,) = lab.write_shards(root, [1])
    source = open_source(classes_of(tmp_path / "in", "a"))
    for work in (lambda: build_index(root, [shard]), lambda: prepare(source, root, Options(size=4))):
        with pytest.raises(DataError, match=r"caf\\xe9,? is not UTF-8"):
            work()
    renamed = shard.rename(tmp_path / f"{LATIN}.tar")
    with pytest.raises(DataError, match=r"caf\\xe9\.tar is not UTF-8, an index cannot hold it: rename it"):
        build_index(tmp_path, [renamed])
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(root / "a.parquet")
    assert len(open_source(root / "a.parquet")) == 1  # what only reads needs no name that text can hold


@pytest.mark.case("F15")
def test_a_json_list_and_labels_by_name_from_parquet_keep_what_is_odd_but_fine(tmp_path: Path) -> None:
    names = ["a/b", "c: d", "'q'", "#", "日本", "😀", "-1", "null"]
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    pq.write_table(pa.table({"image": [buffer.getvalue()] * len(names), "label": names}), tmp_path / "a.parquet")
    report = prepare(open_source(tmp_path / "a.parquet"), tmp_path / "out", Options(size=4))
    assert report.classes == sorted(names)
    assert open_index(tmp_path / "out").classes == sorted(names)


def test_shown() -> None:
    assert shown(LATIN) == r"caf\xe9"
    assert shown("\ud800\udc7f\udc80\udcff") == r"\ud800\udc7f\x80\xff"
    assert shown("a\nb\x1b\u202eé") == r"a\nb\x1b\u202eé"
