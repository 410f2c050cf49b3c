"""Vector quantization against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import CodebookConfig
from dit_jax.metrics.codebook import code_use
from dit_jax.models.quantizer import (
    Codebook,
    code_counts,
    init_code_statistics,
    nearest_codes,
    observe_codes,
    straight_through,
)

RNG = np.random.default_rng(0)
CODES = RNG.normal(size=(7, 3)).astype(np.float32)
LATENTS = RNG.normal(size=(2, 4, 5, 3)).astype(np.float32)
NEAREST = ((LATENTS.astype(np.float64)[..., None, :] - CODES) ** 2).sum(axis=-1).argmin(axis=-1)


def test_a_latent_becomes_its_nearest_code():
    codes, indices = Codebook(7, 3).apply({"params": {"embedding": CODES}}, LATENTS)
    np.testing.assert_array_equal(indices, NEAREST)
    np.testing.assert_array_equal(codes, CODES[NEAREST])
    np.testing.assert_array_equal(nearest_codes(CODES, CODES), np.arange(7))


def test_codes_start_uniform_within_one_over_their_number():
    embedding = Codebook(64, 3).init(jax.random.key(0), jnp.zeros((1, 3)))["params"]["embedding"]
    assert 0.9 / 64 < np.abs(embedding).max() <= 1 / 64


def test_the_gradient_passes_straight_through_to_the_latents():
    value, gradient = jax.value_and_grad(lambda z: (straight_through(z, CODES[NEAREST]) ** 2).sum())(LATENTS)
    np.testing.assert_allclose(value, (CODES[NEAREST] ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * CODES[NEAREST], rtol=1e-4, atol=1e-5)


def test_perplexity_is_the_number_of_codes_in_equal_use():
    counts = code_counts(jnp.array([[0, 3], [3, 0]]), 8)
    np.testing.assert_array_equal(counts, [2, 0, 0, 2, 0, 0, 0, 0])
    assert {name: float(x) for name, x in code_use(counts).items()} == pytest.approx(
        {"codes_used": 0.25, "perplexity": 2}
    )
    assert float(code_use(jnp.ones(8))["perplexity"]) == pytest.approx(8.0)


def test_moving_means_tend_to_the_means_of_what_the_codes_stand_for():
    config = CodebookConfig(num_codes=7, update="ema", decay=0.5)
    embedding, statistics = jnp.array(CODES), init_code_statistics(config, jnp.array(CODES))
    counts, sums = np.ones(7), CODES.astype(np.float64)
    flat, indices = LATENTS.reshape(-1, 3), NEAREST.reshape(-1)
    for _ in range(3):  # the formula of appendix A.1, in units of the mean count
        batch_counts = np.bincount(indices, minlength=7)
        batch_sums = np.stack([flat[indices == i].sum(axis=0) for i in range(7)])
        counts = 0.5 * counts + 0.5 * batch_counts / (len(flat) / 7)
        sums = 0.5 * sums + 0.5 * batch_sums / (len(flat) / 7)
        embedding, statistics = observe_codes(config, embedding, statistics, LATENTS, NEAREST, jax.random.key(0))
    np.testing.assert_allclose(statistics["usage"], counts, rtol=1e-5)
    np.testing.assert_allclose(embedding, sums / counts[:, None], rtol=1e-3, atol=1e-5)  # smoothed by 1e-5


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_dead_code_becomes_a_latent_of_the_batch_and_the_others_stay(update):
    config = CodebookConfig(num_codes=7, update=update, decay=0.5, restart_usage=0.3)
    dead, indices = [2, 5], np.where(np.isin(NEAREST, [2, 5]), 0, NEAREST)
    statistics = {"usage": jnp.ones(7)} | ({"sums": jnp.array(CODES)} if update == "ema" else {})
    embedding = jnp.array(CODES)
    for step in range(2):  # usage 1 -> 0.5 -> 0.25
        before = embedding
        embedding, statistics = observe_codes(config, embedding, statistics, LATENTS, indices, jax.random.key(step))
        if step == 0 and update == "gradient":
            np.testing.assert_array_equal(embedding, CODES)
    pool = {tuple(z) for z in LATENTS.reshape(-1, 3).tolist()}
    assert all(tuple(z) in pool for z in np.asarray(embedding)[dead].tolist())
    np.testing.assert_array_equal(np.asarray(statistics["usage"])[dead], 1.0)
    if update == "gradient":
        others = [i for i in range(7) if i not in dead and statistics["usage"][i] != 1.0]
        np.testing.assert_array_equal(np.asarray(embedding)[others], np.asarray(before)[others])
    else:
        np.testing.assert_array_equal(np.asarray(statistics["sums"])[dead], np.asarray(embedding)[dead])


def test_with_restarts_the_codes_start_where_the_first_batch_is():
    config = CodebookConfig(num_codes=64, restart_usage=0.03)
    embedding = Codebook(64, 3).init(jax.random.key(0), jnp.zeros((1, 3)))["params"]["embedding"]
    latents = 5 + LATENTS
    indices = nearest_codes(embedding, latents)
    statistics = init_code_statistics(config, embedding)
    embedding, statistics = observe_codes(config, embedding, statistics, latents, indices, jax.random.key(0))
    unused = np.setdiff1d(np.arange(64), indices)
    assert len(unused) > 50 and np.all(np.asarray(embedding)[unused] > 1.0)
    assert len(np.unique(nearest_codes(embedding, latents))) > 16 > len(np.unique(indices))
