"""Nearest training images and the vote of their labels."""

import pytest
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.metrics.nearest_neighbours import label_agreement, nearest_neighbours, vote


def pictures(n, size=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, size, size), generator=rng, dtype=torch.uint8)


def training(n=40, size=8, batch=7):
    pixels = pictures(n, size, seed=1)
    return list(zip(pixels.split(batch), (torch.arange(n) % 4).split(batch), (torch.arange(n) + 500).split(batch)))


def test_neighbours_equal_those_of_all_distances_at_once():
    samples = pictures(6)
    found = nearest_neighbours(samples, training())
    all_pixels = torch.cat([p for p, _, _ in training()])
    exact = torch.cdist(
        samples.flatten(1).double(), all_pixels.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    nearest = exact.sort(dim=1).indices[:, :5]
    assert torch.equal(found.ids, nearest + 500)
    assert torch.equal(found.labels, nearest % 4)
    torch.testing.assert_close(found.distances, exact.gather(1, nearest) / 8)
    assert torch.equal(found.nearest, all_pixels[nearest[:, 0]])
    assert found.searched == 40


def test_neighbours_do_not_depend_on_batches():
    results = [nearest_neighbours(pictures(6), training(batch=size)) for size in (1, 7, 40)]
    for other in results[1:]:
        assert torch.equal(other.ids, results[0].ids)
        assert torch.equal(other.distances, results[0].distances)
        assert torch.equal(other.nearest, results[0].nearest)


def test_a_copied_training_image_is_found_at_distance_zero():
    copied = torch.cat([p for p, _, _ in training()])[[13]]
    found = nearest_neighbours(copied, training())
    assert found.ids[0, 0] == 513
    assert found.distances[0, 0] == 0


def test_large_images_are_compared_at_64_pixels():
    big = training(n=12, size=128, batch=5)
    copied = torch.cat([p for p, _, _ in big])[[4]]
    found = nearest_neighbours(copied, big)
    assert (found.ids[0, 0], found.distances[0, 0]) == (504, 0)
    assert found.nearest.shape == (1, 1, 128, 128)


def test_large_rectangles_are_compared_with_their_longer_side_at_64_pixels():
    """Two images that differ in one half of the longer side alone: averaged over a square of 64, both sides would shrink."""
    image = pictures(1, 128)[..., :32].contiguous()
    other = image.clone()
    other[:, :, 64:] = 255 - other[:, :, 64:]
    found = nearest_neighbours(image, [(torch.cat([other, image]), torch.tensor([0, 1]), torch.tensor([7, 8]))], k=2)
    assert found.ids[0].tolist() == [8, 7]
    theirs, ours = (x.double().view(1, 1, 64, 2, 16, 2).mean((3, 5)).float().round().double() for x in (other, image))
    assert found.distances[0].tolist() == pytest.approx([0, float((theirs - ours).square().mean().sqrt())], rel=1e-6)


def test_the_vote_goes_to_the_most_frequent_and_then_to_the_nearest():
    labels = torch.tensor([[1, 2, 2, 3, 3], [0, 0, 1, 1, 2], [5, 4, 4, 5, 9], [-1, -1, -1, 7, 8], [3, 3, 3, 3, 3]])
    assert vote(labels).tolist() == [2, 0, 5, 7, 3]


def test_agreement_counts_labelled_samples_only():
    pixels = torch.stack([torch.full((1, 8, 8), 60 * c, dtype=torch.uint8) for c in range(4)])
    batches = [(pixels.repeat(5, 1, 1, 1), torch.arange(4).repeat(5), torch.arange(20))]
    samples = pixels[[0, 1, 2, 3]]
    found = nearest_neighbours(samples, batches)
    assert label_agreement(torch.tensor([0, 1, 2, 3]), found) == 1.0
    assert label_agreement(torch.tensor([0, 1, 2, 0]), found) == 0.75
    assert label_agreement(torch.tensor([0, 3, -1, -1]), found) == 0.5
    assert label_agreement(torch.tensor([-1, -1, -1, -1]), found) is None


def test_training_images_of_another_shape_or_none_are_refused():
    with pytest.raises(EvaluationError, match=r"\[1, 8, 8\], samples \[1, 16, 16\]"):
        nearest_neighbours(pictures(2, size=16), training())
    with pytest.raises(EvaluationError, match="no training images"):
        nearest_neighbours(pictures(2), [])
