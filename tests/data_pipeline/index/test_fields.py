"""Tars as they are in the wild: links, sparse members, several images, labels in odd places; and what indexing says of it."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tarflow.cli import parse
from tarflow.data_pipeline.errors import DataError
from tarflow.data_pipeline.index.build import build_index
from tarflow.data_pipeline.index.index import NO_LABEL, Index
from tarflow.data_pipeline.index.labels import label_gaps
from tarflow.data_pipeline.index.tar.scan import scan_tar
from tarflow.data_pipeline.prepare.verify import verify
from tarflow.data_pipeline.storage.local_shards import LocalShards
from tarflow.data_pipeline.storage.open_index import open_index


def samples(index: Index) -> dict[str, tuple[bytes, int | None]]:
    """Key -> (bytes of the image, label)."""
    files = LocalShards(index)
    found = {}
    for shard in range(len(index.shard_sizes)):
        rows = index.rows(shard)
        for row, label in enumerate(rows.labels.tolist()):
            data = files.read(shard, int(rows.offsets[row]), int(rows.sizes[row]))
            found[index.key(shard, row)] = (data, None if label == NO_LABEL else label)
    files.close()
    return found


def link(tar: tarfile.TarFile, name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.case("F18")
def test_a_hard_link_to_a_member_is_that_member(tmp_path: Path, format: int) -> None:
    """As tar itself writes equal files that are links of each other on the disk."""
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        add(tar, "./0.png", b"zero")
        add(tar, "./0.cls", b"7")
        for i in range(1, 4):
            add(tar, f"./{i}.png", f"{i}".encode())
            link(tar, f"./{i}.cls", "./0.cls" if i < 3 else f"./{i - 1}.cls")
        link(tar, "./4.png", "0.png")
        add(tar, "./4.cls", b"1")
        link(tar, "./5.cls", "./gone.cls")
        add(tar, "./5.png", b"five")
    index, report = build_index(tmp_path, [tmp_path / "a.tar"])
    assert samples(index) == {
        "./0": (b"zero", 7), "./1": (b"1", 7), "./2": (b"2", 7), "./3": (b"3", 7), "./4": (b"zero", 1), "./5": (b"five", None)
    }  # fmt: skip
    assert report.ignored == {"link_to_nothing": 1}


@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.case("F18")
def test_links_with_long_names_and_symbolic_ones(tmp_path: Path, format: int) -> None:
    long = "x" * 150
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        add(tar, f"labels/{long}.cls", b"3")
        add(tar, "a/0.png", b"zero")
        link(tar, "a/0.cls", f"labels/{long}.cls")
        add(tar, f"a/{long}.png", b"long")
        link(tar, f"a/{long}.cls", f"../labels/{long}.cls", tarfile.SYMTYPE)
        add(tar, "a/2.png", b"two")
        link(tar, "a/2.cls", "/etc/passwd", tarfile.SYMTYPE)
    index, report = build_index(tmp_path, [tmp_path / "a.tar"])
    assert samples(index) == {"a/0": (b"zero", 3), f"a/{long}": (b"long", 3), "a/2": (b"two", None)}
    assert report.ignored == {"link_to_nothing": 1, "no_image": 1}


@pytest.mark.case("F18")
def test_a_tar_of_linked_files_as_gnu_tar_packs_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a0.cls").write_text("5")
    for i in range(3):
        (folder / f"a{i}.png").write_bytes(bytes([65 + i]))
        if i:
            (folder / f"a{i}.cls").hardlink_to(folder / "a0.cls")
    names = sorted(path.name for path in folder.iterdir())
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", folder, *names], check=True)
    index, _ = build_index(tmp_path, [tmp_path / "a.tar"])
    assert samples(index) == {"a0": (b"A", 5), "a1": (b"B", 5), "a2": (b"C", 5)}


@pytest.mark.parametrize("format", ["gnu", "posix", "oldgnu"])
@pytest.mark.case("F18")
def test_sparse_members_are_named_and_what_follows_is_read(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "b.png").open("wb") as file:
        for hole in range(1, 40):  # more holes than the header of a member holds
            file.seek(hole << 16)
            file.write(b"x" * 4096)
        file.truncate(41 << 16)
    (folder / "a.png").write_bytes(b"a")
    (folder / "c.png").write_bytes(b"c")
    tar: list[str | Path] = ["tar", f"--format={format}", "--sparse", "-cf", tmp_path / "a.tar", "-C", folder]
    tar += ["a.png", "b.png", "c.png"]
    subprocess.run(tar, check=True)
    scan = scan_tar(tmp_path / "a.tar")
    assert (scan.names, scan.sparse, scan.damage, scan.not_files) == ([b"a.png", b"c.png"], [b"b.png"], None, 0)
    with pytest.raises(DataError, match=r"a\.tar: member 'b\.png' is stored sparse, .* pack it without --sparse"):
        build_index(tmp_path, [tmp_path / "a.tar"])
    index, report = build_index(tmp_path, [tmp_path / "a.tar"], on_error="skip")
    assert samples(index) == {"a": (b"a", None), "c": (b"c", None)}
    assert report.problems == {"sparse_member": 1}
    (folder / "b.png").rename(folder / "b.npy")
    subprocess.run([*tar[:-2], "b.npy", "c.png"], check=True)
    index, report = build_index(tmp_path, [tmp_path / "a.tar"])
    assert (list(samples(index)), report.ignored) == (["a", "c"], {"sparse": 1})


@pytest.mark.parametrize("minor", ["0.0", "0.1", "1.0"])
@pytest.mark.case("F18")
def test_sparse_members_of_every_posix_version(tmp_path: Path, minor: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "b.png").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    (folder / "c.png").write_bytes(b"c")
    subprocess.run(
        ["tar", "--format=posix", "--sparse", f"--sparse-version={minor}", "-cf", tmp_path / "a.tar", "-C", folder, "b.png", "c.png"],
        check=True,
    )  # fmt: skip
    scan = scan_tar(tmp_path / "a.tar")
    assert (scan.names, scan.sparse, scan.damage) == ([b"c.png"], [b"b.png"], None)


@pytest.mark.case("F18")
def test_a_label_behind_the_name_of_the_image(tmp_path: Path, lab: SimpleNamespace) -> None:
    pairs = [(f"{i}.{end}", str(i).encode()) for i in range(3) for end in ("jpg", "jpg.cls")]
    odd = [*pairs, ("d/v.1/3.png", b"3"), ("d/v.1/3.png.cls", b"3"), ("4.05.png", b"4"), ("4.05.cls", b"4")]
    for members, count in ((pairs, 3), (odd, 5)):  # the quick way and the general one
        lab.write_tar(tmp_path / "a.tar", members)
        index, _ = build_index(tmp_path, [tmp_path / "a.tar"])
        assert [(data, label) for data, label in samples(index).values()] == [
            (str(i).encode(), i) for i in range(count)
        ]


@pytest.mark.case("F18")
def test_several_images_need_a_choice(tmp_path: Path, lab: SimpleNamespace) -> None:
    fields = ("input.png", "target.png", "cls")
    members = [(f"{i}.{what}", what.encode() if what != "cls" else b"1") for i in range(2) for what in fields]
    lab.write_tar(tmp_path / "a.tar", members)
    with pytest.raises(
        DataError, match=r"2 images \('0\.input\.png' and '0\.target\.png'\).*--image-field input\.png takes that one"
    ):
        build_index(tmp_path, [tmp_path / "a.tar"])
    for field in ("input.png", "TARGET.png"):
        assert run_index(tmp_path, "--image-field", field) == 0
        index = open_index(tmp_path)
        assert samples(index) == {str(i): (field.lower().encode(), 1) for i in range(2)}
        assert not verify(index).problems["index_differs"], "it looks by the same rules"
    two = [("0.jpg", b"j"), ("0.png", b"p"), ("0.input.cls", b"4")]
    lab.write_tar(tmp_path / "a.tar", two)
    with pytest.raises(DataError, match="--image-field jpg"):
        build_index(tmp_path, [tmp_path / "a.tar"])
    assert samples(build_index(tmp_path, [tmp_path / "a.tar"], image_field="png")[0]) == {"0": (b"p", None)}
    with pytest.raises(DataError, match="no sample found"):
        build_index(tmp_path, [tmp_path / "a.tar"], image_field="webp")
    lab.write_tar(tmp_path / "a.tar", [("0.input.png", b"i"), ("0.target.png", b"t"), ("0.input.cls", b"4")])
    assert samples(build_index(tmp_path, [tmp_path / "a.tar"], image_field="input.png")[0]) == {"0": (b"i", 4)}


def run_index(*words: object) -> int:
    args = parse(["data", "index", *map(str, words)])
    return int(args.command.run(args))


@pytest.mark.case("F18")
def test_indexing_says_which_fields_it_saw_and_what_has_no_label(
    tmp_path: Path, lab: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{i}.png", b"x") for i in range(5)] + [(f"{i}.cls", str(i % 2).encode()) for i in range(3)]
    lab.write_tar(tmp_path / "a.tar", [*members, ("4.json", json.dumps({"id": 4}).encode())])
    assert run_index(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fields seen: png 5, cls 3, json 1" in lines
    assert "images: from png 5" in lines
    assert "labels: 3 of 5 samples, from cls; 2 have none" in lines
    assert open_index(tmp_path).meta["origin"] == lines[1:4]
    (tmp_path / "classes.json").write_text('["a", "b"]')
    assert run_index(tmp_path) == 0
    assert "class names: 2, from classes.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("members", "hint"),
    [
        ([("0.png", b"x"), ("0.json", b'{"label": 3, "box": [1], "text": "' + b"x" * 100 + b'"}')], "json:KEY takes them from .json, which holds label"),
        ([("0.png", b"x"), ("0.json", b"[1]"), ("0.txt", b"cat"), ("0.class", b"3")], "--label-field NAME from another of the fields: txt, class"),
        ([("0.png", b"x"), ("0.json", b"{")], "(looked for in cls)"),
        ([("0.png", b"x")], "(looked for in cls)"),
    ],
)  # fmt: skip
@pytest.mark.case("F18")
def test_where_labels_may_be_is_said(
    tmp_path: Path, lab: SimpleNamespace, members: list[tuple[str, bytes]], hint: str
) -> None:
    lab.write_tar(tmp_path / "a.tar", members)
    _, report = build_index(tmp_path, [tmp_path / "a.tar"])
    (line,) = [line for line in report.lines() if line.startswith("labels:")]
    assert line.startswith("labels: none of 1 samples has one (looked for in cls)")
    assert line.endswith(hint)


def test_labels_that_do_not_fit_the_classes_are_said(tmp_path: Path, lab: SimpleNamespace) -> None:
    def said(labels: list[int], classes: list[str] | None = None) -> list[str]:
        members = [
            (f"{i}.{what}", data)
            for i, n in enumerate(labels)
            for what, data in (("png", b"x"), ("cls", str(n).encode()))
        ]
        lab.write_tar(tmp_path / "a.tar", members)
        return build_index(tmp_path, [tmp_path / "a.tar"], classes=classes)[1].lines()[4:]

    assert said([0, 1, 2]) == []
    assert said([1, 2, 3]) == ["1 of 4 classes have no image: 0; labels run from 1 to 3, so a model needs 4 classes"]
    assert said([0, 5]) == ["4 of 6 classes have no image: 1, 2, 3, 4"]
    assert (
        label_gaps([0, 10**15], 10**15 + 1)
        == f"{10**15 - 1} of {10**15 + 1} classes have no image: 1, 2, 3, 4, 5, 6, 7, 8 ..."
    )
    assert said([0, -1]) == ["some labels are below 0 (smallest -1), which training refuses"]
    assert said([0, 2], ["a", "b", "c"]) == ["1 of 3 classes have no image: 1"]
    assert said([0, 1, 5], ["a", "b"]) == [
        "labels run to 5, but the list of classes (classes.json, --classes) holds 2 names: training refuses the labels beyond"
    ]
