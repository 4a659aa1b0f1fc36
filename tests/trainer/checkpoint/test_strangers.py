"""A checkpoint that a stranger made: nothing in it is run, and nothing outside it is opened."""

import io
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo

import tarflow.cli
from tarflow.records import DamagedFileError
from tarflow.trainer.checkpoint import commit as ckpt
from tarflow.trainer.checkpoint import retention
from tarflow.trainer.checkpoint.find import find, newest_intact, scan
from tarflow.trainer.checkpoint.marker import MARKER, damage
from tarflow.trainer.checkpoint.metadata import read_metadata
from tarflow.trainer.checkpoint.tensors import load_weights, read_tensors
from tarflow.trainer.checkpoint.unpickle import FlawError, Made, unpickled
from tarflow.trainer.run_dir import create_run
from tarflow.trainer.saving.storage import DiskStorage
from tests.helpers.checkpoints import WEIGHTS, by_step, forge, metadata, tell
from tests.helpers.effort import draws

START = torch.Size([0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("made") / "run"
    create_run(run)
    for step in (1, 2):
        temporary = ckpt.temporary_dir(run, step * 8)
        tensors = {"model/w": torch.full((3,), 0.5), "ema-0.050/w": torch.ones(2, 2), "buffer/var": torch.ones(2)}
        sums = DiskStorage().write(temporary, tensors, None)
        (temporary / "config.yaml").write_text("")
        ckpt.commit(run, temporary, step, step * 8, {"data": "f00"}, sums)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


class Runs:
    """Unpickled, it leaves a file: what harm would be done by."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


class RunsByEval(Runs):
    def __reduce__(self) -> Any:
        return (eval, (f"open({str(self.mark)!r}, 'w').close()",))


def hidden(kind: type[Runs], where: str, mark: Path, found: dcp.Metadata) -> Any:
    """Torch's metadata with something that runs hidden in them."""
    harm = kind(mark)
    if where == "instead of them":
        return harm
    if where == "in planner_data":
        found.planner_data = {"model/w": harm}
    elif where == "as a size":
        found.state_dict_metadata["model/w"].size = harm  # type: ignore[union-attr]
    elif where == "as a file's name":
        next(iter(found.storage_data.values())).relative_path = harm
    elif where == "in a field that nobody knows":
        found.more = harm  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("kind", [Runs, RunsByEval])
@pytest.mark.parametrize(
    "where", ["instead of them", "in planner_data", "as a size", "as a file's name", "in a field that nobody knows"]
)
@pytest.mark.case("H01")
def test_a_pickle_in_the_metadata_runs_nothing(run: Path, tmp_path: Path, kind: type[Runs], where: str) -> None:
    mark, folder = tmp_path / "ran", find(run).path
    found = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(hidden(kind, where, mark, found)))
    forge(folder)
    checkpoint = find(run)
    assert checkpoint.path == folder  # size and checksum fit
    into = {"model/w": torch.empty(3), "ema-0.050/w": torch.empty(2, 2), "buffer/var": torch.empty(2)}
    for read in (lambda: load_weights(checkpoint, "raw"), lambda: read_tensors(checkpoint, into)):
        with pytest.raises(
            DamagedFileError, match=r"\.metadata.*not part of the metadata of tensors.*choose another"
        ) as error:
            read()
        assert len(str(error.value).splitlines()) == 1
    assert "not part of the metadata" in str(damage(checkpoint))
    assert newest_intact(run, lambda _: None).images_seen == 8  # type: ignore[union-attr]
    assert not mark.exists()


@pytest.mark.case("H01")
def test_a_value_that_is_not_a_tensor_is_not_unpickled(run: Path, tmp_path: Path) -> None:
    mark, folder = tmp_path / "ran", find(run).path
    payload = io.BytesIO()
    torch.save(Runs(mark), payload)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data + payload.getvalue())
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.state_dict_metadata["model/w"] = dcp.BytesStorageMetadata()
    place = _StorageInfo(WEIGHTS, len(data), len(payload.getvalue()))
    index = next(i for i in found.storage_data if i.fqn == "model/w")
    for key in (index, dcp.MetadataIndex("model/w")):
        found.storage_data[key] = place
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    forge(folder)
    into = {"model/w": torch.empty(3), "ema-0.050/w": torch.empty(2, 2), "buffer/var": torch.empty(2)}
    for read in (lambda: load_weights(find(run), "raw"), lambda: read_tensors(find(run), into)):
        with pytest.raises(DamagedFileError, match="BytesStorageMetadata"):
            read()
    assert not mark.exists()


@pytest.mark.case("H01")
def test_a_tensors_own_bytes_may_be_a_pickle_and_run_nothing(run: Path, tmp_path: Path) -> None:
    mark, folder = tmp_path / "ran", find(run).path
    payload = io.BytesIO()
    torch.save({"w": Runs(mark)}, payload)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data + payload.getvalue())
    found = pickle.loads((folder / ".metadata").read_bytes())
    index = next(i for i in found.storage_data if i.fqn == "model/w")
    found.storage_data[index] = _StorageInfo(WEIGHTS, len(data), len(payload.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    forget_sums(folder)  # or make them fit
    with pytest.raises(DamagedFileError, match="its tensors cannot be read") as error:
        load_weights(find(run), "raw")
    assert len(str(error.value).splitlines()) == 1
    assert not mark.exists()


OF_METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "another folder's file": ({"file": "../images-000000000008/" + WEIGHTS}, "is not a file of the checkpoint"),
    "a file of the machine": ({"file": "/etc/passwd"}, "is not a file of the checkpoint"),
    "beyond the end": ({"length": 10**6}, "is not within the"),
    "before the beginning": ({"length": -1}, "is not within the"),
}


@pytest.mark.parametrize("case", OF_METADATA)
@pytest.mark.case("H03")
def test_places_of_tensors_lie_within_the_checkpoints_own_files(run: Path, case: str) -> None:
    how, message = OF_METADATA[case]
    folder = find(run).path
    (folder / ".metadata").write_bytes(metadata(3, **how))
    forge(folder)
    with pytest.raises(DamagedFileError, match=message):
        load_weights(find(run), "raw")
    assert message in str(damage(find(run)))


@pytest.mark.case("H03")
def test_pieces_fill_their_tensor_and_all_of_torchs_files_are_there(run: Path) -> None:
    folder = find(run).path
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.state_dict_metadata["model/w"].chunks[0].sizes = torch.Size([2])
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    forge(folder)
    assert "model/w: its pieces do not fill its shape" in str(damage(find(run)))
    found.state_dict_metadata["model/w"].chunks[0].sizes = torch.Size([3])
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    (folder / WEIGHTS).unlink()
    forge(folder)
    assert f"it lies in '{WEIGHTS}', which is not a file of the checkpoint" in str(damage(find(run)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_are_read_as_torch_wrote_them(run: Path, protocol: int) -> None:
    found = pickle.loads((find(run).path / ".metadata").read_bytes())
    folder = find(run).path
    (folder / ".metadata").write_bytes(pickle.dumps(found, protocol))
    tensors = read_metadata(folder, find(run, 1).sizes)
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        "model/w": ((3,), "float32"), "ema-0.050/w": ((2, 2), "float32"), "buffer/var": ((2,), "float32"),
    }  # fmt: skip
    assert {(name, p.offsets): (p.file, p.start, p.length) for name, t in tensors.items() for p in t.pieces} == {
        (i.fqn, tuple(i.offset)): (p.relative_path, p.offset, p.length) for i, p in found.storage_data.items()
    }


@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=draws(150), deadline=None)
@pytest.mark.case("H06")
def test_changed_metadata_are_read_or_refused_in_one_line(made: Path, at: int, byte: int, cut: bool) -> None:
    checkpoint = find(made, 1)
    data = bytearray((checkpoint.path / ".metadata").read_bytes())
    data[at % len(data)] = byte
    folder = made.parent / "changed"
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(data[: at % len(data)] if cut else data)
    said = ""
    try:
        read_metadata(folder, checkpoint.sizes)
    except DamagedFileError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1


def doubled(times: int) -> bytes:
    """A tuple of two of a tuple of two ...: hashing it takes 2^times steps."""
    return b"\x80\x04N\x94" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86\x94" for n in range(times))


BOMBS = {
    "nested tuples as a key": doubled(60) + b"}h" + bytes([60]) + b"Ns.",
    "deep nesting": b"\x80\x04)" + b"\x85" * 200_000 + b".",
    "deep nesting as a key": b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",
    "a place of the memo far away": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a text of a terabyte": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b".",
    "a table of the memo for four billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a set": b"\x80\x04\x8f(K\x01\x90.",
    "a frozen set": b"\x80\x04(K\x01\x91.",
    "a class by arguments": b"\x80\x04(cpathlib\nPosixPath\no.",
    "an old object": b"(ipathlib\nPosixPath\n.",
    "bytes of a terabyte": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",
    "a persistent object": b"\x80\x04Pabc\n.",
    "an extension": b"\x80\x04\x82\x01.",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.case("H06")
def test_pickles_made_to_take_for_ever_or_all_memory_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(BOMBS[name])
    with pytest.raises(DamagedFileError, match="torch's list of tensors"):
        read_metadata(tmp_path, {})


@pytest.mark.case("H06")
def test_tuples_that_hold_each_other_are_never_walked_through(run: Path) -> None:
    """Not even for a message: hash and repr of them take 2^60 steps."""
    folder, nested = find(run).path, ()
    for _ in range(60):
        nested = (nested, nested)  # type: ignore[assignment]
    for change in ("file of a piece", "name of a tensor", "dtype", "pieces"):
        found = pickle.loads((find(run, 1).path / ".metadata").read_bytes())
        tensor = found.state_dict_metadata["model/w"]
        if change == "file of a piece":
            next(iter(found.storage_data.values())).relative_path = nested
        elif change == "name of a tensor":
            object.__setattr__(next(iter(found.storage_data)), "fqn", nested)
        elif change == "dtype":
            tensor.properties.dtype = nested
        else:
            tensor.chunks = nested
        (folder / ".metadata").write_bytes(pickle.dumps(found))
        with pytest.raises(DamagedFileError, match="torch's list of tensors"):
            read_metadata(folder, find(run, 1).sizes)


@given(ops=st.lists(st.binary(min_size=1, max_size=6), max_size=40), keep=st.integers(0, 400))
@settings(max_examples=draws(150), deadline=None)
@pytest.mark.case("H06")
def test_no_operation_makes_anything_but_plain_objects(made: Path, ops: list[bytes], keep: int) -> None:
    """Whatever follows the beginning of real metadata: an error, or objects that hold no code."""
    data = (find(made, 1).path / ".metadata").read_bytes()
    try:
        found = unpickled(data[:keep] + b"".join(ops) + b".")
    except FlawError:
        return
    waiting, seen = [found], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        assert isinstance(value, Made | list | tuple | str | int | type(None)) or issubclass(value, Made)
        waiting += [value.arguments, value.state] if isinstance(value, Made) else []
        waiting += value if isinstance(value, list | tuple) else []


MARKERS: dict[str, tuple[dict[str, Any], str]] = {
    "no file at all": ({"files": {}}, "does not list .metadata"),
    "another step": ({"step": 999}, "marker says 999 steps of 16 images"),
    "other images": ({"images_seen": 999}, "marker says images_seen 999"),
    "images below none": ({"images_seen": -1}, "images_seen: input should be greater"),
    "images beyond bounds": ({"images_seen": 10**30}, "images_seen: "),
    "a text for a number": ({"step": "2"}, "step: input should be a valid integer"),
    "a path outside": ({"files": {"../../../etc/passwd": {"size": 1, "crc32": 0}}}, "plain one"),
    "an absolute path": ({"files": {"/etc/passwd": {"size": 1, "crc32": 0}}}, "plain one"),
    "its folder": ({"files": {"..": {"size": 1, "crc32": 0}}}, "plain one"),
    "a name for a terminal": ({"files": {"\x1b[2J": {"size": 1, "crc32": 0}}}, "plain one"),
    "no checksum": ({"files": {".metadata": {"size": 1}}}, "crc32: field required"),
    "a size below none": ({"files": {".metadata": {"size": -1, "crc32": 0}}}, "size: input should be greater"),
    "a list for a table": ({"files": []}, "files: input should be"),
    "no identity": ({"run": "../x"}, "run: "),
    "classes that are not names": ({"classes": [1, 2]}, "classes.0: "),
    "code that is not code": ({"code": {"version": "1", "commit": True}}, "code.commit: "),
    "a field that nobody knows": ({"more": 1}, "more: extra"),
}


@pytest.mark.parametrize("name", MARKERS)
@pytest.mark.case("H03")
def test_a_marker_that_lies_is_not_the_newest(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said, message = MARKERS[name]
    folder = find(run).path
    tell(folder, **said)
    assert find(run).images_seen == 8
    assert message in str(scan(run)[1][folder])
    assert tarflow.cli.main(["checkpoint", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"{folder.name}: DAMAGED: " in out
    assert message in out


@pytest.mark.parametrize(
    "text", ['{"step": 2, "images_seen": Infinity}', '{"step": NaN}', "[]", "{", "\x00", "[" * 9999]
)
@pytest.mark.case("H03")
def test_a_marker_that_is_not_a_record_is_not_the_newest(run: Path, text: str) -> None:
    folder = find(run).path
    (folder / MARKER).write_text(text)
    assert find(run).images_seen == 8
    assert scan(run)[1][folder].committed


@pytest.mark.case("H03")
def test_a_marker_behind_a_broken_link_counts_as_damaged_and_nothing_is_removed(run: Path) -> None:
    folder = find(run).path
    (folder / MARKER).unlink()
    (folder / MARKER).symlink_to("nowhere")
    why = scan(run)[1][folder]
    assert why.committed
    assert "marker is damaged" in str(why)
    assert retention.remove_torn(run) == ([], [])


@pytest.mark.case("H03")
def test_verify_says_what_is_there_besides(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (find(run).path / "__9_0.distcp").write_text("x")
    assert tarflow.cli.main(["checkpoint", "verify", str(run)]) == 0
    assert "; not of the checkpoint: '__9_0.distcp'" in capsys.readouterr().out


@pytest.mark.case("H06")
@pytest.mark.parametrize("sums", [True, False], ids=["sums of pieces", "an earlier version, without"])
def test_flipped_bits_of_tensors_are_not_sampled(run: Path, sums: bool) -> None:
    """Whatever byte of them is another, after this process has found them whole."""
    if not sums:
        forget_sums(find(run).path)
    checkpoint = find(run)
    file, (piece,) = checkpoint.path / WEIGHTS, read_metadata(checkpoint.path, checkpoint.sizes)["model/w"].pieces
    whole = file.read_bytes()
    assert load_weights(checkpoint, "raw")["w"].tolist() == [0.5] * 3
    for at in range(piece.start, piece.start + piece.length, 7):
        data = bytearray(whole)
        data[at] ^= 4
        file.write_bytes(data)
        assert f"the checksum of its file {WEIGHTS} is wrong" in str(damage(checkpoint))
        with pytest.raises(DamagedFileError, match=f"the checksum of its file {WEIGHTS} is wrong; choose another"):
            load_weights(checkpoint, "raw")


def forget_sums(folder: Path) -> None:
    """Make a checkpoint one of an earlier version."""
    for path in folder.glob("*.sums"):
        path.unlink()
    forge(folder)


@pytest.mark.case("H06")
def test_weights_are_read_without_the_rest_of_a_checkpoint(run: Path) -> None:
    """Of the tensors' files, the pieces that are asked for; the lists of them are held against their checksums."""
    checkpoint = find(run)
    other = read_metadata(checkpoint.path, checkpoint.sizes)["ema-0.050/w"].pieces[0]
    data = bytearray((checkpoint.path / other.file).read_bytes())
    data[other.start : other.start + other.length] = bytes(other.length)
    (checkpoint.path / other.file).write_bytes(data)
    assert load_weights(checkpoint, "raw")["w"].tolist() == [0.5] * 3
    with pytest.raises(DamagedFileError, match=f"the checksum of its file {other.file} is wrong"):
        load_weights(checkpoint, "ema-0.050")
    for name in (WEIGHTS.replace("distcp", "sums"), ".metadata"):
        path = checkpoint.path / name
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(DamagedFileError, match=re.escape(f"the checksum of its file {name} is wrong")):
            load_weights(checkpoint, "raw")
        path.write_bytes(kept)
    assert load_weights(checkpoint, "raw")["w"].tolist() == [0.5] * 3


@pytest.mark.parametrize("sums", [True, False], ids=["sums of pieces", "an earlier version, without"])
def test_the_file_of_another_checkpoint_is_not_taken_for_this_ones(run: Path, sums: bool) -> None:
    """A copy that mixed them up: the sizes agree, and so does whatever such a file says of itself."""
    temporary = ckpt.temporary_dir(run, 24)
    DiskStorage().write(
        temporary, {"model/w": torch.zeros(3), "ema-0.050/w": torch.ones(2, 2), "buffer/var": torch.ones(2)}, None
    )
    if not sums:
        forget_sums(find(run).path)
    assert (temporary / WEIGHTS).stat().st_size == find(run).sizes[WEIGHTS]
    shutil.copy(temporary / WEIGHTS, find(run).path / WEIGHTS)
    with pytest.raises(DamagedFileError, match=f"the checksum of its file {WEIGHTS} is wrong"):
        load_weights(find(run), "raw")


def test_markers_of_the_earlier_version_are_read(run: Path) -> None:
    path = by_step(run, 400, 1600)
    assert find(run).path == path
    marker = json.loads((path / MARKER).read_text())
    (path / MARKER).write_text(json.dumps(marker | {"world_size": 1, "config": "ab", "data": "cd"}))
    assert find(run).info["data"] == "cd"
