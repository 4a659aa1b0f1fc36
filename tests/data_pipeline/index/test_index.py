"""The index: key rules, labels, damaged shards, patterns, and that it is written whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.index.index import NO_LABEL
from tarflow.data_pipeline.index.patterns import expand_braces, find_shards
from tarflow.data_pipeline.index.samples import Rules
from tarflow.data_pipeline.index.tar.fields import split_name
from tarflow.data_pipeline.index.tar.grouping import group
from tarflow.data_pipeline.index.tar.members import TarScan
from tarflow.data_pipeline.storage.open_index import open_index
from tests.helpers.effort import draws
from tests.helpers.ranks import launch_ranks


def index_of(root: Path, shards: list[Path], **options: Any) -> list[tuple[str, str, int]]:
    """(key, field, label) of every sample, after indexing."""
    index, _ = build_index(root, shards, **options)
    rows = []
    for shard in range(len(index.shard_sizes)):
        table = index.read(shard).to_pydict()
        labels = index.rows(shard).labels.tolist()
        rows += list(zip(table["key"], map(str, table["ext"]), labels))
    return rows


def test_counts_offsets_and_labels(make_set: Callable[..., Path], lab: SimpleNamespace) -> None:
    root = make_set([4, 0, 3], classes=2)
    index = open_index(root)
    assert index.num_samples == 7
    assert index.shard_sizes.tolist() == [4, 0, 3]
    assert (index.classes, index.num_classes, index.unlabelled) == (None, 2, 0)
    assert index.key(2, 1) == "00005"
    assert len(index.read(1)) == 0
    rows = index.rows(2)
    data = index.shard_path(2).read_bytes()[rows.offsets[1] : rows.offsets[1] + rows.sizes[1]]
    assert data == lab.image_bytes(5)
    with pytest.raises(DataError, match="sample 7 does not exist"):
        index.locate(7)


def test_a_set_written_by_plain_webdataset_is_read_by_it_and_by_us(tmp_path: Path, lab: SimpleNamespace) -> None:
    with wds.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"{i:04d}", "png": lab.image_bytes(i), "cls": i % 3, "json": {"x": i}})
    shards, _ = find_shards(tmp_path)
    ours = [(key, label) for key, _, label in index_of(tmp_path, shards)]
    theirs = wds.WebDataset([str(s) for s in shards], shardshuffle=False)
    assert ours == [(sample["__key__"], int(sample["cls"])) for sample in theirs]


def test_many_parts(tmp_path: Path, lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow.data_pipeline.index.writer.SHARDS_PER_PART", 3)
    shards = lab.write_shards(tmp_path, [1, 2, 0, 3, 1, 1, 2, 1])
    index, _ = build_index(tmp_path, shards)
    assert len(list((tmp_path / "index").glob("samples-*.parquet"))) == 3
    keys = [index.key(*index.locate(i)) for i in range(index.num_samples)]
    assert keys == [f"{i:05d}" for i in range(11)]


@pytest.mark.case("D05")
def test_dotted_unicode_and_hidden_names(tmp_path: Path, lab: SimpleNamespace) -> None:
    composed, decomposed = (unicodedata.normalize(form, "été_01") for form in ("NFC", "NFD"))
    bases = ["train.v1/0001", "a/22.05", "x.y.z", composed, decomposed]
    members = []
    for i, base in enumerate(bases):
        members += [(f"{base}.jpg", lab.image_bytes(i)), (f"{base}.cls", str(i).encode())]
    members += [
        ("0002.JPEG", b"x"),
        ("0002.CLS", b"7\n"),
        (".hidden.jpg", b"x"),
        ("dir/noext", b"x"),
        ("dir/.x.png", b"y"),
    ]
    lab.write_tar(tmp_path / "a.tar", members)
    rows = index_of(tmp_path, [tmp_path / "a.tar"])
    assert rows == [
        ("train.v1/0001", "jpg", 0),
        ("a/22", "05.jpg", 1),
        ("x", "y.z.jpg", 2),
        (composed, "jpg", 3),
        (decomposed, "jpg", 4),
        ("0002", "jpeg", 7),
    ]
    _, report = build_index(tmp_path, [tmp_path / "a.tar"])
    assert report.ignored == {"hidden": 2, "no_extension": 1}
    # the keys are webdataset's
    for name, _ in members[:4]:
        ours = split_name(name.encode())
        assert ours is not None
        assert tuple(part.decode() for part in ours) == wds.tariterators.base_plus_ext(name)


@pytest.mark.case("D05")
def test_dotted_names_that_collide_are_named(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_tar(tmp_path / "a.tar", [("v1.5_1.jpg", b"x"), ("v1.5_2.jpg", b"y"), ("ok.jpg", b"z")])
    with pytest.raises(DataError, match=r"a\.tar: sample 'v1' has 2 images .*v1\.5_1\.jpg.*first dot"):
        build_index(tmp_path, [tmp_path / "a.tar"])
    index, report = build_index(tmp_path, [tmp_path / "a.tar"], on_error="skip")
    assert (index.num_samples, report.problems) == (1, {"several_images": 1})


def test_a_member_without_image_is_counted(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_tar(tmp_path / "a.tar", [("a.txt", b"x"), ("a.json", b"{}"), ("b.png", b"y"), ("b.seg.png", b"mask")])
    index, report = build_index(tmp_path, [tmp_path / "a.tar"])
    assert (index.num_samples, report.ignored, index.key(0, 0)) == (1, {"no_image": 1}, "b")


@pytest.mark.case("D06")
def test_labels_are_parsed_or_named(tmp_path: Path, lab: SimpleNamespace) -> None:
    good = {"0000": b"7\n", "0001": b"999", "0002": b"1000", "0003": b"-1", "0004": None}
    members: list[tuple[str, bytes]] = []
    for key, label in good.items():
        members.append((f"{key}.png", lab.image_bytes(0)))
        if label is not None:
            members.append((f"{key}.cls", label))
    lab.write_tar(tmp_path / "a.tar", members)
    assert [label for _, _, label in index_of(tmp_path, [tmp_path / "a.tar"])] == [7, 999, 1000, -1, NO_LABEL]
    for bad, what in ((b"cat", "'cat'"), (b"", "empty"), (b"1.0", "'1.0'"), (b"9" * 30, "99999")):
        lab.write_tar(tmp_path / "b.tar", [*members, ("0005.png", b"x"), ("0005.cls", bad)])
        with pytest.raises(DataError, match=rf"b\.tar: member '0005\.cls': the label is .*{what}"):
            build_index(tmp_path, [tmp_path / "b.tar"])
        index, report = build_index(tmp_path, [tmp_path / "b.tar"], on_error="skip")
        assert (index.num_samples, report.problems) == (5, {"malformed_label": 1})


def test_labels_by_class_name(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_tar(tmp_path / "a.tar", [("a.png", b"x"), ("a.cls", b"dog\n"), ("b.png", b"x"), ("b.cls", b"0")])
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog"]))
    assert [label for _, _, label in index_of(tmp_path, [tmp_path / "a.tar"])] == [1, 0]
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "cat"]))
    with pytest.raises(DataError, match=r"classes\.json names a class twice: cat"):
        build_index(tmp_path, [tmp_path / "a.tar"])


@pytest.mark.case("D02")
def test_a_cut_shard_gives_exactly_its_whole_samples(tmp_path: Path, lab: SimpleNamespace) -> None:
    shards = []
    for name in ("a", "b", "c"):
        path = tmp_path / f"{name}.tar"
        lab.write_tar(path, [(f"{name}{i}.{ext}", os.urandom(3000)) for i in range(8) for ext in ("jpg", "txt")])
        shards.append(path)
    with shards[1].open("r+b") as file:
        file.truncate(16_000)
    with pytest.raises(DataError, match=r"b\.tar: damaged, member 'b2\.jpg': the file ends at byte 16000"):
        build_index(tmp_path, shards)
    assert not (tmp_path / "index").exists()
    index, report = build_index(tmp_path, shards, on_error="skip")
    assert index.shard_sizes.tolist() == [8, 2, 8]
    assert report.problems == {"damaged_shard": 1}
    assert "b.tar" in report.examples[0]
    for cut in range(0, 30_000, 700):  # never a half sample, wherever the cut is
        lab.write_tar(shards[1], [(f"b{i}.{ext}", b"x" * 3000) for i in range(8) for ext in ("jpg", "txt")])
        with shards[1].open("r+b") as file:
            file.truncate(cut)
        index, _ = build_index(tmp_path, shards, on_error="skip")
        assert index.shard_sizes[1] == cut // 7168


def test_duplicate_members_strict_names_them_skip_keeps_the_first(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_tar(tmp_path / "a.tar", [("a.png", b"first"), ("a.cls", b"1"), ("b.png", b"b"), ("a.png", b"second!")])
    with pytest.raises(DataError, match=r"a\.tar: member 'a\.png' appears twice"):
        build_index(tmp_path, [tmp_path / "a.tar"])
    index, report = build_index(tmp_path, [tmp_path / "a.tar"], on_error="skip")
    assert (index.num_samples, report.problems, index.rows(0).sizes.tolist()) == (2, {"duplicate_member": 1}, [5, 1])


@pytest.mark.case("D01")
def test_empty_shards_are_named_and_only_empty_ones_refused(tmp_path: Path, lab: SimpleNamespace) -> None:
    shards = lab.write_shards(tmp_path, [2, 0, 1])
    _, report = build_index(tmp_path, shards)
    assert report.empty_shards == [str(shards[1])]
    for shard in shards:
        lab.write_tar(shard, [])
    with pytest.raises(
        DataError, match=f"no sample found in any of the 3 shards of {tmp_path}, the first is {shards[0]}"
    ):
        build_index(tmp_path, shards)


@pytest.mark.case("D09")
def test_globs_braces_and_lists_mean_the_same(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_shards(tmp_path, [])
    for name in ("train_000", "train_001", "train_002", "val_8", "val_9", "val_10", "val_11"):
        lab.write_tar(tmp_path / f"{name}.tar", [("a.png", b"x")])
    expected = [tmp_path.resolve() / f"train_{i:03d}.tar" for i in range(3)]
    for pattern in (
        f"{tmp_path}/train_*.tar",
        f"{tmp_path}/train_{{000..002}}.tar",
        f"{tmp_path}/train_{{002,000,001}}.tar",
        f"{tmp_path}/train_00[0-2].tar",
        [str(path) for path in reversed(expected)],
        [f"{tmp_path}/train_{{000..001}}.tar", f"{tmp_path}/train_*2.tar"],
    ):
        assert find_shards(pattern) == (expected, [])
    assert len(find_shards(f"{tmp_path}/val_{{8..11}}.tar")[0]) == 4
    assert len(find_shards(tmp_path)[0]) == 7
    paths, notes = find_shards([str(expected[0]), f"{tmp_path}/train_*.tar"])
    assert paths == expected
    assert len(notes) == 1
    assert "train_000.tar is named twice" in notes[0]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{root}/none_*.tar", r"none_\*\.tar' matches no file"),
        ("{root}/train_{{000..003}}.tar", r"1 shard files are missing: .*train_003\.tar"),
        ("{root}/train_{{2..0}}.tar", "runs backwards"),
        ("{root}/train_{{abc}}.tar", "cannot read {abc}"),
        ("{root}/a{{1..3}} {root}/b{{1..3}}", "2 patterns in one string"),
        ("https://host/a-{{0..3}}.tar", r"is an address: index the shards where they lie in a file system"),
        ("{root}/missing.tar", r"no file, folder or match for .*missing\.tar"),
        ("{root}/empty", r"empty' holds no \*\.tar"),
    ],
)
@pytest.mark.case("D09")
def test_patterns_that_cannot_be_right_are_refused(
    tmp_path: Path, lab: SimpleNamespace, pattern: str, message: str
) -> None:
    lab.write_shards(tmp_path, [])
    (tmp_path / "empty").mkdir()
    for i in range(3):
        lab.write_tar(tmp_path / f"train_{i:03d}.tar", [("a.png", b"x")])
    with pytest.raises(DataError, match=message):
        find_shards(pattern.format(root=tmp_path))


@pytest.mark.case("H06")
@pytest.mark.parametrize("what", ["pipe", "empty folder", "link to nothing"])
@pytest.mark.parametrize("pattern", ["", "*.tar", "**/*.tar", "s000{0..2}.tar"])
def test_what_is_no_file_among_the_shards_is_refused_not_left_out(
    tmp_path: Path, lab: SimpleNamespace, what: str, pattern: str
) -> None:
    for number in (0, 2):
        lab.write_tar(tmp_path / f"s000{number}.tar", [("a.png", b"x")])
    odd = tmp_path / "s0001.tar"
    if what == "pipe":
        os.mkfifo(odd)
    elif what == "empty folder":
        odd.mkdir()
    else:
        odd.symlink_to("nowhere")
    with pytest.raises(DataError, match=r"s0001\.tar"):
        find_shards(tmp_path / pattern)


def test_braces() -> None:
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("a{8..11}b") == ["a8b", "a9b", "a10b", "a11b"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain") == ["plain"]
    assert expand_braces("{a,b{1..2}}.tar") == ["a.tar", "b1.tar", "b2.tar"]
    with pytest.raises(DataError, match=r"the braces in 'a\{1\.\.2' do not match"):
        expand_braces("a{1..2")


def test_the_fingerprint_follows_the_data_not_the_folder(tmp_path: Path, lab: SimpleNamespace) -> None:
    def fingerprint(name: str, sizes: list[int], **options: int) -> str:
        shards = lab.write_shards(tmp_path / name, sizes, **options)
        return str(build_index(tmp_path / name, shards)[0].fingerprint)

    first = fingerprint("a", [3, 2])
    assert fingerprint("b", [3, 2]) == first
    assert len({first, fingerprint("c", [2, 3]), fingerprint("d", [3, 2], classes=2), fingerprint("e", [3, 2, 1])}) == 4
    assert (
        build_index(tmp_path / "a", sorted((tmp_path / "a").glob("*.tar")), classes=["x", "y", "z"])[0].fingerprint
        != first
    )


def index_and_be_killed(root: Path) -> None:
    build_index(root, sorted(root.glob("*0.tar")), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def test_a_failed_or_killed_rewrite_leaves_the_old_index(make_set: Callable[..., Path], lab: SimpleNamespace) -> None:
    root = make_set([3, 2])
    before = open_index(root).fingerprint
    (root / "shard-0001.tar").write_bytes(b"no tar" * 300)
    with pytest.raises(DataError, match=r"shard-0001\.tar"):
        build_index(root, sorted(root.glob("*.tar")))
    assert open_index(root).fingerprint == before
    killed = launch_ranks(index_and_be_killed, 1, root, may_fail=True)
    assert killed.codes == [-signal.SIGKILL]
    assert (root / "index.partial").exists()
    assert open_index(root).fingerprint == before
    build_index(root, sorted(root.glob("*0.tar")))
    assert sorted(path.name for path in root.iterdir()) == ["index", "shard-0000.tar", "shard-0001.tar"]


def test_an_index_that_is_rewritten_while_open_is_noticed(make_set: Callable[..., Path], lab: SimpleNamespace) -> None:
    root = make_set([3, 2])
    old = open_index(root)
    lab.write_shards(root, [2, 3])
    build_index(root, sorted(root.glob("*.tar")))
    with pytest.raises(DataError, match="rewritten while in use"):
        old.rows(0)


@pytest.mark.parametrize("damage", ["gone", "empty", "garbage", "version"])
def test_a_bad_index_says_how_to_make_a_new_one(make_set: Callable[..., Path], damage: str, tmp_path: Path) -> None:
    root = make_set([3])
    file = root / "index" / "shards.parquet"
    if damage == "gone":
        file.unlink()
    elif damage == "version":
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        meta = json.loads(table.schema.metadata[b"tarflow.index"]) | {"format_version": 99}
        pq.write_table(table.replace_schema_metadata({b"tarflow.index": json.dumps(meta).encode()}), file)
    else:
        file.write_bytes(b"" if damage == "empty" else b"x" * 1000)
    with pytest.raises(DataError, match=f"tarflow data index {root}"):
        open_index(root)


def test_what_is_no_data_set_is_said(make_set: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_index(tmp_path / "none")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=r"no index and no \*\.tar"):
        open_index(tmp_path / "hollow")
    make_set([1], name="both/train")
    make_set([1], name="both/val")
    with pytest.raises(DataError, match="holds the splits train, val"):
        open_index(tmp_path / "both")


def test_the_row_cache_is_bounded(make_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tarflow.data_pipeline.index.index._CACHE_ROWS", 10)
    index = open_index(make_set([6] * 5))
    for _ in range(2):
        for shard in range(5):
            assert np.diff(index.rows(shard).offsets).min() > 0
    assert len(index._rows) == 1


member_names = st.one_of(
    st.builds(lambda n, e: f"{n:03d}.{e}", st.integers(0, 6), st.sampled_from(["jpg", "cls", "json", "JPG", "a.jpg"])),
    st.sampled_from([".h.jpg", "d/1.jpg", "d.1/2.cls", "noext", "__m__.jpg", "__x__", "1..jpg", ".", "é.png"]),
)


@given(
    st.lists(st.tuples(member_names, st.sampled_from([b"", b"1", b"cat", b"x" * 300])), max_size=10)
    | st.builds(
        lambda n, fields: [(f"{i:03d}.{e}", b"1") for i in range(n) for e in fields],
        st.integers(1, 5), st.lists(st.sampled_from(["jpg", "cls", "json", "png", "a.jpg", "b.jpg", "jpg.cls"]), min_size=1, max_size=3),
    )
)  # fmt: skip
@settings(max_examples=draws(200), deadline=None)
@pytest.mark.case("D05")
def test_the_quick_way_for_regular_shards_gives_what_the_general_way_gives(
    members: list[tuple[str, bytes]],
) -> None:
    scan = TarScan(Path("s.tar"), 0, [name.encode() for name, _ in members], list(range(len(members))),
                   [len(content) for _, content in members], {i: content for i, (_, content) in enumerate(members)})  # fmt: skip
    for wanted in (None, "jpg", "a.jpg"):
        rules = Rules(strict=False, image_field=wanted)
        assert group(scan, "s.tar", rules) == group(scan, "s.tar", rules, quick=False)


@pytest.mark.case("D06")
def test_labels_inside_json_members(tmp_path: Path, lab: SimpleNamespace) -> None:
    """img2dataset writes key.jpg, key.json and key.txt."""
    fields = [{"label": 3}, {"label": "2"}, {"other": 1}, {"label": None}, {"label": 7, "caption": "x" * 5000}]
    members: list[tuple[str, bytes]] = []
    for i, content in enumerate(fields):
        members += [(f"{i:09d}.jpg", b"x"), (f"{i:09d}.json", json.dumps(content).encode()), (f"{i:09d}.txt", b"a")]
    lab.write_tar(tmp_path / "a.tar", members)
    shards = [tmp_path / "a.tar"]
    assert [label for _, _, label in index_of(tmp_path, shards, label_field="json:label")] == [
        3,
        2,
        NO_LABEL,
        NO_LABEL,
        7,
    ]
    assert {label for _, _, label in index_of(tmp_path, shards)} == {NO_LABEL}
    for bad, message in (
        (b'{"label": "cat"}', r"the label is 'cat', expected an integer .*--classes"),
        (b'{"label": 1.5}', "'label' is 1.5"),
        (b'{"label": true}', "'label' is True"),
        (b"[1]", "not a JSON object"),
        (b"{", "is not JSON"),
    ):
        lab.write_tar(tmp_path / "a.tar", [*members, ("x.jpg", b"x"), ("x.json", bad)])
        with pytest.raises(DataError, match=rf"a\.tar: member 'x\.json': .*{message}"):
            index_of(tmp_path, shards, label_field="json:label")
    names = [("x.jpg", b"x"), ("x.json", b'{"meta": {"class": "cat"}}')]
    lab.write_tar(tmp_path / "a.tar", names)
    found = index_of(tmp_path, shards, label_field="json:meta.class", classes=["dog", "cat"])
    assert [label for _, _, label in found] == [1]


def test_image_sizes_are_stored_when_asked_for(tmp_path: Path, lab: SimpleNamespace) -> None:
    lab.write_tar(
        tmp_path / "a.tar",
        [("0.png", lab.image_bytes(0, 9)), ("1.png", b"broken"), ("2.jpg", lab.image_bytes(0, 5, "JPEG"))],
    )
    for measure, expected in ((False, [None] * 3), (True, [9, None, 5])):
        index, _ = build_index(tmp_path, [tmp_path / "a.tar"], measure=measure)
        assert index.read(0, ["width", "height"]).to_pydict() == {"width": expected, "height": expected}


def test_several_processes_write_the_index_of_one(tmp_path: Path, lab: SimpleNamespace) -> None:
    shards = lab.write_shards(tmp_path, [3, 0, 5, 2])
    one = build_index(tmp_path, shards, processes=1)[0].fingerprint
    assert build_index(tmp_path, shards, processes=2)[0].fingerprint == one
    shards[2].write_bytes(b"no tar" * 300)
    with pytest.raises(DataError, match=r"shard-0002\.tar"):
        build_index(tmp_path, shards, processes=2)
