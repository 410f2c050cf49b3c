"""Where every parameter lives: one table from parameter path to mesh axes."""

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.types import Params

# (pattern of the path's end, axes). The first match wins. A parameter is split over "fsdp" along the dimension that
# is wide in every model; optimizer moments and averages end in their parameter's path and so follow it.
RULES = (
    (r"(qkv|cross_attn/q|kv|proj|fc1|fc2|linear|mlp_0|mlp_2)/kernel", PartitionSpec("fsdp", None)),
    (r"quantize/embedding|codebook/sums", PartitionSpec("fsdp", None)),
    (r"x_embedder/kernel|embedding_table", PartitionSpec(None, "fsdp")),
    (r"(conv\w*|nin_shortcut|q|k|v|proj_out|quant_conv)/kernel", PartitionSpec(None, None, "fsdp", None)),
)
MIN_SIZE = 2**15  # elements; smaller parameters are replicated: splitting them saves nothing and costs a collective


def param_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns the sharding of one parameter, `path` being its keys joined by "/".

    Raises:
      ValueError: where no rule names a large parameter, or its dimension does not divide.
    """
    if math.prod(shape) < MIN_SIZE:
        return NamedSharding(mesh, PartitionSpec())
    for pattern, spec in RULES:
        if re.search(rf"(^|/)({pattern})$", path):
            for size, axis in zip(shape, spec, strict=True):
                if axis and size % mesh.shape[axis]:
                    raise ValueError(
                        f"{path} {shape}: {size} must be divisible by config.mesh.{axis}={mesh.shape[axis]}; "
                        f"choose a size of that axis that divides {size}"
                    )
            return NamedSharding(mesh, spec)
    raise ValueError(f"no sharding rule matches the parameter {path} {shape}; add one to dit_jax/parallel/rules.py")


def tree_shardings(tree: Params, mesh: Mesh) -> Params:
    """Returns the sharding of every leaf of a tree of parameters, optimizer state or a whole training state."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: param_sharding(_join(path), leaf.shape, mesh), tree)


def _join(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe_shardings(params: Params, mesh: Mesh) -> dict:
    """Returns the mesh's axes, and the PartitionSpec of every parameter that is split, by path, as JSON values."""
    leaves = jax.tree_util.tree_leaves_with_path(tree_shardings(params, mesh))
    split = {_join(path): str(tuple(sharding.spec)) for path, sharding in leaves if any(sharding.spec)}
    return {"mesh": dict(mesh.shape), "split": split}
