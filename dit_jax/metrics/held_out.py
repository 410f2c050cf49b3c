"""Means over held-out examples, summed batch by batch: the last batch may be padded, with mask 0."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.metrics.codebook import code_use
from dit_jax.types import Array


def masked_sums(terms: Mapping[str, Array], mask: Array) -> dict[str, Array]:
    """Returns the sums of terms [B, ...] over a batch's real examples (mask [B] = 1), and the `count` of these."""

    def masked_sum(term: Array) -> Array:
        return jnp.sum(jnp.where(mask.reshape(-1, *[1] * (term.ndim - 1)) > 0, term, 0.0), axis=0)

    return {name: masked_sum(term) for name, term in terms.items()} | {"count": mask.sum()}


def means(sums: Sequence[Mapping[str, np.ndarray]]) -> tuple[dict[str, float], int]:
    """Returns the means over all real examples of the batches' `masked_sums`, and the number of these.

    `codes`, counts [n] of each code, become their use (`metrics.codebook`). Batches are added up in float64.
    """
    totals = jax.tree.map(lambda *values: np.sum(values, axis=0, dtype=np.float64), *sums)
    count, codes = totals.pop("count"), totals.pop("codes", None)
    values = {name: float(total / count) for name, total in totals.items()}
    if codes is not None:
        values |= {name: float(value) for name, value in code_use(jnp.asarray(codes)).items()}
    return values, int(count)
