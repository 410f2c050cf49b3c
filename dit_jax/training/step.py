"""The jitted update that both stages share; what differs between them is a loss function of `stages`.

Randomness is a function of (seed, step): every step folds its number into the run's key, and the draws are made for
the global batch, so that they are the same on any mesh (JAX's threefry is partitionable).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dit_jax.training.state import TrainState
from dit_jax.types import Array, Batch, Params, PRNGKey

# (params, batch, key) -> per-example terms [B], "loss" among them
LossFn = Callable[[Params, Batch, PRNGKey], dict[str, Array]]


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, ema_decay: float | None, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Returns the pure update (state, batch) -> (state, metrics); metrics are scalars float32."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def mean_loss(params: Params) -> tuple[Array, dict[str, Array]]:
            terms = {name: term.mean() for name, term in loss_fn(params, batch, key).items()}
            return terms["loss"], terms

        gradients, metrics = jax.grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
        metrics["grad_norm"] = optax.global_norm(gradients)
        return TrainState(state.step + 1, params, opt_state, ema_params), metrics

    return train_step


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
