"""What the autoencoder stage minimises, and what it measures on held-out images."""

from collections.abc import Callable

import jax.numpy as jnp

from dit_jax.config import Config
from dit_jax.metrics.reconstruction import psnr
from dit_jax.models.autoencoder import split_moments
from dit_jax.models.build import build_model
from dit_jax.perceptual.autoencoder_losses import autoencoder_loss
from dit_jax.training.step import LossFn
from dit_jax.types import Array, Batch, Params, PRNGKey


def make_autoencoder_loss(config: Config) -> LossFn:
    """Returns the training loss of a batch {"image"}: one posterior sample decoded."""
    model = build_model(config)

    def loss_fn(params: Params, batch: Batch, key: PRNGKey) -> dict[str, Array]:
        images = batch["image"]
        reconstructions, moments = model.apply({"params": params}, images, key)
        return autoencoder_loss(config.autoencoder, images, reconstructions, *split_moments(moments))

    return loss_fn


def make_autoencoder_eval(config: Config) -> Callable[[Params, Batch], dict[str, Array]]:
    """Returns PSNR and the loss' terms of each held-out image, decoded from the posterior's mean."""
    model = build_model(config)

    def eval_fn(params: Params, batch: Batch) -> dict[str, Array]:
        images = batch["image"]
        moments = model.apply({"params": params}, images, method="encode")
        mean, log_variance = split_moments(moments)
        reconstructions = model.apply({"params": params}, mean, method="decode")
        terms = autoencoder_loss(config.autoencoder, images, reconstructions, mean, log_variance)
        std = jnp.exp(0.5 * log_variance).mean(axis=(1, 2, 3))
        return terms | {"psnr": psnr(images, reconstructions), "posterior_std": std}

    return eval_fn
