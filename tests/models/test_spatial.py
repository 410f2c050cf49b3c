"""Spatial conditions: what the denoiser reads beside x_t, and that images, holes and classes reach it unharmed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_jax.cli.train import reads_images
from dit_jax.config import config_from_dict, config_to_dict
from dit_jax.models.autoencoder import Codec
from dit_jax.models.build import abstract_inputs, abstract_params, build_autoencoder, build_denoiser, init_params
from dit_jax.models.cost import count_params
from dit_jax.models.spatial import batch_spatial, hole_on_grid, of_low_resolution, of_map, of_masked, reduced
from tests.tiny import autoencoder_config

KINDS = {"low_resolution": {"factor": 4}, "inpainting": {}, "semantic": {"num_classes": 5}}


def make_config(kind, latents=False, **spatial):
    """Returns a config of 16 x 16 colour images, or of their 8 x 8 x 2 latents."""
    return config_from_dict(
        {
            "stage": "diffusion",
            "data": {"name": "data", "image_size": 16, "num_classes": 3, "map_field": "map"},
            "latents": {"shape": (8, 8, 2), "encode_with": "runs/autoencoder", "scale": 2.0} if latents else None,
            "conditions": {"spatial": {"kind": kind} | KINDS[kind] | spatial},
            "dit": {"depth": 1, "width": 32, "num_heads": 2, "patch_size": 2},
            "training": {"num_train_steps": 1},
            "sampling": {"cfg_channels": None},
        }
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32),
        "hole": jnp.asarray(rng.random((2, 16, 16, 1)) < 0.1, jnp.float32),
        "map": jnp.asarray(rng.integers(0, 5, (2, 16, 16)), jnp.int32),
        "label": jnp.array([0, 1]),
    }


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    config = autoencoder_config(tmp_path_factory.mktemp("none"))
    params = init_params(config, jax.random.key(0))
    params["encoder"]["conv_in"]["kernel"] = jnp.tile(params["encoder"]["conv_in"]["kernel"], (1, 1, 3, 1))
    return Codec(params, build_autoencoder(config.autoencoder, 3), 2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latents", [False, True])
def test_condition_has_the_inputs_grid_and_the_networks_channels(batch, codec, kind, latents):
    config = make_config(kind, latents)
    found = batch_spatial(config, batch, codec if latents else None)
    _, _, conditions = abstract_inputs(config, batch_size=2)
    assert found.shape == conditions["spatial"].shape and found.dtype == jnp.float32


def test_channels_are_those_of_ldm():
    """Super-resolution reads 6 channels, inpainting 7 (section 4.4 and 4.5), with latents of 3."""
    for kind, channels in (("low_resolution", 6), ("inpainting", 7)):
        config = make_config(kind)
        kernel = abstract_params(config)["x_embedder"]["kernel"]
        assert kernel.shape == (2 * 2 * channels, 32)


def test_output_depends_on_the_condition_and_its_null_is_zeros(batch):
    config = make_config("low_resolution", dropout=0.1)
    model, params = build_denoiser(config), init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    spatial = batch_spatial(config, batch, None)
    x_t, t = batch["image"], jnp.array([5, 900])

    def output(spatial):
        return model.apply({"params": params}, x_t, t, {"label": batch["label"], "spatial": spatial})

    assert np.abs(output(spatial) - output(jnp.zeros_like(spatial))).max() > 1e-3
    alone = config_from_dict(config_to_dict(config) | {"conditions": None})
    assert count_params(abstract_params(alone)) == count_params(params) - 2 * 2 * 3 * 32


def test_reduction_is_pillows_bicubic():
    """Within a level of 256: Pillow rounds between its two passes."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC)).astype(int)
    found = (np.asarray(reduced(jnp.asarray(image[None], jnp.float32) / 127.5 - 1, 4))[0] + 1) * 127.5
    np.testing.assert_allclose(found, found.round(), atol=1e-3)  # as a file would have it
    np.testing.assert_allclose(found, expected, atol=1.01)


def test_low_resolution_of_the_grids_size_is_concatenated_as_it_is(batch):
    """As in LDM, whose 64 x 64 images meet 64 x 64 latents."""
    config = make_config("low_resolution", latents=True, factor=2)
    small = reduced(batch["image"], 2)
    np.testing.assert_allclose(of_low_resolution(config, small), small, atol=1e-6)


def test_what_is_in_the_hole_never_reaches_the_network(batch, codec):
    hidden = jnp.where(batch["hole"] > 0, 0.7, batch["image"])
    for config, encoder in ((make_config("inpainting"), None), (make_config("inpainting", True), codec)):
        one, other = (of_masked(config, images, batch["hole"], encoder) for images in (batch["image"], hidden))
        np.testing.assert_array_equal(one, other)
    pixels = of_masked(make_config("inpainting"), batch["image"], batch["hole"], None)
    known = batch["hole"][..., 0] == 0
    np.testing.assert_array_equal(pixels[..., :3][known], batch["image"][known])
    np.testing.assert_array_equal(pixels[..., 3:], batch["hole"])


def test_a_place_with_any_pixel_to_paint_is_to_be_painted():
    holes = jnp.zeros((1, 16, 16, 1)).at[0, 3, 4].set(1.0).at[0, 15, 15].set(1.0)
    grid = hole_on_grid(make_config("inpainting", latents=True), holes)
    assert np.argwhere(grid[0, ..., 0]).tolist() == [[1, 2], [7, 7]]


def test_classes_become_channels(batch):
    found = of_map(make_config("semantic"), batch["map"])
    np.testing.assert_array_equal(found.argmax(axis=-1), batch["map"])
    np.testing.assert_array_equal(found.sum(axis=-1), 1.0)
    reduced_map = of_map(make_config("semantic", latents=True), batch["map"])
    assert set(np.unique(reduced_map)) == {0.0, 1.0} and (reduced_map.sum(axis=-1) == 1).all()


def test_latents_of_images_to_read_may_be_anywhere_unless_they_are_trained_on():
    values = config_to_dict(make_config("inpainting", latents=True))
    values["latents"]["encode_with"] = None
    config = config_from_dict(values)
    with pytest.raises(ValueError, match="a latent cache does not hold; set config.latents.encode_with"):
        reads_images(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": {"spatial": {"kind": "low_resolution", "factor": 3}}}, "factor=3 must divide"),
        ({"conditions": {"spatial": {"kind": "low_resolution"}}}, "factor=None must be given where"),
        ({"conditions": {"spatial": {"kind": "inpainting", "factor": 4}}}, "factor=4 must be given where"),
        ({"conditions": {"spatial": {"kind": "semantic", "num_classes": 2}}}, "map_field=None must name the field"),
        ({"sampling": {"cfg_scale": 2.0}, "dit": {"class_conditional": False}}, "guidance needs a model that"),
    ],
)
def test_config_that_cannot_be_is_one_line(changes, message):
    values = {
        "stage": "diffusion",
        "data": {"name": "data", "image_size": 16, "num_classes": 3},
        "conditions": {"spatial": {"kind": "inpainting"}},
        "dit": {"depth": 1, "width": 32, "num_heads": 2, "patch_size": 2},
        "training": {"num_train_steps": 1},
        "sampling": {"cfg_channels": None},
    }
    for section, fields in changes.items():
        values[section] = values.get(section, {}) | fields
    with pytest.raises(ValueError, match=message) as error:
        config_from_dict(values)
    assert "\n" not in str(error.value)
