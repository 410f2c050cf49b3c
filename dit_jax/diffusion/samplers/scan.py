"""The loop that every sampler shares: one `lax.scan` from noise to x_0, with a random stream for each image."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dit_jax.diffusion.process import Process
from dit_jax.types import Array, ModelFn, PRNGKey

# (process, output [B, H, W, 2C], x [B, H, W, C], step [B], noise [B, H, W, C]) -> x of the step before
StepFn = Callable[[Process, Array, Array, Array, Array], Array]


def image_noise(keys: PRNGKey, draw: int | Array, shape: tuple[int, ...]) -> Array:
    """Returns standard normal noise [B, *shape]; image i's depends on its own key and the number of the draw alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


def sample(
    process: Process, model_fn: ModelFn, step_fn: StepFn, keys: PRNGKey, labels: Array, shape: tuple[int, ...]
) -> Array:
    """Returns x_0 [B, *shape] drawn by `step_fn` down the process's steps.

    Args:
      process: the (respaced) process to walk; model_fn: (x_t, timestep, labels) -> [B, H, W, 2C].
      keys: [B], one key an image; labels: [B] int32; shape: (H, W, C).
    """

    def body(x: Array, step: Array) -> tuple[Array, None]:
        steps = jnp.full(labels.shape, step)
        output = model_fn(x, jnp.asarray(process.timesteps)[steps], labels)
        return step_fn(process, output, x, steps, image_noise(keys, step, shape)), None

    x_T = image_noise(keys, process.num_steps, shape)
    x_0, _ = jax.lax.scan(body, x_T, jnp.arange(process.num_steps)[::-1])
    return x_0
