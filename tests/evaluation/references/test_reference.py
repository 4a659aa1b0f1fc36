"""Reference statistics: computed once, provenance inside, mismatch refused."""

import json
import random
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tarflow.data_pipeline.images.identical import image_hashes
from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.frechet_distance import frechet_distance
from tarflow.evaluation.references import compute
from tarflow.evaluation.references.compute import reference_statistics
from tarflow.evaluation.references.reference import cache_path, full_provenance, load_reference, save_reference
from tarflow.records import DamagedFileError
from tests.helpers.features import NoSpatial
from tests.helpers.programs import ENV
from tests.helpers.waiting import until
from tests.helpers.warm import warm


class FakeFeatures(NoSpatial):
    name, sha256, preprocessing, dim = "fake", "f00d", "none", 4

    def __call__(self, images):
        return images.float().flatten(1)[:, :4]


ROOT = Path(__file__).resolve().parents[3]
DATA: dict[str, str | int] = {"fingerprint": "aa11", "images": 30, "image_size": 8, "channels": 1, "crop": "centre"}


class Images:
    """Images in memory that announce 30 of them."""

    def __init__(self, data=DATA, there=30):
        self.data = data
        rng = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (there, 1, 8, 8), dtype=torch.uint8, generator=rng)
        self.read = []

    skips_damaged = False

    @property
    def num_images(self):
        return self.data["images"]

    def provenance(self):
        return dict(self.data)

    def batches(self, labelled, batch_size=7, part=0, parts=1):
        self.read.append(part)
        n = len(self.pixels)
        for rows in self.pixels[part * n // parts : (part + 1) * n // parts].split(7):
            yield rows, None, None


def make(folder, data=DATA, **options):
    images = Images(data, **options)
    path = cache_path(folder, full_provenance(data, FakeFeatures()))
    return reference_statistics(path, images, FakeFeatures()), images


def test_statistics_are_computed_once_and_read_back_exactly(tmp_path):
    first, images = make(tmp_path)
    second, others = make(tmp_path)
    assert (images.read, others.read) == ([0], [])
    assert second.provenance == first.provenance
    for a, b in zip(first.statistics.parts(), second.statistics.parts()):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert frechet_distance(first.statistics, second.statistics).distance < 1e-9
    assert re.fullmatch(r"reference-fake-[0-9a-f]{12}\.npz", first.path.name)
    assert [p.name for p in tmp_path.iterdir()] == [first.path.name]
    assert torch.equal(first.rows, second.rows)
    assert len(first.rows) == 30


def test_chunks_in_any_hands_make_the_same_bits(tmp_path, monkeypatch):
    """Nine chunks: one process, and one that finds four of them done by another that was killed."""
    monkeypatch.setattr(compute, "CHUNK", 4)
    monkeypatch.setattr(compute, "KEEP", 11)
    whole, _ = make(tmp_path / "a")

    class Killed(Images):
        def batches(self, labelled, batch_size=7, part=0, parts=1):
            if part == 4:
                raise KeyboardInterrupt
            return super().batches(labelled, batch_size, part, parts)

    path = tmp_path / "b" / whole.path.name
    with pytest.raises(KeyboardInterrupt):
        reference_statistics(path, Killed(), FakeFeatures())
    assert not path.exists()
    rest = Images()
    again = reference_statistics(path, rest, FakeFeatures())
    assert rest.read == [4, 5, 6, 7]
    assert path.read_bytes() == whole.path.read_bytes()
    assert len(again.rows) == 11
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.case("S08")
def test_processes_of_any_number_and_a_killed_one_make_the_same_file(tmp_path, digit_like):
    def start(out, threads=1):
        command = warm("tests.helpers.programs.make_reference_slowly", digit_like / "train", out, threads)
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)

    alone, shared = tmp_path / "a" / "ref.npz", tmp_path / "b" / "ref.npz"
    first = start(alone)
    victim = start(shared, threads=2)
    until("a chunk", lambda: list((shared.parent / "work").rglob("reference-*")))
    victim.kill()  # between two chunks or within one
    victim.communicate(timeout=30)
    second = start(shared, threads=2)
    for process in (first, second):
        errors = process.communicate(timeout=90)[1]
        assert process.returncode == 0, errors
    assert shared.read_bytes() == alone.read_bytes()
    assert [path.name for path in shared.parent.iterdir()] == ["ref.npz"]


@pytest.mark.case("S04")
def test_what_a_killed_process_left_for_other_data_is_not_taken_in(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "CHUNK", 10)

    class Killed(Images):
        def batches(self, labelled, batch_size=7, part=0, parts=1):
            if part == 2:
                raise KeyboardInterrupt
            return super().batches(labelled, batch_size, part, parts)

    out = tmp_path / "ref.npz"
    with pytest.raises(KeyboardInterrupt):
        reference_statistics(out, Killed(), FakeFeatures())
    other = Images(DATA | {"fingerprint": "bb22"})
    other.pixels = 255 - other.pixels
    found = reference_statistics(out, other, FakeFeatures())
    assert other.read == [0, 1, 2]
    torch.testing.assert_close(found.statistics.parts()[1], other.pixels.double().flatten(1)[:, :4].mean(0))


@pytest.mark.case("S08")
def test_uneven_and_empty_parts_weigh_by_their_images(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "CHUNK", 7)  # 30 images: chunks of six
    found, _ = make(tmp_path)
    pixels = Images().pixels.double().flatten(1)[:, :4]
    count, mean, scatter = found.statistics.parts()
    assert count == 30
    torch.testing.assert_close(mean, pixels.mean(0))
    torch.testing.assert_close(scatter, torch.cov(pixels.T) * 29)


def test_the_kept_features_are_spread_over_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "KEEP", 3)
    found, images = make(tmp_path)
    wanted = images.pixels.float().flatten(1)[[9, 19, 29], :4]
    assert torch.equal(found.rows, wanted)


@pytest.mark.case("S04")
def test_the_same_data_elsewhere_is_the_same_data(tmp_path):
    first, _ = make(tmp_path, DATA | {"data": "/here"})
    again, images = make(tmp_path, DATA | {"data": "/there"})
    assert again.path == first.path
    assert images.read == []


@pytest.mark.case("S04")
def test_other_data_size_or_network_has_a_file_of_its_own(tmp_path):
    names = {make(tmp_path)[0].path.name}
    for change in ({"fingerprint": "bb22"}, {"image_size": 16}, {"crop": "stretched"}):
        names.add(make(tmp_path, DATA | change)[0].path.name)
    assert len(names) == 4


@pytest.mark.case("S04")
def test_a_mismatch_is_refused_naming_both_values(tmp_path):
    path = make(tmp_path)[0].path
    expected = full_provenance(DATA | {"fingerprint": "bb22", "image_size": 64}, FakeFeatures())
    with pytest.raises(EvaluationError) as error:
        load_reference(path, expected)
    assert "fingerprint: 'aa11' in the file, 'bb22' here" in str(error.value)
    assert "image_size: 8 in the file, 64 here" in str(error.value)
    assert "channels" not in str(error.value)


@pytest.mark.case("S06")
def test_weights_of_the_network_are_part_of_the_provenance(tmp_path):
    path = make(tmp_path)[0].path
    other = FakeFeatures()
    other.sha256 = "beef"
    with pytest.raises(EvaluationError, match="features_sha256: 'f00d' in the file, 'beef' here"):
        load_reference(path, full_provenance(DATA, other))


@pytest.mark.case("S02")
def test_a_data_set_with_another_number_of_images_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="the reference has 20 images, 30 were announced"):
        make(tmp_path, there=20)
    assert not list(tmp_path.rglob("*.npz"))


def test_files_that_hold_something_else_are_refused(tmp_path):
    text = tmp_path / "a.npz"
    text.write_text("hello")
    with pytest.raises(
        DamagedFileError, match=r"a\.npz \(reference statistics\) is damaged or was not written by tarflow"
    ):
        load_reference(text, {})
    np.savez(tmp_path / "b.npz", mean=np.zeros(3))
    with pytest.raises(DamagedFileError, match="no array 'count' stands in it"):
        load_reference(tmp_path / "b.npz", {})
    with pytest.raises(EvaluationError, match="no reference statistics at"):
        load_reference(tmp_path / "none.npz", {})


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "junk": lambda data: b"no statistics" * 50,
    "flipped": lambda data: data[:60] + bytes(b ^ 255 for b in data[60:90]) + data[90:],
}


def damage(path, what):
    if what == "other arrays":
        np.savez(
            path, format=2, count=3, mean=np.zeros(4), scatter=np.zeros((3, 3)), rows=np.zeros((2, 4)), provenance="{}"
        )
    else:
        path.write_bytes(DAMAGES[what](path.read_bytes()))


@pytest.mark.parametrize("what", [*DAMAGES, "other arrays"])
@pytest.mark.case("V15")
def test_damaged_statistics_of_our_own_are_made_anew_and_anybody_else_s_are_an_error(tmp_path, what):
    before, _ = make(tmp_path)
    path = before.path
    damage(path, what)
    lines: list[str] = []
    images = Images()
    found = reference_statistics(path, images, FakeFeatures(), log=lines.append)
    assert images.read == [0]
    assert lines[0].startswith(f"{path} is damaged and will be rebuilt: ")
    assert torch.equal(found.statistics.parts()[1], before.statistics.parts()[1])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    damage(path, what)
    left = path.read_bytes()
    for load in (
        lambda: load_reference(path, before.provenance),
        lambda: reference_statistics(path, Images(), FakeFeatures(), ours=False),
    ):
        with pytest.raises(DamagedFileError, match=r"name another file \(--reference, evaluation") as error:
            load()
        assert not re.search("remove|delete", str(error.value))  # the file may be anybody's
    assert path.read_bytes() == left


@pytest.mark.case("V15")
def test_what_another_worker_put_in_the_place_of_the_damage_stays(tmp_path):
    first = make(tmp_path)[0]
    path = first.path
    path.write_bytes(b"")

    class Meanwhile(Images):
        def batches(self, *rest, **named):
            save_reference(path, first.statistics, first.provenance, first.rows, first.hashes)
            return super().batches(*rest, **named)

    found = reference_statistics(path, Meanwhile(), FakeFeatures())
    assert found.statistics.count == 30
    assert load_reference(path, first.provenance).statistics.count == 30


@pytest.mark.case("V15")
def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    path = make(tmp_path)[0].path

    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(zipfile, "ZipFile", broken)
    with pytest.raises(EvaluationError, match=r"cannot read .*Input/output error") as error:
        reference_statistics(path, Images(), FakeFeatures())
    assert not isinstance(error.value, DamagedFileError)


@pytest.mark.case("I02")
def test_no_message_tells_to_remove_what_the_product_did_not_make():
    """Of files that a person names, that is. Its own choices and notes it may name: sampling.json, restarts.json."""
    own = {
        "trainer/config/chosen_sampling.py", "trainer/config/files.py", "trainer/saving/resume.py", "trainer/start/record.py",
        "evaluation/result_file.py", "evaluation/batches.py", "models/sampling/plan.py", "evaluation/samples/store_formats.py", "evaluation/sweep/candidate_score.py",
    }  # fmt: skip
    advice = re.compile(r"\b(remove|delete) (it|them|this|that|the file)\b")
    found = []
    for room in ("cluster", "data_pipeline", "evaluation", "models", "tarflow", "trainer"):
        for path in sorted((ROOT / room).glob("**/*.py")):
            name = path.relative_to(ROOT).as_posix()
            for number, line in enumerate(path.read_text().splitlines(), 1):
                text = line.partition("#")[0]
                if '"' in text and '"""' not in text and advice.search(text) and name not in own:
                    found.append(f"{name}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.case("V09")
def test_hashes_of_the_images_are_kept_in_their_order(tmp_path, monkeypatch):
    whole, images = make(tmp_path / "a")
    assert whole.hashes.tolist() == image_hashes(images.pixels.numpy()).tolist()
    monkeypatch.setattr(compute, "CHUNK", 7)
    parts, _ = make(tmp_path / "b")
    assert parts.hashes.tolist() == whole.hashes.tolist()


@pytest.mark.case("V09")
def test_statistics_of_an_earlier_version_have_none(tmp_path):
    path = make(tmp_path)[0].path
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name not in ("hashes", "checksum")}
    np.savez(path, **arrays)
    found, images = make(tmp_path)
    assert (found.hashes, images.read, found.statistics.count) == (None, [], 30)
    assert (found.checked, found.describe()["checked"]) == (False, False)


def changed(path, **arrays):
    """The same file with other arrays, without a checksum, as versions before the checksum or a stranger would write it."""
    with np.load(path) as file:
        stored = {name: file[name] for name in file.files if name != "checksum"}
    with open(path, "wb") as file:
        np.savez(file, **{name: array for name, array in (stored | arrays).items() if array is not None})


def of(path, **fields):
    with np.load(path) as file:
        stored = json.loads(str(file["provenance"]))
    return np.array(json.dumps({name: value for name, value in (stored | fields).items() if value is not None}))


CHANGES: dict[str, tuple[Any, str]] = {
    "of one image": (lambda path: {"count": np.int64(1)}, "1 images: 2 to 30 can be"),
    "of too many": (lambda path: {"count": np.int64(31)}, "31 images"),
    "a count of another type": (lambda path: {"count": np.float64(30)}, "'count' is float64"),
    "another format": (lambda path: {"format": np.int64(3)}, "it has format 3, this program reads 2"),
    "single precision": (lambda path: {"mean": np.zeros(4, np.float32)}, "'mean' is float32"),
    "nan": (lambda path: {"mean": np.array([0, 1, np.nan, 3])}, "'mean' holds values that are not finite"),
    "other bytes": (lambda path: {"mean": np.zeros(4, ">f8")}, "'mean' is >f8"),
    "another width": (lambda path: {"mean": np.zeros(5)}, "'scatter' is float64 \\[4, 4\\]"),
    "no features": (lambda path: {"mean": np.zeros(0), "scatter": np.zeros((0, 0))}, "it is of no features"),
    "negative": (lambda path: {"scatter": -np.eye(4)}, "negative sums of squares"),
    "not symmetric": (lambda path: {"scatter": np.eye(4) + np.eye(4, k=1) / 2}, "not symmetric"),
    "beyond its diagonal": (lambda path: {"scatter": np.eye(4) + 3 * (1 - np.eye(4))}, "no features can have"),
    "rows of another width": (lambda path: {"rows": np.zeros((3, 7), np.float32)}, "'rows' is float32"),
    "more rows than images": (lambda path: {"rows": np.zeros((31, 4), np.float32)}, "'rows' is float32"),
    "hashes of others": (lambda path: {"hashes": np.zeros(7, np.uint64)}, "'hashes' is uint64"),
    "an array more": (lambda path: {"extra": np.zeros(7)}, "an unknown array 'extra'"),
    "an array less": (lambda path: {"rows": None}, "no array 'rows'"),
    "no object": (lambda path: {"provenance": np.array("[1]")}, "not a JSON object"),
    "bytes": (lambda path: {"provenance": np.array(b"{}")}, "its provenance is not text"),
    "no network": (lambda path: {"provenance": of(path, features=None)}, "features: field required"),
    "no size": (lambda path: {"provenance": of(path, image_size="8")}, "image_size"),
    "a size in another spelling": (
        lambda path: {"provenance": of(path, image_size="8, 12")},
        "nor a rectangle's HEIGHT,WIDTH",
    ),
    "a rectangle without end": (
        lambda path: {"provenance": of(path, image_size="8,99999")},
        "nor a rectangle's HEIGHT,WIDTH",
    ),
    "a list": (lambda path: {"provenance": of(path, data=["x"])}, "data is neither text nor a number"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.case("H06")
def test_statistics_that_cannot_be_are_refused_whoever_wrote_them(tmp_path, what):
    path = make(tmp_path)[0].path
    arrays, says = CHANGES[what]
    changed(path, **arrays(path))
    with pytest.raises(DamagedFileError, match=says):
        load_reference(path, full_provenance(DATA, FakeFeatures()))


@pytest.mark.case("H04")
def test_no_flipped_bit_of_statistics_changes_a_figure(tmp_path):
    made = make(tmp_path)[0]
    data, expected, refused = made.path.read_bytes(), full_provenance(DATA, FakeFeatures()), 0
    assert made.checked
    for at in random.Random(0).sample(range(len(data)), 300):
        made.path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        try:
            found = load_reference(made.path, expected)
        except DamagedFileError:
            refused += 1
            continue
        assert found.checked
        assert torch.equal(found.statistics.parts()[2], made.statistics.parts()[2])
        assert torch.equal(found.rows, made.rows)
    assert refused > 150


@pytest.mark.case("H04")
def test_statistics_of_another_width_than_the_network_s_are_refused(tmp_path):
    path = make(tmp_path)[0].path
    with pytest.raises(EvaluationError, match="features of an image: 4 in the file, 5 here"):
        load_reference(path, full_provenance(DATA, FakeFeatures()), dim=5)


@pytest.mark.case("H01")
def test_pickled_statistics_are_refused_and_run_nothing(tmp_path):
    path = make(tmp_path)[0].path

    class Planted:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    changed(path, rows=np.array([Planted()], dtype=object))
    with pytest.raises(DamagedFileError, match="'rows' holds objects, which are pickled"):
        load_reference(path, full_provenance(DATA, FakeFeatures()))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "another chunk's", "other data's"])
@pytest.mark.case("H04")
def test_a_damaged_or_swapped_chunk_is_made_anew_and_never_merged(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(compute, "CHUNK", 10)
    whole, _ = make(tmp_path / "a")

    class Killed(Images):
        def batches(self, labelled, batch_size=7, part=0, parts=1):
            if part == 2:
                raise KeyboardInterrupt
            return super().batches(labelled, batch_size, part, parts)

    lines: list[str] = []
    path = tmp_path / "b" / whole.path.name
    with pytest.raises(KeyboardInterrupt):
        reference_statistics(path, Killed(), FakeFeatures())
    first, second = sorted((path.parent / "work").rglob("reference-0*"))
    if damage == "cut":
        second.write_bytes(second.read_bytes()[:-50])
    elif damage == "another chunk's":
        second.write_bytes(first.read_bytes())
    else:
        changed(second, provenance=of(second, fingerprint="bb22"))
    rest = Images()
    reference_statistics(path, rest, FakeFeatures(), log=lines.append)
    assert rest.read == [1, 2]
    assert sum("is damaged and computed again" in line for line in lines) == 1
    assert path.read_bytes() == whole.path.read_bytes()
