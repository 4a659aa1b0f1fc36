"""Reference statistics: computed once, provenance inside, mismatch refused."""

import re

import numpy as np
import pytest
import torch

from evaluation.errors import EvaluationError
from evaluation.frechet import frechet_distance
from evaluation.reference import cache_path, full_provenance, load_reference, reference_statistics


class FakeFeatures:
    name, sha256, preprocessing, dim = "fake", "f00d", "none", 4

    def __call__(self, images):
        return images.float().flatten(1)[:, :4]


DATA = {"fingerprint": "aa11", "images": 30, "image_size": 8, "channels": 1, "crop": "centre"}


def batches(n=30, size=7):
    pixels = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels.split(size)


def make(folder, data=DATA, source=batches):
    provenance = full_provenance(data, FakeFeatures())
    return reference_statistics(cache_path(folder, provenance), provenance, FakeFeatures(), source)


def test_statistics_are_computed_once_and_read_back_exactly(tmp_path):
    first = make(tmp_path)

    def never():
        raise AssertionError("computed twice")

    second = make(tmp_path, source=never)
    assert second.provenance == first.provenance
    for a, b in zip(first.statistics.parts(), second.statistics.parts()):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert frechet_distance(first.statistics, second.statistics).distance < 1e-9
    assert re.fullmatch(r"reference-fake-[0-9a-f]{12}\.npz", first.path.name)
    assert [p.name for p in tmp_path.iterdir()] == [first.path.name]


def test_S04_other_data_size_or_network_has_a_file_of_its_own(tmp_path):
    names = {make(tmp_path).path.name}
    for change in ({"fingerprint": "bb22"}, {"image_size": 16}, {"crop": "stretched"}):
        names.add(make(tmp_path, DATA | change).path.name)
    assert len(names) == 4


def test_S04_a_mismatch_is_refused_naming_both_values(tmp_path):
    path = make(tmp_path).path
    expected = full_provenance(DATA | {"fingerprint": "bb22", "image_size": 64}, FakeFeatures())
    with pytest.raises(EvaluationError) as error:
        load_reference(path, expected)
    assert "fingerprint: 'aa11' in the file, 'bb22' here" in str(error.value)
    assert "image_size: 8 in the file, 64 here" in str(error.value)
    assert "channels" not in str(error.value)


def test_S06_weights_of_the_network_are_part_of_the_provenance(tmp_path):
    path = make(tmp_path).path
    other = FakeFeatures()
    other.sha256 = "beef"
    with pytest.raises(EvaluationError, match="features_sha256: 'f00d' in the file, 'beef' here"):
        load_reference(path, full_provenance(DATA, other))


def test_S02_a_data_set_with_another_number_of_images_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="the reference has 20 images, 30 were announced"):
        make(tmp_path, source=lambda: batches(20))
    assert list(tmp_path.iterdir()) == []


def test_files_that_hold_something_else_are_refused(tmp_path):
    text = tmp_path / "a.npz"
    text.write_text("hello")
    with pytest.raises(EvaluationError, match="no file of reference statistics"):
        load_reference(text, {})
    np.savez(tmp_path / "b.npz", mean=np.zeros(3))
    with pytest.raises(EvaluationError, match="no file of reference statistics"):
        load_reference(tmp_path / "b.npz", {})
    with pytest.raises(EvaluationError, match="no reference statistics at"):
        load_reference(tmp_path / "none.npz", {})
