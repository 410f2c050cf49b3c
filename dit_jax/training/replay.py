"""One step of a run again, to see what was wrong with it; nothing is written into the run."""

import os
from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.checkpoint import Checkpoints
from dit_jax.config import Config
from dit_jax.parallel.mesh import prefetch, to_host, traced_on
from dit_jax.pretrained.name_map import flatten
from dit_jax.training.bad_steps import abandoned_steps, read_bad_steps
from dit_jax.training.loop import Task, build_update, restored_state, state_items
from dit_jax.training.state import TrainState, abstract_state, create_state
from dit_jax.training.step import NORMS_AND_LOSS, GradientFn, jit_train_step
from dit_jax.types import Array, Batch


def replay(
    config: Config,
    workdir: str | os.PathLike,
    task: Task,
    mesh: jax.sharding.Mesh,
    step: int,
    compiled: Callable[..., Callable] = lambda step_fn, *_: step_fn,
) -> Iterator[str]:
    """Makes a step (from 1) of a run again, and yields line by line what it gave and what in it was not finite.

    All steps from the newest checkpoint before it, or else from the start, are made again, so that on the mesh of the
    run all bits are the run's own; compiled: as for `loop.train`.
    """
    optimizer, train_step = build_update(config, task.gradient_fn, task.observe)
    abstract = abstract_state(config, optimizer, mesh)
    start, items = Checkpoints(workdir).restore_newest_good(state_items(abstract), before=step) or (0, {})
    if start:
        state = restored_state(start, items, abstract, config, optimizer, mesh)
    else:
        params = task.initial_params(abstract.params) if task.initial_params else None
        state = create_state(config, optimizer, mesh, params)
    origin = f"from the checkpoint of step {start}" if start else "from the start"
    yield f"making steps {start + 1} to {step} again, {origin}"
    step_fn = compiled(jit_train_step(train_step, abstract), abstract, task.constants)
    record = read_bad_steps(workdir)
    abandoned = abandoned_steps(record, step - 1)
    batches = prefetch(task.train_batches(start), mesh, config.training.global_batch_size)
    for number in range(start + 1, step):
        batch = next(batches)
        if number in abandoned:
            state = state.replace(step=jax.device_put(np.int32(number), abstract.step.sharding))
        else:
            state, _ = step_fn(state, batch, task.constants)
    batch = next(batches)
    batches.close()
    first_module, finite = diagnose(task.gradient_fn, config.seed, state, batch, task.constants, mesh)
    _, metrics = step_fn(state, batch, task.constants)
    metrics = jax.device_get(metrics)
    what = f"step {step} (batch {step - 1}, seed {config.seed})"
    yield f"{what}: {_values(metrics)}" + (", skipped" if metrics["skipped"] else "")
    for row in record:
        if row["step"] == step and "reason" in row:
            yield f"recorded: {_values(row)}"
    examples = task.examples_of(step - 1) if task.examples_of else None
    for name, array in flatten(batch):
        rows = np.flatnonzero(~np.isfinite(to_host(array)).reshape(len(array), -1).all(axis=1)).tolist()
        if rows:
            which = "" if examples is None else f", examples {[examples[row] for row in rows]} of the training data"
            yield f"not finite in the batch: {name} of rows {rows}{which}"
    if first_module:
        yield f"first module of the network whose output is not finite: {first_module}"
    bad = [name for name, is_finite in finite.items() if not is_finite]
    if bad:
        yield f"gradients that are not finite: {len(bad)} of {len(finite)}, from {bad[0]} to {bad[-1]}"


def _values(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {metrics[name]:.9g}" for name in NORMS_AND_LOSS if name in metrics)


def diagnose(
    gradient_fn: GradientFn, seed: int, state: TrainState, batch: Batch, constants, mesh: jax.sharding.Mesh
) -> tuple[str | None, dict[str, bool]]:
    """Returns the first module whose output is not finite, and of every parameter whether its gradient is finite."""
    names: list[str] = []  # of the calls of modules, in the order in which they return
    bad: set[int] = set()

    def look(call_module, args, kwargs, context):
        output = call_module(*args, **kwargs)
        if context.method_name == "__call__":
            number = len(names)
            names.append("/".join(context.module.path) or type(context.module).__name__)
            arrays = [x for x in jax.tree.leaves(output) if isinstance(x, jax.Array) and jnp.issubdtype(x, jnp.inexact)]
            finite = jnp.stack([jnp.isfinite(x).all() for x in arrays] or [jnp.array(True)]).all()
            jax.debug.callback(lambda finite: None if finite else bad.add(number), finite)
        return output

    def finite_gradients(state: TrainState, batch: Batch, constants) -> list[Array]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        with nn.intercept_methods(look):
            gradients = gradient_fn(state, batch, key, constants)
        trees = gradients.params, gradients.loss_params
        return jax.tree.map(lambda x: jnp.isfinite(x).all(), trees)

    found = jax.jit(traced_on(mesh, finite_gradients))(state, batch, constants)
    jax.effects_barrier()
    leaves = [leaf for tree in found for leaf in jax.tree_util.tree_leaves_with_path(tree)]
    finite = {jax.tree_util.keystr(path, simple=True, separator="/"): bool(leaf) for path, leaf in leaves}
    return names[min(bad)] if bad else None, finite
