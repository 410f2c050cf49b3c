"""The jitted update that both stages share; what differs between them is a loss function of `stages`.

Randomness is a function of (seed, step): every step folds its number into the run's key, and the draws are made for
the global batch, so that they are the same on any mesh (JAX's threefry is partitionable).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from dit_jax.models.averages import DecayFn, update_averages
from dit_jax.training.state import TrainState
from dit_jax.types import Array, Batch, Params, PRNGKey

# (params, batch, key) -> per-example terms [B], "loss" among them
LossFn = Callable[[Params, Batch, PRNGKey], dict[str, Array]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
    seed: int,
    average_decays: Mapping[str, DecayFn] | None = None,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Returns the pure update (state, batch) -> (state, metrics); metrics are scalars float32."""

    def mean_loss(params: Params, batch: Batch, key: PRNGKey) -> tuple[Array, dict[str, Array]]:
        terms = {name: term.mean() for name, term in loss_fn(params, batch, key).items()}
        return terms["loss"], terms

    gradient_fn = jax.grad(mean_loss, has_aux=True)
    if accumulation_steps > 1:
        gradient_fn = accumulated(gradient_fn, accumulation_steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, metrics = gradient_fn(state.params, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
        averages = update_averages(state.averages, params, state.step + 1, average_decays or {})
        metrics["grad_norm"] = optax.tree.norm(gradients)
        return TrainState(state.step + 1, params, opt_state, ema_params, averages), metrics

    return train_step


def accumulated(gradient_fn: Callable, num_parts: int) -> Callable:
    """Returns `gradient_fn` (params, batch, key) -> (gradients, metrics) as the mean over parts of the batch, in turn.

    Only one part's activations are alive at a time. Every part takes its rows from all over the batch, so that the
    devices that split the batch split every part; it draws from a key of its own.
    """

    def mean_fn(params: Params, batch: Batch, key: PRNGKey) -> tuple[Params, dict[str, Array]]:
        parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, num_parts)

        def add(total, part):
            return jax.tree.map(lambda a, b: a + b / num_parts, total, gradient_fn(params, *part)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient_fn, params, batch, key))
        return jax.lax.scan(add, zeros, (parts, keys))[0]

    return mean_fn


def jit_train_step(train_step: Callable, state: TrainState) -> Callable:
    """Returns the update compiled for states placed as `state` (abstract or not), which it takes over (donation).

    The next state is placed as this one: left to the compiler, its placement is written otherwise, and the second
    call compiles the step again.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(
    loss_fn: Callable[[Params, Batch], dict[str, Array]],
) -> Callable[[Params, Batch], dict[str, Array]]:
    """Returns (params, batch) -> sums over the batch's real examples (batch["mask"] = 1), and their "count"."""

    def eval_step(params: Params, batch: Batch) -> dict[str, Array]:
        mask = batch["mask"]
        sums = {name: jnp.sum(jnp.where(mask > 0, term, 0.0)) for name, term in loss_fn(params, batch).items()}
        return sums | {"count": mask.sum()}

    return eval_step
