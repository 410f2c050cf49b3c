"""Latent diffusion transformers in JAX: `dit_jax.load(workdir)` gives a trained model."""

import os
import typing

if typing.TYPE_CHECKING:
    from dit_jax.evaluation.loaded import LoadedModel

__all__ = ["load"]


def load(
    workdir: str | os.PathLike,
    step: int | None = None,
    *,
    average: str | None = None,
    ema_length: float | None = None,
) -> "LoadedModel":
    """Returns the model of a workdir's newest checkpoint (or of `step`); see `LoadedModel` for what it can do.

    average, ema_length: other averages of the weights than the run's main one (`evaluation.loaded.load`).
    """
    from dit_jax.evaluation import loaded  # JAX is imported when a model is wanted, not with the package

    return loaded.load(workdir, step, average=average, ema_length=ema_length)
