"""Patches, positions, timesteps and labels against explicit formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.nn.embeddings import (
    LabelEmbedder,
    TimestepEmbedder,
    patchify,
    sincos_2d,
    timestep_features,
    unpatchify,
)


@pytest.mark.parametrize(
    ("height", "width", "channels", "patch_size"), [(8, 8, 4, 2), (4, 12, 3, 4), (12, 6, 1, 3), (5, 7, 2, 1)]
)
def test_unpatchify_inverts_patchify(height, width, channels, patch_size):
    x = np.random.default_rng(0).normal(size=(2, height, width, channels)).astype(np.float32)
    tokens = patchify(x, patch_size)
    assert tokens.shape == (2, height * width // patch_size**2, patch_size**2 * channels)
    np.testing.assert_array_equal(unpatchify(tokens, patch_size, height), x)


def test_unpatchify_axes_are_h_w_p_q_c():
    rows, columns, p, channels = 2, 3, 2, 5
    tokens = np.arange(rows * columns * p * p * channels).reshape(1, rows * columns, p * p * channels)
    image = unpatchify(tokens, p, rows * p)
    assert image.shape == (1, rows * p, columns * p, channels)
    for i in range(rows * p):
        for j in range(columns * p):
            for c in range(channels):
                token, feature = (i // p) * columns + j // p, ((i % p) * p + j % p) * channels + c
                assert image[0, i, j, c] == tokens[0, token, feature]


@pytest.mark.parametrize("features", [8, 256])
def test_timestep_features_are_cosines_then_sines_of_t_over_geometric_periods(features):
    t = np.array([0, 1, 7, 500, 999])
    half = features // 2
    expected = np.zeros((len(t), features))
    for i in range(half):
        frequency = np.exp(-np.log(10000.0) * i / half)
        expected[:, i] = np.cos(t * frequency)
        expected[:, half + i] = np.sin(t * frequency)
    features = timestep_features(jnp.asarray(t), features)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, expected, atol=1e-4)  # float32 angles up to 999: half a unit of 6e-5


def test_position_table_encodes_column_then_row_by_sine_then_cosine():
    height, width, features = 3, 5, 16
    table = sincos_2d(height, width, features)
    assert table.shape == (height * width, features) and table.dtype == np.float32
    quarter = features // 4
    for row in range(height):
        for column in range(width):
            for i in range(quarter):
                omega = 10000.0 ** (-i / quarter)
                entry = table[row * width + column]
                expected = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
                np.testing.assert_allclose(entry[i::quarter], expected, atol=1e-7)


def test_positions_are_distinct():
    table = sincos_2d(16, 16, 64)
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert distances[~np.eye(len(table), dtype=bool)].min() > 0.1


def test_label_table_has_a_row_for_the_null_class():
    embedder = LabelEmbedder(num_classes=10, width=64)
    labels = jnp.arange(11)
    params = embedder.init(jax.random.key(0), labels)["params"]
    table = params["embedding_table"]
    assert table.shape == (11, 64)
    assert 0.015 < table.std() < 0.025  # N(0, 0.02)
    np.testing.assert_array_equal(embedder.apply({"params": params}, labels), table)


def test_timestep_embedder_is_linear_silu_linear_of_the_features():
    embedder, t = TimestepEmbedder(width=32), jnp.array([0, 10, 999])
    params = embedder.init(jax.random.key(0), t)["params"]
    kernels = [np.asarray(params[name]["kernel"], np.float64) for name in ("mlp_0", "mlp_2")]
    assert kernels[0].shape == (256, 32)
    for kernel in kernels:
        assert 0.017 < kernel.std() < 0.023  # N(0, 0.02)
    hidden = np.asarray(timestep_features(t), np.float64) @ kernels[0]
    expected = hidden / (1 + np.exp(-hidden)) @ kernels[1]
    np.testing.assert_allclose(embedder.apply({"params": params}, t), expected, atol=1e-6)
