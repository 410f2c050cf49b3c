"""Random holes for training to inpaint."""

import numpy as np

from dit_jax.config import DataConfig, SpatialConfig
from dit_jax.data.masks import random_hole
from dit_jax.data.pipeline import image_transform, load_examples, spatial_arrays


def holes(size, count=300):
    return np.stack([random_hole(np.random.default_rng(i), size) for i in range(count)])


def test_holes_leave_some_and_hide_some_of_every_size():
    for size in (8, 32, 64):
        found = holes(size)
        assert found.shape == (300, size, size, 1) and set(np.unique(found)) == {0.0, 1.0}
        shares = found.mean(axis=(1, 2, 3))
        assert shares.min() > 0 and shares.max() < 1
        assert (shares < 0.15).any() and (shares > 0.5).any() and 0.2 < shares.mean() < 0.5


def test_every_place_is_hidden_in_some_and_known_in_others():
    share = holes(32).mean(axis=(0, 3))
    assert share.min() > 0.1 and share.max() < 0.7


def test_hole_of_an_example_is_a_function_of_its_key():
    image = np.full((8, 8, 3), 9, np.uint8)
    data = DataConfig("data", 8, num_classes=1)
    transform = image_transform(data, True, spatial_arrays(data, SpatialConfig("inpainting")))
    examples = [{"image": image, "label": 0}] * 5
    once, again = (load_examples(examples, transform, range(5))["hole"] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert len(np.unique(once, axis=0)) == 5
