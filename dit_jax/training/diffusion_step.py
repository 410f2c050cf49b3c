"""What the diffusion stage minimises, and what it measures on held-out images."""

from collections.abc import Callable

import jax

from dit_jax.config import Config
from dit_jax.diffusion.losses import hybrid_loss
from dit_jax.diffusion.process import Process, make_process
from dit_jax.models.autoencoder import latents_of, scaled
from dit_jax.models.build import build_denoiser
from dit_jax.models.conditioners import FrozenNetworks, batch_conditions, draw_dropped, null_rows
from dit_jax.training.step import Draws, Loss, batch_size_of
from dit_jax.types import Array, Batch, Params, PRNGKey


def encoded(batch: Batch, frozen: FrozenNetworks | None) -> Array:
    """Returns the moments of a batch: the cache's, or of the images just encoded; without latents the images."""
    if frozen is not None and frozen.codec is not None:
        return frozen.codec.moments(batch["image"])
    return batch["moments"] if "moments" in batch else batch["image"]


def diffusion_input(config: Config, moments: Array, noise: Array) -> Array:
    """Returns x_0 [..., H, W, C] of what `encoded` gave: a posterior sample at unit variance, or the image.

    noise: like x_0, standard normal; not read where there are no latents.
    """
    if config.latents is None:
        return moments
    latents = config.latents
    return scaled(latents_of(moments, latents.shape[-1], noise), latents.scale, latents.shift)


def draw_noise(
    config: Config, process: Process, posterior_key: PRNGKey, t_key: PRNGKey, noise_key: PRNGKey, batch_size: int
) -> Draws:
    """Returns each image's `step` [B], uniform, its `noise` [B, H, W, C], and its latents' as `posterior` alike."""
    shape = batch_size, *config.input_shape
    return {
        "posterior": jax.random.normal(posterior_key, shape) if config.latents else None,
        "step": jax.random.randint(t_key, (batch_size,), 0, process.num_steps),
        "noise": jax.random.normal(noise_key, shape),
    }


def make_diffusion_loss(config: Config) -> Loss:
    """Returns the training loss of a batch {"moments" or "image", conditions}, at uniform t, with conditions dropped.

    Its constants are what encodes images or captions, where the config asks for that.
    """
    model, process = build_denoiser(config), make_process(config.diffusion)
    rates, num_classes = config.condition_dropout, config.data.num_classes

    def draw(batch: Batch, key: PRNGKey) -> Draws:
        *keys, drop_key = jax.random.split(key, 4)
        size = batch_size_of(batch)
        return draw_noise(config, process, *keys, size) | {"dropped": draw_dropped(drop_key, rates, size)}

    def terms(params: Params, batch: Batch, draws: Draws, frozen: FrozenNetworks | None) -> dict[str, Array]:
        x_0 = diffusion_input(config, encoded(batch, frozen), draws["posterior"])
        conditions = null_rows(batch_conditions(config, batch, frozen), draws["dropped"], num_classes)
        model_fn = lambda *inputs: model.apply({"params": params}, *inputs)  # noqa: E731
        gamma = config.diffusion.min_snr_gamma
        return hybrid_loss(process, model_fn, x_0, draws["step"], draws["noise"], conditions, gamma)

    return Loss(draw, terms)


def make_diffusion_eval(config: Config) -> Callable[[Params, Batch, FrozenNetworks | None], dict[str, Array]]:
    """Returns the held-out loss of each image, its conditions kept; t and noise are functions of the image's index.

    So two evaluations of the same weights are equal, and the curve over training moves with the weights alone.
    """
    model, process = build_denoiser(config), make_process(config.diffusion)

    def eval_fn(params: Params, batch: Batch, frozen: FrozenNetworks | None) -> dict[str, Array]:
        x_0, step, noise = held_out_noise(config, process, batch, frozen)
        conditions = batch_conditions(config, batch, frozen)
        model_fn = lambda *inputs: model.apply({"params": params}, *inputs)  # noqa: E731
        return hybrid_loss(process, model_fn, x_0, step, noise, conditions, config.diffusion.min_snr_gamma)

    return eval_fn


def held_out_noise(
    config: Config, process: Process, batch: Batch, frozen: FrozenNetworks | None
) -> tuple[Array, Array, Array]:
    """Returns x_0 [B, H, W, C], the step [B] and the noise of held-out images, functions of the images' index alone."""
    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(jax.random.key(0), index), 3))(batch["index"])
    posterior = jax.vmap(lambda key: jax.random.normal(key, config.input_shape))(keys[:, 0])
    x_0 = diffusion_input(config, encoded(batch, frozen), posterior)
    step = jax.vmap(lambda key: jax.random.randint(key, (), 0, process.num_steps))(keys[:, 1])
    noise = jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:]))(keys[:, 2])
    return x_0, step, noise
