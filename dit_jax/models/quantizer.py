"""Vector quantization (VQ-VAE, arXiv:1711.00937, section 3): a latent vector becomes the nearest code of a codebook.

n codes of c channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.config import CodebookConfig
from dit_jax.types import Array, Params, PRNGKey

EPSILON = 1e-5  # of the counts that moving means divide by (VQGAN's code)


class Codebook(nn.Module):
    """The codes [n, c], at first U(-1/n, 1/n) (VQGAN, arXiv:2012.09841); a call returns the nearest and their indices.

    Latents and codes are [..., c], indices [...] int32. No gradient passes from codes to latents.
    """

    num_codes: int
    channels: int

    @nn.compact
    def __call__(self, latents: Array) -> tuple[Array, Array]:
        def init(key: PRNGKey, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, minval=-1 / shape[0], maxval=1 / shape[0])

        embedding = self.param("embedding", init, (self.num_codes, self.channels))
        indices = nearest_codes(embedding, latents)
        return embedding[indices], indices


def nearest_codes(embedding: Array, latents: Array) -> Array:
    """Returns the indices [...] int32 of the codes [n, c] that are nearest to latents [..., c], the first of equals."""
    # |z - e|^2 without |z|^2, which is the same for all codes.
    distances = jnp.sum(embedding**2, axis=1) - 2.0 * jnp.einsum(
        "...c,nc->...n", latents, embedding, precision=jax.lax.Precision.HIGHEST
    )
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def straight_through(latents: Array, codes: Array) -> Array:
    """Returns the codes' values with the latents' gradient (section 3.2)."""
    return latents + jax.lax.stop_gradient(codes - latents)


def code_counts(indices: Array, num_codes: int) -> Array:
    """Returns how often each code occurs, [n] float32, over all of `indices`."""
    return jnp.zeros(num_codes).at[indices.reshape(-1)].add(1.0)


def init_code_statistics(codebook: CodebookConfig, embedding: Array) -> Params:
    """Returns `usage` [n], relative to its mean over the codes, and `sums` [n, c] for EMA codes.

    At first all are in equal use; or in none, where dead codes are restarted: then the codes that the first batch does
    not use become latents of it, since those that are drawn at random are far from where an encoder's are.
    """
    usage = jnp.full(len(embedding), 1.0 if codebook.restart_usage is None else 0.0, jnp.float32)
    return {"usage": usage} | ({"sums": embedding * usage[:, None]} if codebook.update == "ema" else {})


def observe_codes(
    codebook: CodebookConfig, embedding: Array, statistics: Params, latents: Array, indices: Array, key: PRNGKey
) -> tuple[Array, Params]:
    """Returns codes and statistics after a batch: moving means where codes are such, and dead codes restarted.

    Usage and sums are moving averages of a batch's counts n_i and sums of latents (VQ-VAE, appendix A.1), both divided
    by the batch's mean count, so that they mean the same for any batch size. A dead code becomes a latent of the batch.

    Args:
      embedding: [n, c], after the gradient's update; statistics: see `init_code_statistics`.
      latents: [..., c] of the encoder; indices: [...] of their codes.
    """
    num_codes = len(embedding)
    latents = latents.reshape(-1, latents.shape[-1])
    indices = indices.reshape(-1)
    mean_count, decay = len(indices) / num_codes, codebook.decay
    average = lambda old, new: decay * old + (1.0 - decay) * new / mean_count  # noqa: E731
    usage = average(statistics["usage"], code_counts(indices, num_codes))
    new = {"usage": usage}
    if codebook.update == "ema":
        new["sums"] = average(statistics["sums"], jnp.zeros_like(embedding).at[indices].add(latents))
        total = usage.sum()
        smoothed = (usage + EPSILON) / (total + num_codes * EPSILON) * total  # Laplace smoothing
        embedding = new["sums"] / smoothed[:, None]
    if codebook.restart_usage is not None:
        dead = usage < codebook.restart_usage
        chosen = latents[jax.random.randint(key, (num_codes,), 0, len(latents))]
        embedding = jnp.where(dead[:, None], chosen, embedding)
        new["usage"] = jnp.where(dead, 1.0, usage)
        if "sums" in new:
            new["sums"] = jnp.where(dead[:, None], chosen, new["sums"])
    return embedding, new
