"""The optimizer and its schedule, from optax."""

from collections.abc import Sequence

import jax
import optax

from dit_jax.config import OptimizerConfig
from dit_jax.types import Params


def make_schedule(optimizer: OptimizerConfig, num_train_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: a linear warm-up, then constant or a cosine to 0 at the last step."""
    peak, warmup_steps = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, num_train_steps)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), optax.constant_schedule(peak)], [warmup_steps]
    )


def make_optimizer(
    optimizer: OptimizerConfig, num_train_steps: int, frozen: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Returns AdamW, with global-norm clipping before it where the config asks for it.

    frozen: top-level names of parameters that stay as they are, and of which no moments are kept.
    """
    schedule = make_schedule(optimizer, num_train_steps)
    adamw = optax.adamw(schedule, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay)
    if optimizer.max_grad_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(optimizer.max_grad_norm), adamw)
    if not frozen:
        return adamw

    def is_frozen(params: Params) -> Params:
        return {name: jax.tree.map(lambda _, name=name: name in frozen, tree) for name, tree in params.items()}

    return optax.partition({False: adamw, True: optax.set_to_zero()}, is_frozen)
