"""The autoencoder: LDM's sizes to the printed digit, the latent's statistics, and the codec's scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import AutoencoderConfig
from dit_jax.models.autoencoder import Autoencoder, Codec, posterior_sample, split_moments
from dit_jax.models.build import build_autoencoder
from dit_jax.models.cost import count_macs, count_params

# The KL models of LDM (arXiv:2112.10752, table 8); attention at 16 x 16 and 8 x 8 of 256 x 256 is at these levels.
PAPER = {
    "kl-f4": ((1, 2, 4), (), 3, 55.31),
    "kl-f8": ((1, 2, 4, 4), (), 4, 83.65),
    "kl-f16": ((1, 1, 2, 2, 4), (4,), 16, 69.61),
    "kl-f32": ((1, 1, 2, 2, 4, 4), (4, 5), 64, 103.88),
}


def paper_autoencoder(name):
    multipliers, levels, latent_channels, _ = PAPER[name]
    config = AutoencoderConfig(
        channel_multipliers=multipliers, attention_levels=levels, latent_channels=latent_channels
    )
    return build_autoencoder(config, image_channels=3)


def abstract_variables(model, image):
    return jax.eval_shape(model.init, jax.random.key(0), image, jax.random.key(0))


def tiny_autoencoder(**changes):
    fields = {
        "base_channels": 8,
        "channel_multipliers": (1, 2, 2),
        "num_res_blocks": 1,
        "attention_levels": (),
        "latent_channels": 3,
        "num_groups": 4,
        "image_channels": 3,
    }
    return Autoencoder(**fields | changes)


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def tiny():
    """A tiny autoencoder of two levels, and random parameters."""
    model = tiny_autoencoder(channel_multipliers=(1, 2))
    shapes = abstract_variables(model, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("name", PAPER)
def test_model_has_the_papers_parameters(name):
    variables = abstract_variables(paper_autoencoder(name), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    assert round(count_params(variables) / 1e6, 2) == PAPER[name][-1]


def test_f8_at_256_px_costs_136_gmac_to_encode_and_311_to_decode():
    model, image = paper_autoencoder("kl-f8"), jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    variables = abstract_variables(model, image)
    encode = count_macs(lambda v, x: model.apply(v, x, method="encode"), variables, image)
    latent = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
    decode = count_macs(lambda v, z: model.apply(v, z, method="decode"), variables, latent)
    assert (round(encode / 1e9), round(decode / 1e9)) == (136, 311)


@pytest.mark.parametrize(("multipliers", "factor"), [((1,), 1), ((1, 2), 2), ((1, 2, 2), 4), ((1, 1, 2, 2), 8)])
def test_each_further_level_halves_the_resolution(multipliers, factor):
    model = tiny_autoencoder(channel_multipliers=multipliers, latent_channels=5, image_channels=1)
    image = jax.ShapeDtypeStruct((2, 16, 24, 1), jnp.float32)
    variables = abstract_variables(model, image)
    reconstruction, _, moments, *_ = jax.eval_shape(model.apply, variables, image, jax.random.key(0))
    assert moments.shape == (2, 16 // factor, 24 // factor, 2 * 5)
    assert reconstruction.shape == image.shape and reconstruction.dtype == jnp.float32


@pytest.mark.parametrize("levels", [(), (0,), (2,), (0, 1, 2)])
def test_attention_is_at_the_levels_asked_for_and_in_the_middle(levels):
    model = tiny_autoencoder(attention_levels=levels)
    params = abstract_variables(model, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))["params"]
    for part, direction, blocks in (("encoder", "down", 1), ("decoder", "up", 2)):
        names = {name for name in params[part] if "attn" in name}
        assert names == {f"{direction}_{level}_attn_{i}" for level in levels for i in range(blocks)}
        assert "attn_1" in params[part]["mid"]


def test_log_variance_is_clamped_and_the_mean_is_not():
    moments = jnp.array([[-100.0, 100.0, -100.0, 100.0], [3.0, -3.0, -29.0, 19.0]])
    mean, log_variance = split_moments(moments)
    np.testing.assert_array_equal(mean, [[-100, 100], [3, -3]])
    np.testing.assert_array_equal(log_variance, [[-30, 20], [-29, 19]])


def sample(moments, key):
    """A draw of the posterior, as the program makes it of its noise."""
    return posterior_sample(moments, jax.random.normal(key, (*moments.shape[:-1], moments.shape[-1] // 2)))


def test_posterior_samples_have_the_moments():
    mean, std, count = np.array([-1.0, 0.5, 2.0]), np.array([0.1, 1.0, 3.0]), 40_000
    moments = jnp.broadcast_to(jnp.concatenate([mean, 2 * np.log(std)]), (count, 6))
    z = np.asarray(sample(moments, jax.random.key(0)), np.float64)
    assert z.shape == (count, 3)
    tolerance = 5 / np.sqrt(count)  # five standard errors of a mean; a standard deviation's are smaller
    np.testing.assert_allclose((z.mean(axis=0) - mean) / std, 0, atol=tolerance)
    np.testing.assert_allclose(z.std(axis=0) / std, 1, atol=tolerance)
    np.testing.assert_allclose(np.corrcoef(z.T), np.eye(3), atol=tolerance)


def test_posterior_without_variance_is_its_mean():
    mean = random_images(4, 2)
    moments = np.concatenate([mean, np.full_like(mean, -1e4)], axis=-1)
    np.testing.assert_allclose(sample(moments, jax.random.key(0)), mean, atol=1e-5)  # std e^-15 by the clamp


def test_call_decodes_a_sample_of_what_it_encodes(tiny):
    model, params = tiny
    images, key = random_images(2, 8, 8, 3), jax.random.key(3)

    @jax.jit
    def compare(params):
        reconstructions, _, moments, *_ = model.apply({"params": params}, images, key)
        encoded = model.apply({"params": params}, images, method="encode")
        return (
            reconstructions,
            moments,
            encoded,
            model.apply({"params": params}, sample(encoded, key), method="decode"),
        )

    reconstructions, moments, encoded, decoded = compare(params)
    np.testing.assert_allclose(moments, encoded, atol=1e-5)
    np.testing.assert_allclose(reconstructions, decoded, atol=1e-5)


def test_codec_scales_latents_and_takes_the_scale_back(tiny):
    model, params = tiny
    images = random_images(2, 8, 8, 3)
    quant_conv = {**params["quant_conv"], "bias": np.repeat([0.0, 1e4], 3).astype(np.float32)}  # huge log-variances
    codecs = [Codec(params=params | {"quant_conv": quant_conv}, module=model, scale=scale) for scale in (1.0, 0.18215)]

    @jax.jit
    def run(codec):
        latents = codec.encode(images)
        return codec.moments(images), latents, codec.decode(latents)

    (moments, latents, decoded), (scaled_moments, scaled_latents, scaled_decoded) = map(run, codecs)
    np.testing.assert_array_equal(moments[..., 3:], 20)  # clamped
    np.testing.assert_allclose(latents, moments[..., :3], atol=1e-6)  # the posterior's mean
    np.testing.assert_allclose(scaled_moments, moments, atol=1e-5)  # what a cache holds is not scaled
    np.testing.assert_allclose(scaled_latents, 0.18215 * latents, atol=1e-6)
    np.testing.assert_allclose(scaled_decoded, decoded, atol=1e-5)
    assert decoded.shape == images.shape and abs(latents).max() > 0.01 and abs(decoded).max() > 0.01


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_neither_output_nor_gradients(remat, tiny):
    model, params = tiny
    images, results = random_images(2, 8, 8, 3), []
    for each in (model, tiny_autoencoder(channel_multipliers=(1, 2), remat=remat)):
        loss = lambda p, each=each: (each.apply({"params": p}, images, jax.random.key(1)).images ** 2).sum()  # noqa: E731
        results.append(jax.jit(jax.value_and_grad(loss))(params))
        assert ("remat" in str(jax.make_jaxpr(loss)(params))) == (each is not model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * abs(b).max()), *results)
