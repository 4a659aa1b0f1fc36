"""Chunks as files: uneven and empty ones merge to what one process would have, whatever the batches."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.bits_per_dim import BitsPerDim, NoiseSettings
from tarflow.evaluation.metrics.frechet_distance import FeatureStatistics, frechet_distance
from tarflow.evaluation.samples.draw import Drawn
from tarflow.evaluation.worker.chunk_file import LIKELIHOOD, SAMPLES, Chunk, is_valid
from tarflow.evaluation.worker.chunk_results import (
    Keep,
    MergedLikelihood,
    SamplesPart,
    chunk_statistics,
    save_likelihood,
)
from tarflow.evaluation.worker.pictures import GridImages
from tarflow.npz import read_npz, write_npz
from tarflow.records import DamagedFileError

DIM = 4


def part(features=100, pixels=3):
    return SamplesPart(DIM, Keep(features, pixels, GridImages(1, 4, 0)))


def batch(indices, lost=()):
    """Samples whose pixels say their index."""
    indices = list(indices)
    images = torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 127.5 - 1
    finite = torch.tensor([i not in lost for i in indices], dtype=torch.bool)
    return Drawn(indices, torch.tensor(indices) % 3, images, images.clone(), finite, 0)


def rows_of(indices, shift=0.0):
    rng = torch.Generator().manual_seed(7)
    return torch.randn(64, DIM, generator=rng)[list(indices)] + shift


def write(folder, name, indices, size=3, lost=(), shift=0.0):
    """A chunk of samples, in batches of `size`."""
    indices, one = list(indices), part()
    for start in range(0, len(indices), size):
        drawn = batch(indices[start : start + size], lost)
        one.add(drawn, drawn.pixels(), rows_of(drawn.finite_indices(), shift))
    one.save(chunk(folder, name), {"by": name, "seconds": {}})
    return chunk(folder, name)


def chunk(folder, name):
    return Chunk(folder / name, {"chunk": name, "weights": "f00d"})


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.case("S08")
def test_uneven_and_empty_chunks_have_the_value_of_their_union(tmp_path, shift):
    """5, 3 and 0 samples against 12 real images."""
    chunks = [
        write(tmp_path, "a", range(5), shift=shift),
        write(tmp_path, "b", range(5, 8), shift=shift),
        write(tmp_path, "c", range(8, 10), lost=(8, 9), shift=shift),
    ]
    merged, whole, real = part(), FeatureStatistics(DIM), FeatureStatistics(DIM)
    for one in chunks:
        merged.merge(one)
    whole.add(rows_of(range(8), shift))
    real.add(rows_of(range(20, 32), shift))
    ours, theirs = frechet_distance(merged.statistics, real), frechet_distance(whole, real)
    assert ours.distance == pytest.approx(theirs.distance, rel=1e-6)
    assert torch.equal(merged.features, rows_of(range(8), shift))
    assert (merged.count.asked, merged.count.used, merged.count.nonfinite) == (10, 8, [8, 9])
    assert [statistics.count for statistics in chunk_statistics(chunks)] == [5, 3, 0]


def test_sums_of_spatial_features_are_merged_where_they_are_wanted_and_missed_where_they_are_not_there(tmp_path):
    chunks, whole = [], FeatureStatistics(3)
    for name, indices in (("a", range(5)), ("b", range(5, 8))):
        one = SamplesPart(DIM, Keep(100, 3, GridImages(1, 4, 0)), spatial_dim=3)
        drawn = batch(indices)
        one.add(drawn, drawn.pixels(), rows_of(indices), rows_of(indices)[:, :3] ** 2)
        one.save(chunk(tmp_path, name), {"by": name})
        chunks.append(chunk(tmp_path, name))
    whole.add(rows_of(range(8))[:, :3] ** 2)
    merged, without = SamplesPart(DIM, Keep(100, 3, GridImages(1, 4, 0)), spatial_dim=3), part()
    for one in chunks:
        merged.merge(one)
        without.merge(one)
    for ours, theirs in zip(merged.spatial.parts(), whole.parts()):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=1e-12, atol=1e-12)
    assert [found.count for found in chunk_statistics(chunks, "spatial_")] == [5, 3]
    assert without.spatial.dim == 0
    assert is_valid(chunks[0], SAMPLES)
    with pytest.raises(DamagedFileError, match="its features have another width"):
        SamplesPart(DIM, Keep(100, 3, GridImages(1, 4, 0)), spatial_dim=3).merge(write(tmp_path, "c", range(5)))


@pytest.mark.case("S06")
def test_a_chunk_has_the_same_bits_in_any_batches(tmp_path):
    found = []
    for size in (1, 7, 1000):
        merged = part()
        merged.merge(write(tmp_path, f"in-{size}", range(40), size, shift=1e4))
        found.append(merged.statistics.parts())
    for count, mean, scatter in found[1:]:
        assert count == 40
        assert torch.equal(mean, found[0][1])
        assert torch.equal(scatter, found[0][2])


@pytest.mark.case("S01")
def test_pixels_and_grid_are_kept_by_index_wherever_the_chunks_end(tmp_path):
    whole, pieces = part(features=6), part(features=6)
    whole.merge(write(tmp_path, "whole", range(12), lost=(1,)))
    for start in (0, 2, 4, 6, 8, 10):
        pieces.merge(write(tmp_path, f"from-{start}", range(start, start + 2), lost=(1,)))
    for merged in (whole, pieces):
        assert merged.pixels[:, 0, 0, 0].tolist() == [0, 2]  # of the samples 0, 1, 2, of which 1 is lost
        assert merged.labels.tolist() == [0, 2]
        assert sorted(merged.keep.grid._images) == [0, 2, 3]
    assert torch.equal(whole.pixels, pieces.pixels)


def test_held_out_images_come_once(tmp_path):
    noise = NoiseSettings("gaussian", 0.1, draws=2)
    for name, ids in (("a", [1, 2]), ("b", [3]), ("again", [3])):
        bits = BitsPerDim(noise)
        bits.put(ids, [[float(i), float(i + 1)] for i in ids], 64)
        save_likelihood(chunk(tmp_path, name), bits, {"by": name})
    merged = MergedLikelihood(noise)
    assert [merged.merge(chunk(tmp_path, name)).by for name in ("b", "a")] == ["b", "a"]
    assert merged.bits.result()["bits_per_dim"] == 2.5
    with pytest.raises(EvaluationError, match="sample 3 of the held-out images was added twice"):
        merged.merge(chunk(tmp_path, "again"))


@pytest.mark.case("H04")
def test_no_flipped_bit_of_a_chunk_is_merged(tmp_path):
    one = write(tmp_path, "a", range(5))
    data, refused = one.path.read_bytes(), 0
    for at in random.Random(0).sample(range(len(data)), 300):
        one.path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        if not is_valid(one, SAMPLES):
            refused += 1
            continue
        merged = part()
        merged.merge(one)
        assert torch.equal(merged.features, rows_of(range(5)))
    assert refused > 150


@pytest.mark.parametrize("of", [{"chunk": "b", "weights": "f00d"}, {"chunk": "a", "weights": "beef"}, {}])
@pytest.mark.case("H04")
def test_a_chunk_of_something_else_is_never_merged(tmp_path, of):
    one = replace(write(tmp_path, "a", range(5)), identity=of)
    assert not is_valid(one, SAMPLES)
    with pytest.raises(DamagedFileError, match="it belongs to another chunk, or to other weights or settings"):
        part().merge(one)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "no checksum": ({}, "it carries no checksum"),
    "another count": ({"count": np.array([4])}, "do not match its 4 samples"),
    "a negative count": ({"count": np.array([-1])}, "do not match"),
    "another width": ({"mean": np.zeros(5)}, "'features' is float32"),
    "no scatter matrix": ({"scatter": np.zeros(9)}, "scatter matrix and its mean have different widths"),
    "rows of another type": ({"features": np.zeros((2, 4), np.float16)}, "'features' is float16"),
    "nan": ({"mean": np.full(4, np.nan)}, "not finite"),
    "labels of other samples": ({"labels": np.zeros(7, np.int64)}, "does not match the others"),
    "more lost than asked": ({"lost_nonfinite": np.arange(3)}, "contradict each other"),
    "no grid": ({"grid_images": None, "grid_noisy": None}, "images of its grid are missing"),
    "an array less": ({"hashes": None}, "lacks the array 'hashes'"),
    "half of the spatial sums": ({"spatial_mean": np.zeros(3)}, "its spatial statistics are incomplete"),
    "spatial sums of two widths": ({"spatial_mean": np.zeros(3), "spatial_scatter": np.zeros(5)}, "different widths"),
    "an array more": ({"other": np.zeros(3)}, "an unknown array 'other'"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.case("H06")
def test_a_chunk_that_cannot_be_is_refused_whoever_wrote_it(tmp_path, what):
    one, (arrays, says) = write(tmp_path, "a", range(5)), CHANGES[what]
    stored = read_npz(one.path).arrays | arrays
    with open(one.path, "wb") as file:
        kept = {name: array for name, array in stored.items() if array is not None}
        (write_npz if arrays else lambda file, kept: np.savez(file, **kept))(file, kept)
    assert not is_valid(one, SAMPLES)
    with pytest.raises(DamagedFileError, match=says):
        part().merge(one)


@pytest.mark.case("H06")
def test_samples_are_no_likelihoods(tmp_path):
    assert not is_valid(write(tmp_path, "a", range(5)), LIKELIHOOD)
