"""Grids: rows by class, plain margins, whole-number enlargement."""

import pytest
import torch

from tarflow.evaluation.errors import EvaluationError
from tarflow.evaluation.samples.grid import grid_indices, make_grid


def test_a_row_holds_one_class():
    indices = grid_indices(3, 4, num_classes=3)
    assert [i % 3 for i in indices] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(indices)) == 12


def test_classes_come_round_again_or_the_first_are_shown():
    twice = grid_indices(4, 2, num_classes=2)
    assert [i % 2 for i in twice] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert len(set(twice)) == 8
    assert [i % 10 for i in grid_indices(2, 3, num_classes=10)] == [0, 0, 0, 1, 1, 1]
    assert grid_indices(2, 3, num_classes=0) == [0, 1, 2, 3, 4, 5]


def test_images_stand_in_their_places_with_margins():
    images = [torch.full((3, 60, 60), 10 * i, dtype=torch.uint8) for i in range(5)]
    grid = make_grid(images, columns=3)
    assert grid.shape == (3, 2 * 62 + 2, 3 * 62 + 2)
    for i in range(5):
        top, left = i // 3 * 62 + 2, i % 3 * 62 + 2
        assert grid[:, top : top + 60, left : left + 60].unique().tolist() == [10 * i]
        assert grid[:, top - 2 : top, left : left + 60].unique().tolist() == [255]
    assert grid[:, 64:124, 126:186].unique().tolist() == [255]  # the sixth place is empty


def test_small_images_are_enlarged_by_whole_factors():
    image = torch.arange(28 * 28).view(1, 28, 28).remainder(251).to(torch.uint8)
    grid = make_grid([image, None], columns=2)
    assert grid.shape == (1, 64, 124)
    assert torch.equal(grid[:, 4:60:2, 4:60:2], image)
    assert torch.equal(grid[:, 5:61:2, 5:61:2], image)
    assert grid[:, :, 62:].unique().tolist() == [255]


def test_a_grid_of_nothing_is_an_error():
    with pytest.raises(EvaluationError, match="no images for a grid"):
        make_grid([None, None], columns=2)
