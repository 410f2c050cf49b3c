"""LPIPS equals an independent PyTorch one with the same weights; its gradient is finite wherever a loss may go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from random_lpips import random_lpips, torch_lpips
from safetensors.numpy import save_file

from dit_jax.config import AutoencoderConfig
from dit_jax.perceptual.lpips import abstract_lpips, load_lpips, lpips, lpips_distance, lpips_features

distance = jax.jit(lpips)
gradient = jax.jit(jax.grad(lambda params, images, others: lpips(params, images, others).sum(), argnums=2))


def image_pairs(*shape, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, shape).astype(np.float32)
    return images, np.clip(images + rng.normal(0, 0.2, shape), -1, 1).astype(np.float32)


def test_vgg16_and_the_weights_of_channels_have_the_released_sizes():
    shapes = flatten_dict(abstract_lpips(), sep="/")
    assert sum(leaf.size for name, leaf in shapes.items() if name.startswith("vgg16/")) == 14_714_688
    assert sum(leaf.size for name, leaf in shapes.items() if name.startswith("lin")) == 1_472
    assert len(shapes) == 2 * 13 + 5


@pytest.mark.parametrize("shape", [(2, 16, 16, 3), (2, 28, 28, 1), (1, 37, 50, 3)])
def test_distances_equal_pytorchs(shape):
    """1e-5: float32 sums in another order; a distance is about 1 with these weights."""
    images, others = image_pairs(*shape)
    expected = torch_lpips(random_lpips(), torch.from_numpy(images), torch.from_numpy(others))
    values = distance(random_lpips(), images, others)
    assert values.shape == shape[:1] and values.dtype == jnp.float32
    assert np.all(np.asarray(values) > 0.1)
    np.testing.assert_allclose(values, expected.numpy(), rtol=0, atol=1e-5)


def test_gradient_by_the_reconstruction_equals_pytorchs():
    images, others = image_pairs(2, 16, 16, 3)
    reconstructions = torch.from_numpy(others).double().requires_grad_()
    torch_lpips(random_lpips(), torch.from_numpy(images).double(), reconstructions).sum().backward()
    expected = reconstructions.grad.numpy()
    np.testing.assert_allclose(
        gradient(random_lpips(), images, others), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )


def test_identical_images_have_no_distance_and_a_finite_gradient():
    images, _ = image_pairs(2, 16, 16, 3)
    np.testing.assert_allclose(distance(random_lpips(), images, images), 0, atol=1e-12)
    np.testing.assert_allclose(gradient(random_lpips(), images, images), 0, atol=1e-6)


def with_layers(params, change):
    return params | {"vgg16": {name: change(layer) for name, layer in params["vgg16"].items()}}


def test_gradient_is_zero_where_all_features_are_zero():
    dead = with_layers(random_lpips(), lambda layer: layer | {"bias": layer["bias"] - 100})
    images, others = image_pairs(2, 16, 16, 3)
    for features in lpips_features(dead, images):
        np.testing.assert_array_equal(features, 0)
    np.testing.assert_array_equal(gradient(dead, images, others), 0)


def test_gradient_is_finite_where_squares_of_features_underflow():
    """Their length is 0, yet ReLU lets the gradient through: PyTorch's is NaN there."""
    tiny = with_layers(
        random_lpips(), lambda layer: {"kernel": 1e-26 * layer["kernel"], "bias": 0 * layer["bias"] + 1e-25}
    )
    images, others = image_pairs(2, 16, 16, 3)
    assert np.all(np.isfinite(gradient(tiny, images, others)))
    reconstructions = torch.from_numpy(others).requires_grad_()
    torch_lpips(tiny, torch.from_numpy(images), reconstructions).sum().backward()
    assert np.any(np.isnan(reconstructions.grad.numpy()))


def test_features_of_an_image_can_be_used_again():
    images, others = image_pairs(2, 16, 16, 3)
    features = jax.jit(lpips_features)(random_lpips(), images)
    assert [f.shape for f in features] == [
        (2, side, side, width) for side, width in zip((16, 8, 4, 2, 1), (64, 128, 256, 512, 512), strict=True)
    ]
    for f in features:
        np.testing.assert_allclose(jnp.linalg.norm(f, axis=-1), 1, atol=1e-5)
    values = jax.jit(lpips_distance)(random_lpips(), features, jax.jit(lpips_features)(random_lpips(), others))
    np.testing.assert_allclose(values, distance(random_lpips(), images, others), atol=1e-6)


def test_grey_images_are_repeated_to_rgb():
    images, others = image_pairs(2, 16, 16, 1)
    np.testing.assert_allclose(
        distance(random_lpips(), images, others),
        distance(random_lpips(), images.repeat(3, axis=-1), others.repeat(3, axis=-1)),
        atol=1e-6,
    )


@pytest.mark.parametrize("shape", [(1, 15, 16, 3), (1, 16, 16, 4), (16, 16, 3)])
def test_images_that_vgg_cannot_take_are_an_error(shape):
    with pytest.raises(ValueError, match="at least 16 pixels a side"):
        lpips(random_lpips(), np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def test_weights_are_loaded_as_they_were_written(tmp_path):
    save_file(flatten_dict(random_lpips(), sep="/"), tmp_path / "lpips.safetensors")
    loaded = load_lpips(tmp_path / "lpips.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(random_lpips())
    jax.tree.map(np.testing.assert_array_equal, loaded, random_lpips())


def test_missing_weights_are_an_error_with_the_key_and_the_command(tmp_path):
    with pytest.raises(ValueError, match=r"^config\.autoencoder\.lpips_path='.*none': no such file; \./launch/lpips_w"):
        load_lpips(tmp_path / "none")
    assert "lpips_path" in {field.name for field in dataclasses.fields(AutoencoderConfig)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lin0/kernel": None}, r"tensor 'lin0/kernel' must be float32 \(1, 1, 64, 1\), but is nothing; \./launch"),
        ({"lin9/kernel": np.zeros(1, np.float32)}, r"tensor 'lin9/kernel' must be absent, but is float32 \(1,\)"),
        ({"lin0/kernel": np.zeros(64, np.float32)}, r"must be float32 \(1, 1, 64, 1\), but is float32 \(64,\)"),
        ({"lin0/kernel": np.zeros((1, 1, 64, 1), np.int32)}, "but is int32"),
    ],
)
def test_other_weights_are_an_error_that_names_the_tensor(change, message, tmp_path):
    tensors = {k: v for k, v in (flatten_dict(random_lpips(), sep="/") | change).items() if v is not None}
    save_file(tensors, tmp_path / "lpips.safetensors")
    with pytest.raises(ValueError, match=message):
        load_lpips(tmp_path / "lpips.safetensors")


def test_truncated_weights_are_an_error(tmp_path):
    (tmp_path / "lpips.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        load_lpips(tmp_path / "lpips.safetensors")
