"""The jitted update that both stages share; what differs between them is what gives the gradients.

Randomness is a function of (seed, step): every step folds its number into the run's key, and the draws are made for
the global batch, so that they are the same on any mesh (JAX's threefry is partitionable).

A bad step, whose loss or gradients are not finite, changes nothing but the number of the step; decided on the device,
so that the host need not look.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dit_jax.metrics.held_out import masked_sums
from dit_jax.models.averages import DecayFn, update_averages
from dit_jax.nn.constraints import BATCH, constrain
from dit_jax.parallel.mesh import traced_on
from dit_jax.training.state import LossState, TrainState
from dit_jax.types import Array, Batch, Params, PRNGKey

NORMS_AND_LOSS = ("loss", "grad_norm", "loss_grad_norm")  # the metrics that are finite in a good step

Constants = Any  # arrays that a stage's loss reads and no step changes, such as the weights of LPIPS

# What a step draws at random for a batch: arrays [B, ...], a row an example. It is drawn for the whole batch and then
# split with it, so that a batch in parts has the noise that it has at once.
Draws = Any
DrawFn = Callable[[Batch, PRNGKey], Draws]


class Loss(NamedTuple):
    """A loss over a batch; called with a key, (params, batch, key, constants), it draws for that batch."""

    draw: DrawFn
    terms: Callable[[Params, Batch, Draws, Constants], dict[str, Array]]  # of each example [B], "loss" among them

    def __call__(self, params: Params, batch: Batch, key: PRNGKey, constants: Constants) -> dict[str, Array]:
        return self.terms(params, batch, self.draw(batch, key), constants)


class Gradients(NamedTuple):
    """What a batch gives a step."""

    params: Params
    metrics: dict[str, Array]  # scalars, "loss" among them
    loss_params: Params | None = None  # gradients of the loss' own parameters
    observed: Any = None  # what the stage's `observe` takes


# (state before the step, batch, key, constants) -> Gradients
GradientFn = Callable[[TrainState, Batch, PRNGKey, Constants], Gradients]
# (updated params, updated loss state, observed) -> both, with what is not trained by gradients
ObserveFn = Callable[[Params, LossState, Any], tuple[Params, LossState]]


def gradients_of(loss: Loss, accumulation_steps: int = 1) -> GradientFn:
    """Returns the gradients of the mean of a loss over the batch."""

    def mean_loss(params: Params, batch: Batch, draws: Draws, constants: Constants):
        terms = {name: term.mean() for name, term in loss.terms(params, batch, draws, constants).items()}
        return terms["loss"], terms

    def gradient_fn(state: TrainState, batch: Batch, draws: Draws, constants: Constants) -> Gradients:
        return Gradients(*jax.grad(mean_loss, has_aux=True)(state.params, batch, draws, constants))

    return accumulated(gradient_fn, loss.draw, accumulation_steps)


def batch_size_of(batch: Batch) -> int:
    """Returns B of arrays [B, ...]."""
    return len(jax.tree.leaves(batch)[0])


def make_train_step(
    gradient_fn: GradientFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
    seed: int,
    average_decays: Mapping[str, DecayFn] | None = None,
    observe: ObserveFn | None = None,
    spike_zscore: float | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Returns the pure update (state, batch, constants) -> (state, metrics); metrics are scalars float32.

    `skipped` is 1 for a bad step, of which all but `state.step` stays as it was, bit for bit: of a loss or gradient
    norm that is not finite (`loss_grad_norm` is that of the loss' own parameters), or of a loss that `is_spike`.
    """

    def train_step(state: TrainState, batch: Batch, constants: Constants = None) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients = gradient_fn(state, batch, key, constants)
        params, opt_state = _updated(optimizer, gradients.params, state.opt_state, state.params)
        loss_state = state.loss_state
        if loss_state is not None:
            updated = _updated(optimizer, gradients.loss_params, loss_state.opt_state, loss_state.params)
            loss_state = LossState(*updated, loss_state.statistics)
        if observe is not None:
            params, loss_state = observe(params, loss_state, gradients.observed)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
        averages = update_averages(state.averages, params, state.step + 1, average_decays or {})
        metrics = gradients.metrics | {"grad_norm": optax.tree.norm(gradients.params)}
        if loss_state is not None and loss_state.params:
            metrics["loss_grad_norm"] = optax.tree.norm(gradients.loss_params)
        good = jnp.isfinite(jnp.stack([metrics[name] for name in NORMS_AND_LOSS if name in metrics])).all()
        recent = state.recent
        if spike_zscore is not None:
            good &= ~is_spike(metrics["loss"], recent["loss"], spike_zscore)
            recent = {"loss": jnp.append(recent["loss"][1:], metrics["loss"])}
        new = TrainState(state.step, params, opt_state, ema_params, averages, loss_state, recent)
        state = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, state)
        return state.replace(step=state.step + 1), metrics | {"skipped": (~good).astype(jnp.float32)}

    return train_step


def is_spike(loss: Array, recent_losses: Array, zscore: float) -> Array:
    """Returns whether a loss lies more than `zscore` robust standard deviations above the median of recent ones.

    The deviation is 1.4826 times the median absolute one, which for a normal distribution is its own. False as long as
    `recent_losses` [n] has a NaN, which stands for a step still to come.
    """
    median = jnp.median(recent_losses)
    deviation = 1.4826 * jnp.median(jnp.abs(recent_losses - median))
    return loss - median > zscore * jnp.maximum(deviation, 1e-6 * jnp.abs(median))  # losses may be all the same


def _updated(optimizer: optax.GradientTransformation, gradients: Params, opt_state: optax.OptState, params: Params):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def accumulated(
    gradient_fn: Callable[[TrainState, Batch, Draws, Constants], Gradients], draw: DrawFn, num_parts: int
) -> GradientFn:
    """Returns the mean of a `gradient_fn` over parts of the batch, in turn, with what is drawn for the whole batch.

    Only one part's activations are alive at a time. Every part takes its rows from all over the batch, so that the
    devices that split the batch split every part.
    """

    def mean_fn(state: TrainState, batch: Batch, key: PRNGKey, constants: Constants) -> Gradients:
        inputs = batch, draw(batch, key)
        if num_parts == 1:
            return gradient_fn(state, *inputs, constants)

        def split(x: Array) -> Array:
            x = constrain(x, (BATCH, *[None] * (x.ndim - 1)))  # what is drawn lies where the batch does
            return x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)

        def add(total, part):
            gradients = gradient_fn(state, *part, constants)
            return jax.tree.map(lambda a, b: a + b / num_parts, total, gradients), None

        shapes = jax.eval_shape(gradient_fn, state, *inputs, constants)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, jax.tree.map(split, inputs))[0]

    return mean_fn


def jit_train_step(train_step: Callable, state: TrainState) -> Callable:
    """Returns the update compiled for states placed as `state` (abstract or not), which it takes over (donation).

    The next state is placed as this one: left to the compiler, its placement is written otherwise, and the second
    call compiles the step again. Activations are constrained to the axes of the state's mesh.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    train_step = traced_on(state.step.sharding.mesh, train_step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(
    loss_fn: Callable[[Params, Batch, Constants], dict[str, Array]],
) -> Callable[..., dict[str, Array]]:
    """Returns (params, batch, constants) -> sums over the batch's real examples (batch["mask"] = 1), and their "count".

    The terms are [B], or [B, ...] and summed over their first axis alone.
    """

    def eval_step(params: Params, batch: Batch, constants: Constants = None) -> dict[str, Array]:
        return masked_sums(loss_fn(params, batch, constants), batch["mask"])

    return eval_step
