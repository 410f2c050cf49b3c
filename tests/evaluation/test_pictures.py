"""Names of classes in pictures of samples."""

import numpy as np
import pytest

from dit_jax.config import DataConfig
from dit_jax.evaluation.pictures import class_texts, sample_grid
from dit_jax.metrics.picture import make_grid

IMAGES = np.zeros((6, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(("name", "turned"), [("cat", False), ("a name that is too long for its column", True)])
def test_names_stand_above_their_columns(name, turned):
    grid, plain = sample_grid(IMAGES, 3, [name, "b", ""] * 2), make_grid(IMAGES, 3)
    header = grid[: -len(plain)]
    np.testing.assert_array_equal(grid[-len(plain) :], plain)
    assert (len(header) > 14) == turned and header.shape[1] == plain.shape[1]
    written = [(part < 200).any() for part in np.array_split(header, 3, axis=1)]
    assert written == [True, True, False]
    np.testing.assert_array_equal(sample_grid(IMAGES, 3), plain)


def test_names_stand_above_each_image_where_columns_are_not_of_one_class():
    images = np.full((12, 8, 8, 3), 0, np.uint8)
    grid = sample_grid(images, 1000, [f"class {i}" for i in range(12)])
    row = make_grid(images[:10], 10)
    assert grid.shape == (2 * (len(row) + 14), row.shape[1], 3)
    np.testing.assert_array_equal(grid[14 : 14 + len(row)], row)
    lower = np.array_split(grid[14 + len(row) : 28 + len(row)], 10, axis=1)
    assert [bool((part < 200).any()) for part in lower] == [True] * 2 + [False] * 8


def test_a_name_that_the_font_cannot_write_is_its_number():
    data = DataConfig("x", 8, num_classes=3, class_names=("cat", "猫", "a\nb"))
    assert class_texts(data, [0, 1, 2, 1]) == ["cat", "1", "a\\nb", "1"]
    assert class_texts(DataConfig("x", 8), [0]) is None
