"""The autoencoder's update with a discriminator: its gradients, its statistics, what is trained and what is frozen."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dit_jax.config import config_from_dict, config_to_dict
from dit_jax.models.autoencoder import FROZEN_WITH_ENCODER
from dit_jax.models.build import build_autoencoder
from dit_jax.parallel.mesh import make_mesh, put_batch
from dit_jax.perceptual.autoencoder_losses import likelihood_terms
from dit_jax.perceptual.lpips import lpips
from dit_jax.perceptual.patchgan import build_discriminator
from dit_jax.training.autoencoder_step import latent_terms, make_autoencoder_gradients, make_observe
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.state import create_state
from dit_jax.training.step import jit_train_step, make_train_step
from tests.random_lpips import random_lpips
from tests.tiny import adversarial_config

CODEBOOKS = {"kl": None, "vq": {"num_codes": 16}, "vq ema": {"num_codes": 16, "update": "ema", "restart_usage": 0.5}}
IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 1)).astype(np.float32)
ONE_DEVICE = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


def make_config(folder, codebook="vq", **fields):
    values = config_to_dict(adversarial_config(folder, CODEBOOKS[codebook], start_step=0))
    values["data"]["image_size"] = 16
    values["autoencoder"] |= fields
    return config_from_dict(values)


def make_state(config, mesh=ONE_DEVICE):
    frozen = FROZEN_WITH_ENCODER if config.autoencoder.frozen_encoder else ()
    optimizer = make_optimizer(config.optimizer, 10, frozen)
    return create_state(config, optimizer, mesh), optimizer


def run(config, num_steps, mesh=ONE_DEVICE, images=IMAGES):
    state, optimizer = make_state(config, mesh)
    gradient_fn, observe = make_autoencoder_gradients(config), make_observe(config)
    step_fn = jit_train_step(make_train_step(gradient_fn, optimizer, 0.5, 0, observe=observe), state)
    metrics = []
    for _ in range(num_steps):
        state, step_metrics = step_fn(state, put_batch({"image": images}, mesh, len(images)), None)
        metrics.append(jax.device_get(step_metrics))
    assert step_fn._cache_size() == 1
    return state, metrics


@pytest.mark.parametrize("codebook", ["kl", "vq"])
def test_gradients_are_those_of_the_whole_loss_written_in_one(codebook, tmp_path):
    config = make_config(tmp_path, codebook, perceptual_weight=1.0)
    settings, (state, _) = config.autoencoder, make_state(config)
    state = state.replace(loss_state=state.loss_state.replace(params=state.loss_state.params | {"log_variance": 0.3}))
    constants, key = random_lpips(), jax.random.key(3)
    found = jax.jit(make_autoencoder_gradients(config))(state, {"image": IMAGES}, key, constants)

    model, discriminator = build_autoencoder(settings, 1), build_discriminator(settings.discriminator)
    statistics = state.loss_state.statistics["discriminator"]

    def logits(params, x):
        return discriminator.apply({"params": params, "batch_stats": statistics}, x, train=True, mutable="batch_stats")[
            0
        ]

    def terms(params, loss_params):
        output = model.apply({"params": params}, IMAGES, jax.random.split(key)[0])
        perceptual = lpips(constants, IMAGES, output.images)
        nll = likelihood_terms(settings, IMAGES, output.images, perceptual, loss_params["log_variance"])["nll"].mean()
        fooled = -logits(loss_params["discriminator"], output.images).mean()
        return nll, fooled, latent_terms(settings, output)["regularizer"].mean(), output.images

    both = jax.jit(jax.jacrev(lambda params: jnp.stack(terms(params, state.loss_state.params)[:2])))(state.params)
    norms = [float(jnp.linalg.norm(both["decoder"]["conv_out"]["kernel"][i])) for i in (0, 1)]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    assert 0 < weight < 1e4
    np.testing.assert_allclose(found.metrics["generator_weight"], weight, rtol=1e-3)

    def whole(params, log_variance):
        loss_params = state.loss_state.params | {"log_variance": log_variance}
        nll, fooled, regularizer, _ = terms(params, loss_params)
        return nll + weight * fooled + regularizer

    @jax.jit
    @jax.grad
    def hinge_gradient(params):
        real, fake = logits(params, IMAGES), logits(params, terms(state.params, state.loss_state.params)[3])
        return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())

    expected, of_variance = jax.jit(jax.grad(whole, argnums=(0, 1)))(state.params, 0.3)
    wanted = (expected, of_variance, hinge_gradient(state.loss_state.params["discriminator"]))
    given = (found.params, found.loss_params["log_variance"], found.loss_params["discriminator"])
    for ours, theirs in zip(given, wanted, strict=True):
        largest = max(float(np.abs(y).max()) for y in jax.tree.leaves(theirs))
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5 * largest)  # float32 sums in other orders


def test_the_autoencoder_is_passed_forward_once(tmp_path):
    config = make_config(tmp_path)
    state, _ = make_state(config)
    jaxpr = jax.make_jaxpr(make_autoencoder_gradients(config))(state, {"image": IMAGES}, jax.random.key(0), None).jaxpr
    names = collections.Counter(
        name
        for equation in jaxpr.eqns
        if equation.primitive.name == "conv_general_dilated"
        and "transpose" not in (name := str(equation.source_info.name_stack))
    )
    for part in ("encoder", "decoder"):
        assert sum(bool(re.search(rf"\b{part}/conv_in", name)) for name in names.elements()) == 1, names
    assert max(names.values()) == 1


def test_before_its_start_the_discriminator_neither_judges_nor_learns(tmp_path):
    config = make_config(tmp_path, discriminator={"num_layers": 1, "base_channels": 8, "start_step": 2})
    start, _ = make_state(config)
    states = {n: run(config, n) for n in (2, 3)}
    same = lambda n: jax.tree.map(np.array_equal, start.loss_state.params, states[n][0].loss_state.params)  # noqa: E731
    assert all(jax.tree.leaves(same(2)["discriminator"])) and not all(jax.tree.leaves(same(3)["discriminator"]))
    assert [m["generator_weight"] > 0 for m in states[3][1]] == [False, False, True]
    before, after = (states[n][0].loss_state.statistics["discriminator"]["norm_1"]["mean"] for n in (2, 3))
    assert not np.any(before) and np.any(after)


def test_the_log_variance_learns_the_size_of_the_error(tmp_path):
    config = make_config(tmp_path, "kl", discriminator=None, reconstruction_loss="l2")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.05))
    # Later, with ever smaller errors, such a learning rate is too high for the autoencoder.
    _, metrics = run(config, 100)
    error = metrics[-1]["reconstruction"] / IMAGES[0].size
    # Where d nll / d log_variance = 0: exp(log_variance) is the mean error.
    assert metrics[-1]["log_variance"] == pytest.approx(np.log(error), abs=0.2) and metrics[-1]["log_variance"] < -0.5


def test_a_frozen_encoder_keeps_its_bits_and_has_no_moments(tmp_path):
    config = make_config(tmp_path, "vq ema", frozen_encoder=True)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.1))
    start, _ = make_state(config)
    state, _ = run(config, 3)
    for name in start.params:
        equal = jax.tree.leaves(jax.tree.map(np.array_equal, start.params[name], state.params[name]))
        assert all(equal) if name in FROZEN_WITH_ENCODER else not any(equal)
    moments = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert not any("encoder" in jax.tree_util.keystr(path) for path in moments)


def test_statistics_are_of_the_global_batch_on_any_mesh(tmp_path):
    config = make_config(tmp_path, "vq ema")
    (alone, metrics), (sharded, sharded_metrics) = (
        run(config, 2, mesh) for mesh in (ONE_DEVICE, make_mesh(dataclasses.replace(config.mesh, data=2, fsdp=4)))
    )
    for one, other in zip(metrics, sharded_metrics, strict=True):
        for name in one:
            np.testing.assert_allclose(other[name], one[name], rtol=2e-3, atol=1e-5, err_msg=name)
    ours, theirs = alone.loss_state.statistics, sharded.loss_state.statistics
    np.testing.assert_allclose(theirs["codebook"]["usage"], ours["codebook"]["usage"], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-6)
    # The statistics of one device's part of the batch are not those: such a difference would be seen above.
    part, _ = run(config, 2, images=IMAGES[:1])
    means = [s.loss_state.statistics["discriminator"]["norm_1"]["mean"] for s in (alone, part)]
    assert np.abs(means[0] - means[1]).max() > 0.1 * np.abs(means[0]).max()
