"""The crop against arithmetic done by hand and against Pillow called directly."""

import numpy as np
import pytest
from PIL import Image

from dit_jax.data import transforms


def random_image(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def test_image_of_the_right_size_is_untouched():
    image = random_image(12, 12, 3)
    assert transforms.center_crop(image, 12) is image


@pytest.mark.parametrize("channels", [1, 3])
def test_image_of_four_times_the_size_is_averaged_over_its_pixels(channels):
    image = random_image(32, 32, channels)
    halved = image.astype(np.int64)
    for _ in range(2):  # Pillow averages along rows, then along columns, and rounds to uint8 after each, halves upwards
        halved = (halved[:, ::2] + halved[:, 1::2] + 1) // 2
        halved = (halved[::2] + halved[1::2] + 1) // 2
    np.testing.assert_array_equal(transforms.center_crop(image, 8), halved)


def test_crop_is_central_along_the_longer_side():
    image = random_image(10, 17, 3)  # the short side is the target: no filter touches the pixels
    np.testing.assert_array_equal(transforms.center_crop(image, 10), image[:, 3:13])
    np.testing.assert_array_equal(transforms.center_crop(image.transpose(1, 0, 2), 10), image.transpose(1, 0, 2)[3:13])


@pytest.mark.parametrize(("height", "width"), [(45, 70), (70, 45), (20, 31)])
def test_crop_equals_box_halvings_then_bicubic(height, width):
    image, size = random_image(height, width, 3), 24
    scaled = Image.fromarray(image)
    if min(height, width) >= 48:
        scaled = scaled.resize((width // 2, height // 2), Image.BOX)
    short = min(scaled.size)
    scaled = scaled.resize([round(side * size / short) for side in scaled.size], Image.BICUBIC)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    expected = np.asarray(scaled)[top : top + size, left : left + size]
    np.testing.assert_array_equal(transforms.center_crop(image, size), expected)


@pytest.mark.parametrize("shape", [(1, 1), (7, 100), (100, 7), (23, 23), (47, 48), (49, 49)])
def test_crop_has_the_size_for_any_shape(shape):
    assert transforms.center_crop(random_image(*shape, 1), 24).shape == (24, 24, 1)


def test_grey_becomes_equal_channels_and_back_is_exact():
    grey = random_image(5, 6, 1)
    rgb = transforms.to_channels(grey, 3)
    np.testing.assert_array_equal(rgb, np.repeat(grey, 3, axis=-1))
    np.testing.assert_array_equal(transforms.to_channels(rgb, 1), grey)
    assert transforms.to_channels(grey, 1) is grey


def test_to_float_maps_the_range_of_uint8_to_minus_one_and_one():
    values = transforms.to_float(np.array([0, 51, 255], np.uint8))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [-1, -0.6, 1], atol=1e-7)


def test_flip_mirrors_columns():
    image = random_image(3, 4, 1)
    np.testing.assert_array_equal(transforms.horizontal_flip(image)[:, 0], image[:, -1])
    np.testing.assert_array_equal(transforms.horizontal_flip(transforms.horizontal_flip(image)), image)


@pytest.mark.parametrize("mirrored", [False, True])
def test_map_is_cut_as_its_image_is(mirrored):
    """Four classes, an image's quarters; by brightness its own crop says where they are."""
    classes = np.repeat(np.repeat([[0, 1, 3, 2], [2, 3, 1, 0]], 20, axis=0), 15, axis=1).astype(np.uint8)  # 40 x 60
    image = np.repeat((60 * classes)[..., None], 3, axis=-1)
    expected = np.round(transforms.center_crop(image, 16)[..., 0] / 60).astype(int)
    if mirrored:
        expected = expected[:, ::-1]
    found = transforms.semantic_map(classes, 16, 4, mirrored)
    assert found.shape == (16, 16) and found.dtype == np.int32
    assert (found == expected).mean() > 0.85  # all but at the borders, which the image's filter blurs
    with pytest.raises(ValueError, match="a map has the class 3, but config.conditions.spatial.num_classes=3"):
        transforms.semantic_map(classes, 16, 3, mirrored)
