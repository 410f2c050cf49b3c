"""The loop that every sampler shares: one `lax.scan` from noise to x_0, with a random stream for each image."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.parameterization import Prediction
from dit_jax.diffusion.process import Process, add_noise
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


class Known(NamedTuple):
    """What is known of the x_0 to draw, [B, H, W, C], and where it is not: hole [B, H, W, 1], 1 there, 0 elsewhere."""

    x_0: Array
    hole: Array


def slerp(noise: Array, other: Array, weight: Array) -> Array:
    """Returns the noise on the great circle between two, [B, ...], by weight [B]: as long as noise is (Shoemake, 1985).

    A straight line between them would pass through noise that is too short by up to sqrt(2).
    """
    weight = weight.reshape(-1, *[1] * (noise.ndim - 1))
    axes = tuple(range(1, noise.ndim))
    lengths = jnp.sqrt((noise**2).sum(axes, keepdims=True) * (other**2).sum(axes, keepdims=True))
    angle = jnp.arccos(((noise * other).sum(axes, keepdims=True) / lengths).clip(-1.0, 1.0))
    straight = jnp.sin(angle) < 1e-6  # the same noise, or opposite
    safe = jnp.where(straight, 1.0, angle)
    arc = (jnp.sin((1.0 - weight) * safe) * noise + jnp.sin(weight * safe) * other) / jnp.sin(safe)
    return jnp.where(straight, (1.0 - weight) * noise + weight * other, arc)


def sample(
    process: Process,
    predict_fn: PredictFn,
    sampler: Sampler,
    keys: PRNGKey,
    shape: tuple[int, ...],
    x_T: Array | None = None,
    keep_x_0: bool = False,
    known: Known | None = None,
    num_resamplings: int = 1,
    jump_length: int = 10,
) -> tuple[Array, Array | None]:
    """Returns x_0 [B, *shape] drawn down the process's steps, and the x_0 predicted on the way.

    Args:
      process: the (respaced) process to walk; predict_fn: what the network says of x_t at one of its steps.
      keys: [B], one key an image; shape: (H, W, C).
      x_T: [B, H, W, C] to start from; None: noise from the keys.
      keep_x_0: return the predictions too, [evaluations, B, *shape]; they stay on the device.
      known: at each step x_t is what is known, noised, around the hole (RePaint, arXiv:2201.09865, eq. 8).
      num_resamplings, jump_length: walk each so many steps so many times (`resampled`).
    """
    evaluations, visits = resampled(sampler.evaluations(process), num_resamplings, jump_length)
    num_draws = process.num_steps + 1  # of noise, in a walk: one a step, and x_T

    def body(carry: tuple[Array, Any], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], Array | None]:
        x, memory = carry
        step, visit, kept_share = now
        steps, draw = jnp.full(keys.shape, step), step + 3 * num_draws * visit
        if known is not None:
            noise = image_noise(keys, draw + num_draws, shape)
            x = jnp.where(known.hole > 0, x, add_noise(process, known.x_0, steps, noise))
        prediction = predict_fn(x, steps)
        x, memory = sampler.update(process, prediction, x, steps, image_noise(keys, draw, shape), memory)
        if num_resamplings > 1:
            x = jnp.sqrt(kept_share) * x + jnp.sqrt(1.0 - kept_share) * image_noise(keys, draw + 2 * num_draws, shape)
        return (x, memory), prediction.x_0 if keep_x_0 else None

    x_T = image_noise(keys, process.num_steps, shape) if x_T is None else x_T
    walk = tuple(map(jnp.asarray, (evaluations, visits, kept_shares(process, evaluations))))
    (x_0, _), kept = jax.lax.scan(body, (x_T, sampler.memory(x_T)), walk)
    return x_0 if known is None else jnp.where(known.hole > 0, x_0, known.x_0), kept


def resampled(steps: np.ndarray, num_resamplings: int, jump_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps of a walk each `jump_length` of which are walked `num_resamplings` times, and which time it is.

    5, 4, 3, 2, 1, 0 becomes 5, 4, 5, 4, 3, 2, 3, 2, 1, 0, 1, 0 for 2 times 2 steps.
    """
    blocks = [steps[start : start + jump_length] for start in range(0, len(steps), jump_length)]
    visits = [np.repeat(np.arange(num_resamplings), len(block)) for block in blocks]
    return np.concatenate([np.tile(block, num_resamplings) for block in blocks]), np.concatenate(visits)


def kept_shares(process: Process, evaluations: np.ndarray) -> np.ndarray:
    """Returns what is kept of the variance [evaluations] where a step's result is noised for the next evaluation.

    After step t that is alpha_bar_s / alpha_bar_{t-1} if s is next: 1 for s = t - 1 and at the end, less for a jump.
    """
    level, following = process.alphas_cumprod_prev[evaluations], process.alphas_cumprod[evaluations[1:]]
    return np.minimum(np.append(following / level[:-1], 1.0), 1.0).astype(np.float32)
