"""How much of a codebook is in use."""

import jax.numpy as jnp

from dit_jax.types import Array


def code_use(counts: Array) -> dict[str, Array]:
    """Returns `codes_used`, the share of codes that occur, and `perplexity`, of counts [n] of each code.

    The perplexity exp(-sum p log p) of the codes' frequencies p is between 1 and n, the number of codes in equal use.
    """
    frequencies = counts / jnp.maximum(counts.sum(), 1.0)
    entropy = -jnp.sum(frequencies * jnp.log(jnp.maximum(frequencies, 1e-20)))
    return {"codes_used": jnp.mean(counts > 0), "perplexity": jnp.exp(entropy)}
