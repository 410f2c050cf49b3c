"""The conditions of a data set's own examples: what pictures in training and figures afterwards are drawn for."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.config import Config
from dit_jax.data.bad_examples import BadExamples
from dit_jax.data.pipeline import Example, Transform, load_examples
from dit_jax.models.conditioners import FrozenNetworks, batch_conditions
from dit_jax.parallel.mesh import replicated, to_host
from dit_jax.parallel.preemption import heed
from dit_jax.types import Conditions

AT_ONCE = 64  # examples that a device makes conditions of


def example_conditions(
    config: Config,
    source: Sequence[Example],
    transform: Transform,
    positions: Sequence[int],
    frozen: FrozenNetworks | None,
    mesh: Mesh,
    bad_examples: BadExamples | None = None,
) -> tuple[Conditions, dict[str, Any]]:
    """Returns the raw conditions of the examples at some positions, and their arrays, [N, ...] each, on the host.

    What is random about an example is keyed by its position, as in `eval_batches`.

    Args:
      source, transform, bad_examples: as for `eval_batches`; frozen: what encodes examples, None where nothing does.
    """
    make = jax.jit(lambda batch, frozen: batch_conditions(config, batch, frozen))
    parts = []
    for start in range(0, len(positions), AT_ONCE):
        batch = load_examples(source, transform, positions[start : start + AT_ONCE], bad_examples)
        conditions = make(jax.device_put(batch, replicated(mesh)), frozen)
        parts.append((jax.tree.map(to_host, conditions), batch))
        heed()
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def spread_positions(size: int, count: int) -> list[int]:
    """Returns `count` positions in a data set of `size` examples, evenly spread over it, as its classes are in turn.

    Of more than there are, all come again.
    """
    return [int(position) for position in (np.arange(count) * max(1.0, size / count)).astype(int) % size]
