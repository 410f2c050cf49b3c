import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.metrics.picture import make_grid, to_uint8


@pytest.mark.parametrize("library", [np, jnp])
def test_floats_become_bytes_by_the_papers_rule(library):
    images = library.asarray([-2.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 3.0], dtype="float32")
    images = to_uint8(images)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, [0, 0, 64, 128, 191, 255, 255, 255])


def test_every_byte_survives_the_way_to_floats_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(pixels.astype(np.float32) / 127.5 - 1), pixels)


def test_grid_places_images_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    grid = make_grid(images, columns=2, padding=1, scale=1)
    assert grid.shape == (3 * 3 + 1, 2 * 4 + 1, 3) and grid.dtype == np.uint8
    for index in range(5):
        row, column = divmod(index, 2)
        cell = grid[1 + 3 * row : 3 + 3 * row, 1 + 4 * column : 4 + 4 * column]
        np.testing.assert_array_equal(cell, images[index])
    assert (grid[[0, 3, 6, 9]] == 255).all() and (grid[:, [0, 4, 8]] == 255).all()
    assert (grid[7:, 5:] == 255).all()  # the cell that is left over


def test_small_grey_images_are_enlarged_to_rgb():
    images = np.random.default_rng(0).integers(0, 255, (4, 28, 28, 1), np.uint8)
    grid = make_grid(images, columns=2, padding=0)
    assert grid.shape == (2 * 28 * 3, 2 * 28 * 3, 3)
    np.testing.assert_array_equal(grid[: 28 * 3 : 3, : 28 * 3 : 3], images[0].repeat(3, axis=-1))
    assert make_grid(np.zeros((1, 256, 256, 3), np.uint8), columns=8, padding=0).shape == (256, 256, 3)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)])
def test_what_is_not_a_batch_of_byte_images_is_an_error(images):
    with pytest.raises(ValueError, match="uint8"):
        make_grid(images, columns=2)
