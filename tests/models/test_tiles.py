"""Tiles: they cover a side, their weights sum to one, and they give what the whole gives wherever that can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import AutoencoderConfig, CodebookConfig
from dit_jax.models.autoencoder import Codec
from dit_jax.models.build import build_autoencoder
from dit_jax.models.tiles import apply_by_tiles, blending_weights, tile_starts

SIDES = [(8, 8), (9, 8), (14, 8), (15, 8), (40, 8), (41, 12), (64, 16), (101, 33), (5, 8)]


def random_array(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def make_codec(num_codes=None):
    """Returns an f4 autoencoder with random parameters that keep the variance about where it is."""
    config = AutoencoderConfig(
        base_channels=8,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        latent_channels=3,
        num_groups=4,
        codebook=CodebookConfig(num_codes=num_codes) if num_codes else None,
    )
    model = build_autoencoder(config, image_channels=3)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jax.random.key(1))["params"]
    rng = np.random.default_rng(1)

    def values(leaf):
        if leaf.ndim == 1:
            return rng.normal(1, 0.2, leaf.shape).astype(np.float32)
        fan_in = leaf.size // leaf.shape[-1] if leaf.ndim == 4 else 1  # of codes: as large as latents
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

    return Codec(jax.tree.map(values, abstract), model, 0.5)


@pytest.fixture(scope="module", params=[None, 16], ids=["kl", "vq"])
def codec(request):
    return make_codec(request.param)


@pytest.mark.parametrize(("size", "tile"), SIDES)
def test_tiles_cover_the_side_to_its_edges_and_overlap_by_a_quarter(size, tile):
    starts = tile_starts(size, tile)
    assert starts[0] == 0 and starts[-1] == max(0, size - tile)
    assert all(0 < step <= tile - tile // 4 for step in np.diff(starts))


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize(("size", "tile"), SIDES)
def test_weights_sum_to_one_everywhere_and_fall_to_the_edges(size, tile, factor):
    starts, total = tile_starts(size, tile), np.zeros(size * factor)
    weights = blending_weights(starts, size, tile, factor)
    for start, weight in zip(starts, weights, strict=True):
        total[start * factor :][: len(weight)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (weights > 0).all()
    if len(starts) > 1:
        ramp = tile // 4 * factor
        assert weights[0][-1] < 1.5 / ramp and weights[1][0] < 1.5 / ramp


def test_two_tiles_that_overlap_by_a_quarter_blend_linearly():
    weights = blending_weights(tile_starts(14, 8), 14, 8, 1)
    np.testing.assert_allclose(weights[0], [1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(weights[1], weights[0][::-1], atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 20), (8, 21), (33, 9)], ids=str)
def test_what_looks_at_single_places_is_equal_to_the_whole(shape):
    x = random_array(2, *shape, 3)
    enlarge = lambda x: jnp.repeat(jnp.repeat(jnp.sin(3 * x[..., :2]), 4, axis=1), 4, axis=2)  # noqa: E731
    reduce = lambda x: x.reshape(len(x), x.shape[1] // 4, 4, x.shape[2] // 4, 4, -1).max(axis=(2, 4))  # noqa: E731
    larger = apply_by_tiles(enlarge, x, 8, 1, 4)
    np.testing.assert_allclose(larger, enlarge(x), atol=1e-6)
    np.testing.assert_allclose(apply_by_tiles(reduce, larger, 8, 4, 1), reduce(larger), atol=1e-6)


def test_a_constant_stays_one():
    tiled = apply_by_tiles(lambda x: jnp.repeat(x, 2, axis=1).repeat(2, axis=2), jnp.full((1, 37, 23, 2), 0.7), 8, 1, 2)
    assert tiled.shape == (1, 74, 46, 2)
    np.testing.assert_allclose(tiled, 0.7, atol=1e-6)


def test_a_convolution_differs_only_by_the_outermost_rows_weight():
    x = random_array(1, 26, 26, 1)  # tiles of 8 from 0, 6, 12, 18: two rows overlap
    blur = lambda x: jax.lax.conv_general_dilated(  # noqa: E731
        x, jnp.full((3, 3, 1, 1), 1 / 9), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    difference = np.abs(apply_by_tiles(blur, x, 8, 1, 1) - blur(x))[0, :, :, 0]
    inside = np.ones(26, bool)
    inside[[6, 7, 12, 13, 18, 19]] = False
    assert difference[np.ix_(inside, inside)].max() < 1e-6 < difference.max()


def test_a_tile_as_large_as_the_input_is_the_whole_to_the_bit(codec):
    latents, images = random_array(2, 8, 12, 3), random_array(2, 32, 48, 3)
    for method, x in ((Codec.decode, latents), (Codec.encode, images)):
        function = jax.jit(method, static_argnames="tile")
        np.testing.assert_array_equal(function(codec, x, tile=12), function(codec, x, tile=None))


def test_tiles_of_a_large_latent_are_close_to_the_whole_and_have_no_seams(codec):
    """GroupNorm and attention see a tile where they would see the whole, so the two are close, nowhere equal."""
    latents = random_array(1, 64, 40, 3)
    decode = jax.jit(Codec.decode, static_argnames="tile")
    whole, tiled = np.asarray(decode(codec, latents)), np.asarray(decode(codec, latents, tile=24))
    difference = np.abs(tiled - whole)
    # Measured, in standard deviations: 0.04 and 0.27; unblended tiles differ by up to 1.3.
    assert difference.mean() < 0.08 * whole.std() and difference.max() < 0.5 * whole.std()
    # A seam would show as steps between neighbours that the whole has not, at the rows where tiles begin and end.
    steps = {name: np.abs(np.diff(x, axis=1)).mean(axis=(0, 2, 3)) for name, x in (("w", whole), ("t", tiled))}
    edges = [4 * at for start in tile_starts(64, 24) for at in (start, start + 24) if 0 < at < 64]
    np.testing.assert_allclose(
        steps["t"][np.array(edges) - 1], steps["w"][np.array(edges) - 1], rtol=0.1
    )  # unblended: 1.2 to 1.5 times


def test_encoding_by_tiles_is_close_to_the_whole(codec):
    images = np.tanh(random_array(1, 128, 96, 3))
    encode = jax.jit(Codec.encode, static_argnames="tile")
    whole, tiled = np.asarray(encode(codec, images)), np.asarray(encode(codec, images, tile=16))
    assert tiled.shape == whole.shape == (1, 32, 24, 3)
    assert np.abs(tiled - whole).mean() < 0.15 * whole.std()  # measured: 0.08


@pytest.mark.parametrize(("method", "shape"), [("decode", (1, 64, 64, 3)), ("encode", (1, 256, 256, 3))])
def test_tiles_take_less_memory(method, shape):
    codec = make_codec()

    def temporary_bytes(tile):
        function = jax.jit(getattr(Codec, method), static_argnames="tile")
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return function.lower(codec, x, tile=tile).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16) < temporary_bytes(None) / 4


def test_tiles_that_cannot_be_are_refused():
    codec = make_codec()
    with pytest.raises(ValueError, match="tile=4 must be 8 latents a side or more"):
        codec.decode(random_array(1, 16, 16, 3), tile=4)
    with pytest.raises(ValueError, match="70 x 64 must be divisible by 4 to go by tiles"):
        codec.encode(random_array(1, 70, 64, 3), tile=8)
