"""Latent diffusion transformers in JAX: `dit_jax.load(workdir)` gives a trained model."""

import os
import typing

if typing.TYPE_CHECKING:
    from dit_jax.evaluation.loaded import LoadedModel

__all__ = ["load"]


def load(workdir: str | os.PathLike, step: int | None = None) -> "LoadedModel":
    """Returns the model of a workdir's newest checkpoint (or of `step`); see `LoadedModel` for what it can do."""
    from dit_jax.evaluation import loaded  # JAX is imported when a model is wanted, not with the package

    return loaded.load(workdir, step)
