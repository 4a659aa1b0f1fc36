"""Files of weights by strangers and off damaged disks: refused unopened, unread or unbuilt, or what was written."""

import io
import json
import pickle
import random
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tarflow.errors import UserError
from tarflow.models.config import TarFlowConfig
from tarflow.models.flow import TarFlow
from tarflow.models.init import init_weights
from tarflow.models.provenance import Provenance
from tarflow.models.weights import read_header, read_weights, save_weights_file
from tarflow.records import DamagedFileError

CONFIG = TarFlowConfig(
    image_size=4, patch_size=2, channels=8, head_channels=8, num_blocks=1, layers_per_block=1, num_classes=2
)
KNOWN = Provenance(weights="raw", step=7, noise="gaussian", noise_std=0.1, classes=("food", "a \U0001f600"))


def weights(config: TarFlowConfig = CONFIG) -> dict[str, Tensor]:
    model = TarFlow(config)
    init_weights(model, 3)
    return model.state_dict()


def exported(path: Path, provenance: Provenance | None = KNOWN) -> Path:
    save_weights_file(path, CONFIG, weights(), provenance)
    return path


def same(tensors: dict[str, Tensor]) -> bool:
    ours = weights()
    return tensors.keys() == ours.keys() and all(torch.equal(tensors[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.case("H04")
def test_the_same_weights_are_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    first, second = exported(tmp_path / f"a{suffix}"), exported(tmp_path / f"another name{suffix}")
    assert first.read_bytes() == second.read_bytes()
    assert read_weights(first).checked
    assert same(read_weights(first).tensors)


@pytest.mark.case("H04")
def test_no_flipped_bit_of_exported_safetensors_is_believed(tmp_path: Path) -> None:
    path = exported(tmp_path / "w.safetensors")
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    # Every byte of the header, whose every field decides something, and tensors here and there.
    for at in [*range(header), *(draw.randrange(header, len(data)) for _ in range(300))]:
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
        with pytest.raises(UserError, match=r"w\.safetensors"):
            read_weights(path)


@pytest.mark.case("H04")
def test_a_header_alone_is_not_believed_beside_damaged_tensors(tmp_path: Path) -> None:
    path = exported(tmp_path / "w.safetensors")
    assert read_header(path).checked
    with open(path, "r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(DamagedFileError, match="its checksum does not match its content; copy it again"):
        read_header(path)


@pytest.mark.case("H04")
def test_flipped_bits_of_an_exported_pth_change_nothing_that_is_used(tmp_path: Path) -> None:
    path = exported(tmp_path / "w.pth")
    data, refused, draw = path.read_bytes(), 0, random.Random(1)
    places = draw.sample(range(len(data)), 250)
    for at in places:
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
        try:
            file = read_weights(path)
        except UserError:
            refused += 1
            continue
        assert same(file.tensors)  # the bit was in the padding between records, or in a date
        assert (file.config, file.provenance, file.checked) == (CONFIG, KNOWN, True)
    assert refused > len(places) // 3


@pytest.mark.case("H04")
def test_a_file_without_a_checksum_says_so(tmp_path: Path) -> None:
    """Files of versions before, and of other programs."""
    save_file(weights(), tmp_path / "w.safetensors", metadata={"tarflow_config": CONFIG.model_dump_json()})
    torch.save(weights(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    for file in (read_weights(tmp_path / "w.safetensors"), read_weights(tmp_path / "w.pth", like=CONFIG)):
        assert same(file.tensors)
        assert not file.checked
        assert "carries no checksum" in file.caveat
    assert exported(tmp_path / "new.safetensors")
    assert read_weights(tmp_path / "new.safetensors").caveat == ""


@pytest.mark.case("H04")
def test_the_check_takes_no_memory_of_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    big = TarFlowConfig(image_size=4, patch_size=2, channels=512, num_blocks=1, layers_per_block=4)
    save_weights_file(path, big, weights(big))
    assert path.stat().st_size > 5 << 23
    tracemalloc.start()  # of Python's own memory: pieces of the file
    read_header(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3 << 22


class Planted:
    """Unpickling it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def old_format(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def edm2(value: Any, path: Path) -> None:
    """As NVlabs publish networks: a pickle that rebuilds its classes from source text inside it."""
    path.write_bytes(pickle.dumps({"ema": value, "dataset_kwargs": {}}))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.pth", torch.save),
        ("w.pt", old_format),
        ("network-snapshot.pkl", edm2),
        ("no-suffix", lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0))),
    ],
)
@pytest.mark.case("H01")
def test_a_pickle_with_code_is_refused_and_the_safe_way_named(
    tmp_path: Path, name: str, write: Callable[[Any, Path], None]
) -> None:
    marker = tmp_path / "ran"
    write({"w": Planted(marker)}, tmp_path / name)
    for read in (read_weights, read_header):
        with pytest.raises(
            UserError, match=r"is refused.*could run code.*torch\.save\(model\.state_dict\(\), 'FILE\.pth'\)"
        ):
            read(tmp_path / name)
    assert not marker.exists()


def packed_anew(path: Path, change: Callable[[bytes], bytes], how: int = zipfile.ZIP_STORED) -> None:
    """The same records, with another pickle of what they make up."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


@pytest.mark.case("H01")
def test_metadata_beside_the_tensors_run_nothing_and_hide_nothing(tmp_path: Path) -> None:
    content = OrderedDict(weights())
    for attributes in ({"tarflow": {"tarflow_config": 5}}, {"tarflow": "text"}, {"tarflow": {"a": ["b"]}}):
        vars(content).update(attributes)
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(DamagedFileError, match="metadata are not text"):
            read_weights(tmp_path / "w.pth")
    vars(content).clear()
    vars(content).update({"Items": "x", "Values": 3, "Keys": None})
    torch.save(content, tmp_path / "w.pth")
    packed_anew(tmp_path / "w.pth", lambda data: data.replace(b"Items", b"items").replace(b"Values", b"values"))
    assert same(read_weights(tmp_path / "w.pth", like=CONFIG).tensors)


def repeated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = torch.zeros(1).expand(8, 12)
    return tensors | {"blocks.0.proj_in.weight": wide}


def shared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pool = torch.zeros(max(t.numel() for t in tensors.values()))
    return {name: pool[: t.numel()].view(t.shape) for name, t in tensors.items()}


def elsewhere(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"var": torch.empty(4, 12, device="meta")}


def sparse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"var": torch.ones(4, 12).to_sparse()}


def whole_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"var": torch.ones(4, 12, dtype=torch.int64)}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"\x1b[2J": torch.ones(1)}


def numbered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {f"blocks.{'9' * 5000}.attn_blocks.0.x": torch.ones(1)}


def deep(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"blocks.999999999.attn_blocks.0.x": torch.ones(1)}


def empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"blocks.0.proj_in.weight": torch.ones(0, 12)}


def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"blocks.0.attn_blocks.0.mlp.main.0.weight": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (repeated, "not stored number by number"),
        (elsewhere, "not stored number by number"),
        (sparse, "not stored number by number"),
        (shared, "tensors share memory"),
        (whole_numbers, r"var: torch\.int64, which is not a floating-point type"),
        (renamed, r"'\\x1b\[2J' is not a valid tensor name"),
        (numbered, "is not a valid tensor name"),
        (deep, "less than or equal to 1024"),
        (empty, "does not determine a model"),
        (flat, "does not determine a model"),
    ],
)
@pytest.mark.case("H10")
def test_tensors_that_are_not_what_they_claim_are_refused_before_a_model_is_built(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    torch.save(change(weights()), tmp_path / "w.pth")
    with pytest.raises(UserError, match=says):
        read_weights(tmp_path / "w.pth", like=CONFIG)


@pytest.mark.case("H10")
def test_compressed_records_are_refused_unread(tmp_path: Path) -> None:
    """A bomb: a gigabyte of zeros takes a megabyte so."""
    exported(tmp_path / "w.pth")
    packed_anew(tmp_path / "w.pth", lambda data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedFileError, match="compressed, and torch never compresses them"):
        read_weights(tmp_path / "w.pth")


def test_a_storage_that_claims_more_than_its_record_never_reaches_beyond_the_file(tmp_path: Path) -> None:
    torch.save({"blocks.0.proj_in.weight": torch.arange(96.0)}, tmp_path / "w.pth")
    packed_anew(tmp_path / "w.pth", lambda data: data.replace(b"K\x60", b"J\0\0\0\x10"))
    with pytest.raises(UserError):
        read_weights(tmp_path / "w.pth")


def says_of_itself(path: Path, config: str, provenance: str = "{}", tensors: dict[str, Tensor] | None = None) -> Path:
    save_file(tensors or weights(), path, metadata={"tarflow_config": config, "tarflow_provenance": provenance})
    return path


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"num_blocks": 2_000_000_000}, "num_blocks: Input should be less than or equal to 1024"),
    ({"num_blocks": 1024, "layers_per_block": 1024}, "layers in total"),
    ({"num_classes": 1 << 24, "channels": 1 << 16}, "parameters"),
    ({"image_size": 1 << 14, "patch_size": 1}, "tokens"),
    ({"layers_per_block": 4000}, "layers_per_block"),
    ({"channels": True}, "channels"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.case("H10")
def test_a_configuration_in_a_file_is_bounded_before_a_model_is_built(
    tmp_path: Path, change: dict[str, Any], says: str, suffix: str
) -> None:
    config = json.dumps(CONFIG.model_dump() | change)
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        content = OrderedDict(weights())
        content.tarflow = {"tarflow_config": config}  # type: ignore[attr-defined]
        torch.save(content, path)
    else:
        says_of_itself(path, config)
    start = time.perf_counter()
    with pytest.raises(UserError, match=says):
        read_header(path)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("provenance", "says"),
    [
        ('{"classes": ["a", "b", "c"]}', r"provenance\.classes: it names 3 classes, its model has 2"),
        ('{"classes": ["a", "b\\u001b[2J"]}', r"classes\.1: .*control character"),
        ('{"classes": ["a", "line\\nbreak"]}', r"classes\.1: .*control character"),
        ('{"classes": ["a", ""]}', r"classes\.1"),
        ('{"classes": ["a", "%s"]}' % ("x" * 300), r"classes\.1"),
        ('{"weights": "raw\\r"}', "weights: .*control character"),
        ('{"sampling": {"seed\\u0007": 1}}', "sampling: .*control character"),
        ('{"sampling": {"a": ' + "[" * 50 + "]" * 50 + "}}", "sampling: .*nested too deeply"),
        ('{"code": ' + '{"a":' * 5000 + "1" + "}" * 5001, "nested too deeply"),
        ('{"step": 1e400}', "not a finite number"),
        ('{"step": %s}' % ("9" * 5000), "digits"),
        ('{"step": 99999999999999999999}', "step"),
        ('{"noise": "gaussian"}', "noise=gaussian does not go with noise_std=None"),
        ('{"noise": "uniform", "noise_std": 0.5}', "noise=uniform does not go with noise_std=0.5"),
        ('{"step": 1, "step": 2}', "twice"),
    ],
)
@pytest.mark.case("H04")
def test_what_a_file_says_of_its_weights_is_plain_and_fits_the_model(
    tmp_path: Path, provenance: str, says: str
) -> None:
    path = says_of_itself(tmp_path / "w.safetensors", CONFIG.model_dump_json(), provenance)
    with pytest.raises(UserError, match=says) as caught:
        read_weights(path)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 16, b"PK\x03\x04" + b"x" * 50, b"\x80\x02}q\x00.", b"hello"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_rubbish_is_one_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=rf"w\{suffix}"):
        read_weights(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.case("H10")
def test_a_huge_hole_is_no_file_of_weights(tmp_path: Path, suffix: str) -> None:
    with open(tmp_path / f"w{suffix}", "wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(DamagedFileError, match=rf"w\{suffix}"):
        read_weights(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_cut_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = exported(tmp_path / f"w{suffix}")
    data = path.read_bytes()
    for end in random.Random(2).sample(range(len(data)), 40):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match=rf"w\{suffix}"):
            read_weights(path)
