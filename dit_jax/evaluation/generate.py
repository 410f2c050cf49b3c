"""Drawing images from a trained denoiser, sharded over the mesh.

Image i depends on (seed, i) and its label alone: its key is fold_in(seed, i), and every batch has the same compiled
shape, the last one padded.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dit_jax.config import Config, SamplingConfig, check_sampling
from dit_jax.diffusion.guidance import guided
from dit_jax.diffusion.process import make_process, respace
from dit_jax.diffusion.samplers import make_sampler_step
from dit_jax.diffusion.samplers.scan import sample
from dit_jax.metrics.picture import to_uint8
from dit_jax.models.autoencoder import Codec
from dit_jax.models.build import build_dit
from dit_jax.parallel.mesh import batch_sharding, batch_shards
from dit_jax.types import Array, Params


def make_generator(
    config: Config, sampling: SamplingConfig, codec: Codec | None, mesh: Mesh
) -> Callable[..., np.ndarray]:
    """Returns `generate(params, labels, seed, progress=False) -> uint8 [N, H, W, 3]`, compiled at its first call.

    Args:
      config: of the denoiser; codec: decodes its latents, None for a model of pixels.
      sampling: how to draw; its batch size is rounded up to what the mesh divides.
    """
    check_sampling(sampling, config.diffusion.num_timesteps, config.input_shape[-1], config.dit.label_dropout)
    model, null_label = build_dit(config), config.data.num_classes
    process = respace(make_process(config.diffusion), sampling.num_steps)
    step_fn = make_sampler_step(sampling)
    shards = batch_shards(mesh)
    batch_size = -(-sampling.batch_size // shards) * shards

    def draw(params: Params, codec: Codec | None, seed: Array, indices: Array, labels: Array) -> Array:
        model_fn = guided(
            lambda *inputs: model.apply({"params": params}, *inputs),
            null_label,
            sampling.cfg_scale,
            sampling.cfg_channels,
        )
        keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(indices)
        x_0 = sample(process, model_fn, step_fn, keys, labels, config.input_shape)
        images = to_uint8(x_0 if codec is None else codec.decode(x_0))
        return jnp.broadcast_to(images, (*images.shape[:3], 3))

    draw = jax.jit(draw)

    def generate(params: Params, labels: np.ndarray, seed: int, progress: bool = False) -> np.ndarray:
        indices, labels = np.arange(len(labels), dtype=np.int32), np.asarray(labels, np.int32)
        if labels.size and not (labels.min() >= 0 and labels.max() <= null_label):
            raise ValueError(f"labels must be from 0 to {null_label - 1} (or {null_label}: no label); got {labels}")
        images = []
        starts = range(0, len(labels), batch_size)
        for start in tqdm(starts, desc="sampling", unit="batch", disable=not progress):
            rows = np.minimum(np.arange(start, start + batch_size), len(labels) - 1)  # the last batch repeats its end
            batch = jax.device_put((indices[rows], labels[rows]), batch_sharding(mesh))
            images.append(np.asarray(draw(params, codec, seed, *batch)))
        return np.concatenate(images)[: len(labels)]

    return generate


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """Returns labels [N] int32 in turn: 0, 1, ..., so that any first images are balanced."""
    return np.arange(num_images, dtype=np.int32) % num_classes


def override_sampling(sampling: SamplingConfig, **overrides) -> SamplingConfig:
    """Returns the settings with every override that is not None."""
    return dataclasses.replace(sampling, **{name: value for name, value in overrides.items() if value is not None})
