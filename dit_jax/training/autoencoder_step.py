"""What the autoencoder stage minimises, and what it measures on held-out images (LDM, appendix G; VQGAN, section 3).

Generator and discriminator are updated in one step, from one pass through the autoencoder: its backward pass takes the
sum of what the likelihood and the discriminator ask of the reconstructions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.config import AutoencoderConfig, Config
from dit_jax.metrics.codebook import code_use
from dit_jax.metrics.reconstruction import psnr
from dit_jax.models.autoencoder import Reconstruction, split_moments
from dit_jax.models.build import build_autoencoder
from dit_jax.models.quantizer import code_counts, observe_codes
from dit_jax.nn.resnet import conv
from dit_jax.perceptual.autoencoder_losses import codebook_loss, kl_to_standard_normal, likelihood_terms
from dit_jax.perceptual.lpips import lpips
from dit_jax.perceptual.patchgan import adaptive_weight, build_discriminator, generator_loss, hinge_loss
from dit_jax.training.state import LossState, TrainState
from dit_jax.training.step import Draws, Gradients, ObserveFn, accumulated
from dit_jax.types import Array, Batch, Params, PRNGKey

Constants = Params | None  # the weights of LPIPS; None where the config has no perceptual term


def latent_terms(config: AutoencoderConfig, output: Reconstruction) -> dict[str, Array]:
    """Returns the `regularizer` of each image's latent, [B], and the term that it is the weighted value of."""
    if config.codebook:
        loss = codebook_loss(config.codebook, output.moments, output.codes)
        return {"codebook": loss, "regularizer": config.codebook.loss_weight * loss}
    kl = kl_to_standard_normal(*split_moments(output.moments))
    return {"kl": kl, "regularizer": config.kl_weight * kl}


def perceptual_distance(
    config: AutoencoderConfig, constants: Constants, images: Array, reconstructions: Array
) -> Array | None:
    """Returns LPIPS of each image, [B]; None where the config has no such term."""
    return lpips(constants, images, reconstructions) if config.perceptual_weight else None


def make_autoencoder_gradients(config: Config) -> Callable[[TrainState, Batch, PRNGKey, Constants], Gradients]:
    """Returns the gradients of a batch {"image"}: of the autoencoder, of its discriminator, of the log-variance."""
    settings = config.autoencoder
    model = build_autoencoder(settings, config.data.channels, config.compute.remat)

    def draw(batch: Batch, key: PRNGKey) -> Draws:
        latent_key, restart_key = jax.random.split(key)
        if settings.codebook:
            return {"restart_key": restart_key}  # of one part: see `config._check_autoencoder_loss`
        size, *sides, _ = batch["image"].shape
        grid = (side // 2**config.num_downsamplings for side in sides)
        return {"noise": jax.random.normal(latent_key, (size, *grid, settings.latent_channels))}

    def gradient_fn(state: TrainState, batch: Batch, draws: Draws, constants: Constants) -> Gradients:
        images, loss_state = batch["image"], state.loss_state

        def forward(params: Params):
            output = model.apply({"params": params}, images, None, draws.get("noise"))
            terms = _means(latent_terms(settings, output))
            return (output.images, terms.pop("regularizer")), (output, terms)

        (reconstructions, regularizer), pull_back, (output, metrics) = jax.vjp(forward, state.params, has_aux=True)

        def likelihood(reconstructions: Array, log_variance: Array):
            perceptual = perceptual_distance(settings, constants, images, reconstructions)
            terms = _means(likelihood_terms(settings, images, reconstructions, perceptual, log_variance))
            return terms["nll"], terms

        log_variance = loss_state.params["log_variance"] if settings.learn_log_variance else jnp.zeros(())
        value_and_gradient = jax.value_and_grad(likelihood, argnums=(0, 1), has_aux=True)
        (nll, terms), (cotangent, log_variance_gradient) = value_and_gradient(reconstructions, log_variance)
        metrics |= terms | {"loss": nll + regularizer}
        loss_gradients, observed = {}, {}
        if settings.learn_log_variance:
            metrics["log_variance"], loss_gradients["log_variance"] = log_variance, log_variance_gradient
        if settings.discriminator:
            last_kernel = state.params["decoder"]["conv_out"]["kernel"]
            judgement = judge(settings, state.step, images, output, last_kernel, cotangent, loss_state)
            asked, loss_gradients["discriminator"], observed["discriminator"], judged_metrics = judgement
            cotangent = cotangent + asked
            metrics |= judged_metrics | {"loss": metrics["loss"] + judged_metrics["generator"]}
        if settings.codebook:
            observed["codebook"] = (output.moments, output.indices, draws["restart_key"])
            metrics |= code_use(code_counts(output.indices, settings.codebook.num_codes))
        (gradients,) = pull_back((cotangent, jnp.ones(())))
        return Gradients(gradients, metrics, loss_gradients if loss_state else None, observed or None)

    return accumulated(gradient_fn, draw, config.training.accumulation_steps)


def judge(
    settings: AutoencoderConfig,
    step: Array,
    images: Array,
    output: Reconstruction,
    last_kernel: Array,
    likelihood_cotangent: Array,
    loss_state: LossState,
) -> tuple[Array, Params, Params, dict[str, Array]]:
    """Returns what the discriminator asks of the reconstructions, its own gradients, its statistics, and metrics.

    Before the config's `start_step` nothing of it is computed: zeros, and the statistics as they were.

    Args:
      step: int32 scalar, the updates made so far; images: [B, H, W, C].
      output: of the autoencoder; last_kernel: of its decoder's last layer.
      likelihood_cotangent: [B, H, W, C], the likelihood's gradient with respect to the reconstructions.
    """
    discriminator = build_discriminator(settings.discriminator)
    params, statistics = loss_state.params["discriminator"], loss_state.statistics["discriminator"]

    def logits(params: Params, statistics: Params, x: Array) -> tuple[Array, Params]:
        variables = {"params": params, "batch_stats": statistics}
        result, updates = discriminator.apply(variables, x, train=True, mutable="batch_stats")
        return result, updates["batch_stats"]

    def last_layer(kernel: Array) -> Array:
        bias = jnp.zeros(kernel.shape[-1])  # a gradient with respect to the kernel does not depend on it
        return conv(kernel.shape[-1]).apply({"params": {"kernel": kernel, "bias": bias}}, output.features)

    def now() -> tuple[Array, Params, Params, dict[str, Array]]:
        fake, pull_fake, seen = jax.vjp(lambda p, x: logits(p, statistics, x), params, output.images, has_aux=True)
        real, pull_real, seen = jax.vjp(lambda p: logits(p, seen, images), params, has_aux=True)
        loss, (real_cotangent, fake_cotangent) = jax.value_and_grad(hinge_loss, argnums=(0, 1))(real, fake)
        gradients = jax.tree.map(jnp.add, *pull_real(real_cotangent), pull_fake(fake_cotangent)[0])
        _, asked = pull_fake(jax.grad(generator_loss)(fake))
        _, pull_kernel = jax.vjp(last_layer, last_kernel)
        weight = settings.discriminator.weight * adaptive_weight(
            *pull_kernel(likelihood_cotangent), *pull_kernel(asked)
        )
        metrics = {
            "generator": weight * generator_loss(fake),
            "generator_weight": weight,
            "discriminator": loss,
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
        }
        return weight * asked, gradients, seen, metrics

    def not_yet() -> tuple[Array, Params, Params, dict[str, Array]]:
        asked, gradients, _, metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(now))
        return asked, gradients, statistics, metrics

    return jax.lax.cond(step >= settings.discriminator.start_step, now, not_yet)


def make_observe(config: Config) -> ObserveFn | None:
    """Returns what keeps the discriminator's statistics and the codebook; None where there is nothing to keep."""
    codebook = config.autoencoder.codebook
    if codebook is None and config.autoencoder.discriminator is None:
        return None

    def observe(params: Params, loss_state: LossState, observed: dict[str, Any]) -> tuple[Params, LossState]:
        statistics = {name: value for name, value in observed.items() if name != "codebook"}
        if codebook is not None:
            before, embedding = loss_state.statistics["codebook"], params["quantize"]["embedding"]
            embedding, statistics["codebook"] = observe_codes(codebook, embedding, before, *observed["codebook"])
            if not config.autoencoder.frozen_encoder:
                params = params | {"quantize": {"embedding": embedding}}
        return params, loss_state.replace(statistics=statistics)

    return observe


def make_autoencoder_eval(config: Config) -> Callable[[Params, Batch, Constants], dict[str, Array]]:
    """Returns the measures and the loss' terms of each held-out image, decoded from the posterior's mean or the codes.

    `codes` is [B, n]: how often each code occurs in an image.
    """
    settings = config.autoencoder
    model = build_autoencoder(settings, config.data.channels)

    def eval_fn(params: Params, batch: Batch, constants: Constants) -> dict[str, Array]:
        images = batch["image"]
        output = model.apply({"params": params}, images, None)
        perceptual = perceptual_distance(settings, constants, images, output.images)
        terms = latent_terms(settings, output) | likelihood_terms(settings, images, output.images, perceptual)
        terms |= {"loss": terms["nll"] + terms.pop("regularizer"), "psnr": psnr(images, output.images)}
        if settings.codebook:
            counts = jax.vmap(lambda indices: code_counts(indices, settings.codebook.num_codes))
            return terms | {"codes": counts(output.indices)}
        std = jnp.exp(0.5 * split_moments(output.moments)[1]).mean(axis=(1, 2, 3))
        return terms | {"posterior_std": std}

    return eval_fn


def _means(terms: dict[str, Array]) -> dict[str, Array]:
    return {name: term.mean() for name, term in terms.items()}
