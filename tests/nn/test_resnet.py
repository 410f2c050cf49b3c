"""The autoencoder's blocks against explicit indexing and formulas."""

import math

import jax
import numpy as np
import pytest

from dit_jax.nn.resnet import AttentionBlock, Downsample, ResBlock, Upsample, group_norm


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(module, *args, scale=0.3):
    """Returns variables of a module, every one of them random."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), *args))
    return tree.unflatten([scale * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def conv_variables(kernel):
    """Returns the variables of a module whose one layer is a convolution `conv` without bias."""
    return {"params": {"conv": {"kernel": kernel, "bias": np.zeros(kernel.shape[-1], np.float32)}}}


def normalised(x, num_groups):
    """Returns x [B, H, W, C] in float64 with mean 0 and variance 1 in every group of channels, epsilon 1e-6."""
    groups = x.astype(np.float64).reshape(x.shape[0], -1, num_groups, x.shape[-1] // num_groups)
    mean, variance = groups.mean(axis=(1, 3), keepdims=True), groups.var(axis=(1, 3), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)


@pytest.mark.parametrize(
    "module",
    [ResBlock(8, num_groups=4), AttentionBlock(num_groups=4), Downsample(), Upsample()],
    ids=lambda module: type(module).__name__,
)
def test_convolutions_start_as_pytorchs_with_zero_bias(module):
    """Kernels are uniform within 1 / sqrt(fan_in), the default that LDM's autoencoders were trained from."""
    params = jax.jit(module.init)(jax.random.key(0), normal(1, 2, 2, 8))["params"]
    layers = [layer for layer in params.values() if "kernel" in layer]
    assert layers
    for layer in layers:
        kernel = layer["kernel"]
        bound = math.prod(kernel.shape[:-1]) ** -0.5
        assert 0.9 * bound < abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.2)  # of a uniform distribution
        assert not layer["bias"].any()


def test_group_norm_has_the_groups_and_the_epsilon_of_ldm():
    x, norm = 1e-3 * normal(2, 4, 5, 8), group_norm(4, "norm")  # so small that epsilon counts
    variables = norm.init(jax.random.key(0), x)
    np.testing.assert_allclose(norm.apply(variables, x), normalised(x, 4), atol=1e-5)


@pytest.mark.parametrize(("row", "column"), [(a, b) for a in range(3) for b in range(3)])
def test_downsample_reads_each_tap_at_twice_the_index_and_pads_at_bottom_and_right(row, column):
    x = normal(1, 4, 6, 1)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[row, column] = 1
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    y = Downsample().apply(conv_variables(kernel), x)
    assert y.shape == (1, 2, 3, 1)
    np.testing.assert_allclose(y, padded[:, row::2, column::2][:, :2, :3], atol=1e-7)


def test_upsample_repeats_the_nearest_pixel():
    x = normal(1, 3, 2, 1)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1  # the convolution after it is the identity
    y = Upsample().apply(conv_variables(kernel), x)
    assert y.shape == (1, 6, 4, 1)
    for i in range(6):
        for j in range(4):
            np.testing.assert_allclose(y[0, i, j], x[0, i // 2, j // 2], atol=1e-7)


@pytest.mark.parametrize("features", [8, 12])
def test_res_block_has_a_projection_only_where_the_width_changes(features):
    x, block = normal(2, 4, 4, 8), ResBlock(features, num_groups=4)
    variables = random_variables(block, x)
    params = variables["params"]
    assert ("nin_shortcut" in params) == (features != 8)
    for name in ("kernel", "bias"):
        params["conv2"][name] = np.zeros_like(params["conv2"][name])  # only the skip is left
    skip = x
    if features != 8:
        skip = x @ params["nin_shortcut"]["kernel"][0, 0] + params["nin_shortcut"]["bias"]
    np.testing.assert_allclose(block.apply(variables, x), skip, atol=1e-5)


def test_res_block_is_norm_swish_conv_twice():
    x, block = normal(1, 1, 1, 8), ResBlock(8, num_groups=2)  # one pixel: a convolution is its central tap
    variables = random_variables(block, x)
    h = x
    for i in (1, 2):
        norm, conv = variables["params"][f"norm{i}"], variables["params"][f"conv{i}"]
        h = normalised(h, 2) * norm["scale"] + norm["bias"]
        h = (h / (1 + np.exp(-h))) @ conv["kernel"][1, 1] + conv["bias"]
    np.testing.assert_allclose(block.apply(variables, x), x + h, atol=1e-5)


def test_attention_block_adds_single_head_attention_over_positions():
    x, block = normal(2, 3, 2, 8), AttentionBlock(num_groups=4)
    variables = random_variables(block, x)
    params = variables["params"]

    def project(name, h):
        return h @ params[name]["kernel"][0, 0] + params[name]["bias"]

    h = normalised(x, 4) * params["norm"]["scale"] + params["norm"]["bias"]
    q, k, v = (project(name, h).reshape(2, 6, 8) for name in ("q", "k", "v"))
    logits = q @ k.swapaxes(1, 2) / math.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = x + project("proj_out", (weights @ v).reshape(x.shape))
    np.testing.assert_allclose(block.apply(variables, x), expected, atol=1e-5)
