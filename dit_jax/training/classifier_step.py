"""What the classifier stage minimises, and what it measures: the labels of images that the forward process has noised.

The classifier leads a denoiser's sampler (`diffusion.classifier_guidance`), of the same process and input.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dit_jax.config import Config
from dit_jax.diffusion.process import add_noise, make_process
from dit_jax.models.build import build_classifier
from dit_jax.models.conditioners import FrozenNetworks
from dit_jax.training.diffusion_step import diffusion_input, draw_noise, encoded, held_out_noise
from dit_jax.training.step import Draws, Loss, batch_size_of
from dit_jax.types import Array, Batch, Params, PRNGKey


def make_classifier_loss(config: Config) -> Loss:
    """Returns the cross-entropy, `loss`, and the `accuracy` of a batch {"moments" or "image", "label"}, at uniform t.

    Its constants are what encodes images, where the config asks for that.
    """
    model, process = build_classifier(config), make_process(config.diffusion)

    def draw(batch: Batch, key: PRNGKey) -> Draws:
        return draw_noise(config, process, *jax.random.split(key, 3), batch_size_of(batch))

    def terms(params: Params, batch: Batch, draws: Draws, frozen: FrozenNetworks | None) -> dict[str, Array]:
        x_0, step = diffusion_input(config, encoded(batch, frozen), draws["posterior"]), draws["step"]
        x_t = add_noise(process, x_0, step, draws["noise"])
        return classified(model.apply({"params": params}, x_t, jnp.asarray(process.timesteps)[step]), batch["label"])

    return Loss(draw, terms)


def make_classifier_eval(config: Config) -> Callable[[Params, Batch, FrozenNetworks | None], dict[str, Array]]:
    """Returns the same of each held-out image; t and noise are functions of its index."""
    model, process = build_classifier(config), make_process(config.diffusion)

    def eval_fn(params: Params, batch: Batch, frozen: FrozenNetworks | None) -> dict[str, Array]:
        x_0, step, noise = held_out_noise(config, process, batch, frozen)
        x_t = add_noise(process, x_0, step, noise)
        return classified(model.apply({"params": params}, x_t, jnp.asarray(process.timesteps)[step]), batch["label"])

    return eval_fn


def classified(logits: Array, labels: Array) -> dict[str, Array]:
    """Returns the cross-entropy and whether the right class is the likeliest, [B] float32 each."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": loss, "accuracy": (logits.argmax(axis=-1) == labels).astype(jnp.float32)}
