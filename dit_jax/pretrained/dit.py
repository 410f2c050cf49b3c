"""Names of the DiT's parameters in the released PyTorch weights, and in diffusers' `DiTTransformer2DModel`."""

import math
import re
from collections.abc import Iterator

import numpy as np

from dit_jax.pretrained.name_map import Entry, Tensors

POSITION_TABLE = "pos_embed"  # [1, T, D]: fixed, so that we compute it, but the released files hold it


def released_entries(depth: int, patch_size: int) -> list[Entry]:
    """Returns the entries of a released file such as `DiT-XL-2-256x256.pt`, without its position table."""
    entries = [
        Entry("x_embedder/kernel", ("x_embedder.proj.weight",), patch_size=patch_size),
        Entry("x_embedder/bias", ("x_embedder.proj.bias",)),
        Entry("y_embedder/embedding_table", ("y_embedder.embedding_table.weight",)),
        *_linear("t_embedder/mlp_0", "t_embedder.mlp.0"),
        *_linear("t_embedder/mlp_2", "t_embedder.mlp.2"),
        *_linear("final_layer/linear", "final_layer.linear"),
        *_linear("final_layer/adaLN_modulation/linear", "final_layer.adaLN_modulation.1"),
    ]
    for i in range(depth):
        for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"):
            entries += _linear(f"blocks_{i}/{name}", f"blocks.{i}.{name.replace('/', '.')}")
        entries += _linear(f"blocks_{i}/adaLN_modulation/linear", f"blocks.{i}.adaLN_modulation.1")
    return entries


def diffusers_entries(depth: int, patch_size: int) -> list[Entry]:
    """Returns the entries of a diffusers folder; there each block holds the embedders of timestep and label anew."""

    def embedder(path: str, name: str, leaf: str, linear: bool = False) -> Entry:
        first, *copies = (f"transformer_blocks.{i}.norm1.emb.{name}.{leaf}" for i in range(depth))
        return Entry(path, (first,), linear=linear, copies=tuple(copies))

    entries = [
        Entry("x_embedder/kernel", ("pos_embed.proj.weight",), patch_size=patch_size),
        Entry("x_embedder/bias", ("pos_embed.proj.bias",)),
        embedder("y_embedder/embedding_table", "class_embedder.embedding_table", "weight"),
        *_linear("final_layer/linear", "proj_out_2"),
        *_linear("final_layer/adaLN_modulation/linear", "proj_out_1"),
    ]
    for ours, theirs in (("mlp_0", "linear_1"), ("mlp_2", "linear_2")):
        entries.append(embedder(f"t_embedder/{ours}/kernel", f"timestep_embedder.{theirs}", "weight", linear=True))
        entries.append(embedder(f"t_embedder/{ours}/bias", f"timestep_embedder.{theirs}", "bias"))
    for i in range(depth):
        block, their_block = f"blocks_{i}", f"transformer_blocks.{i}"
        entries += [
            *_linear(f"{block}/attn/qkv", *(f"{their_block}.attn1.to_{x}" for x in "qkv")),
            *_linear(f"{block}/attn/proj", f"{their_block}.attn1.to_out.0"),
            *_linear(f"{block}/mlp/fc1", f"{their_block}.ff.net.0.proj"),
            *_linear(f"{block}/mlp/fc2", f"{their_block}.ff.net.2"),
            *_linear(f"{block}/adaLN_modulation/linear", f"{their_block}.norm1.linear"),
        ]
    return entries


def _linear(path: str, *names: str) -> Iterator[Entry]:
    yield Entry(f"{path}/kernel", tuple(f"{name}.weight" for name in names), linear=True)
    yield Entry(f"{path}/bias", tuple(f"{name}.bias" for name in names), flat=True)


def released_shape(tensors: Tensors) -> dict[str, int]:
    """Returns what a released file's shapes say of the model: the fields of `DiTConfig`, and the input's.

    Keys: depth, width, patch_size, num_classes, channels, out_channels; height of the square input, where the position
    table is there to tell it.
    """
    numbers = [int(m[1]) for m in (re.match(r"blocks\.(\d{1,9})\.", name) for name in tensors) if m]
    depth = 1 + max(numbers, default=-1)
    if depth > len(tensors):
        raise ValueError(f"block {depth - 1} is there, but only {len(tensors)} tensors")
    projection = require(tensors, "x_embedder.proj.weight", 4)
    width, channels, patch_size, _ = projection.shape
    shape = {
        "depth": depth,
        "width": width,
        "patch_size": patch_size,
        "num_classes": len(require(tensors, "y_embedder.embedding_table.weight", 2)) - 1,
        "channels": channels,
        "out_channels": len(require(tensors, "final_layer.linear.bias", 1)) // patch_size**2,
    }
    if POSITION_TABLE in tensors:
        shape["height"] = math.isqrt(require(tensors, POSITION_TABLE, 3).shape[1]) * patch_size
    return shape


def require(tensors: Tensors, name: str, num_axes: int) -> np.ndarray:
    """Returns a tensor; raises ValueError where it is missing or has another number of axes."""
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing; these are not a DiT's weights in this form")
    if tensors[name].ndim != num_axes:
        raise ValueError(f"tensor {name!r} must have {num_axes} axes, but has shape {tensors[name].shape}")
    return tensors[name]
