"""The loop that every sampler shares: one `lax.scan` from noise to x_0, with a random stream for each image."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.parameterization import Prediction
from dit_jax.diffusion.process import Process
from dit_jax.types import Array, PRNGKey

# (x_t [B, H, W, C], step [B]) -> Prediction: the network, guided, and what its output means
PredictFn = Callable[[Array, Array], Prediction]


def descending(process: Process) -> np.ndarray:
    """Returns the process's steps from the last to 0."""
    return np.arange(process.num_steps)[::-1]


def no_memory(x: Array) -> None:
    """Returns nothing: most samplers look at the present alone."""


class Sampler(NamedTuple):
    """A rule that walks a process down, one evaluation of the network at a time."""

    # (process, prediction, x [B, H, W, C], step [B], noise [B, H, W, C], memory) -> (x of the step before, memory)
    update: Callable[[Process, Prediction, Array, Array, Array, Any], tuple[Array, Any]]
    memory: Callable[[Array], Any] = no_memory  # x_T -> what `update` remembers from one evaluation to the next
    evaluations: Callable[[Process], np.ndarray] = descending  # the steps at which the network is evaluated


def image_noise(keys: PRNGKey, draw: int | Array, shape: tuple[int, ...]) -> Array:
    """Returns standard normal noise [B, *shape]; image i's depends on its own key and the number of the draw alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


def sample(
    process: Process,
    predict_fn: PredictFn,
    sampler: Sampler,
    keys: PRNGKey,
    shape: tuple[int, ...],
    x_T: Array | None = None,
    keep_x_0: bool = False,
) -> tuple[Array, Array | None]:
    """Returns x_0 [B, *shape] drawn down the process's steps, and the x_0 predicted on the way.

    Args:
      process: the (respaced) process to walk; predict_fn: what the network says of x_t at one of its steps.
      keys: [B], one key an image; shape: (H, W, C).
      x_T: [B, H, W, C] to start from; None: noise from the keys.
      keep_x_0: return the predictions too, [evaluations, B, *shape]; they stay on the device.
    """

    def body(carry: tuple[Array, Any], step: Array) -> tuple[tuple[Array, Any], Array | None]:
        x, memory = carry
        steps = jnp.full(keys.shape, step)
        prediction = predict_fn(x, steps)
        x, memory = sampler.update(process, prediction, x, steps, image_noise(keys, step, shape), memory)
        return (x, memory), prediction.x_0 if keep_x_0 else None

    x_T = image_noise(keys, process.num_steps, shape) if x_T is None else x_T
    (x_0, _), kept = jax.lax.scan(body, (x_T, sampler.memory(x_T)), jnp.asarray(sampler.evaluations(process)))
    return x_0, kept
