"""Where every parameter lives: one table from parameter path to mesh axes."""

import math
import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.types import Params

Rule = tuple[str, tuple[str | None, ...]]  # (pattern of the path's end, axes of the parameter's last dimensions)

# The first match wins. Of two kernels in a row the first is split over "tensor" by its outputs (heads, hidden units or
# channels), the second by its inputs, so that nothing is exchanged between them; "fsdp" has the other side. Optimizer
# moments and averages end in their parameter's path and so follow it. Kernels are [inputs, outputs]; of the fused qkv
# [inputs, 3, outputs], so that each of q, k and v is split by whole heads; of convolutions [h, w, inputs, outputs].
RULES: tuple[Rule, ...] = (
    (r"(qkv|kv|value_gate|emb_scale_shift)/kernel", ("fsdp", None, "tensor")),
    (r"(cross_attn/q|fc1|mlp_0|adaLN_modulation/linear|emb_shift)/kernel", ("fsdp", "tensor")),
    (r"(proj|fc2|mlp_2)/kernel", ("tensor", "fsdp")),
    (
        r"(final_layer/linear|(text|layout)/(vector|tokens)|skip)/kernel",
        ("fsdp", None),
    ),  # its outputs are the few values of a patch
    (
        r"x_embedder/kernel|(embedding|token|position)_table",
        (None, "fsdp"),
    ),  # nor are patches wide, or the classes and "none" even
    (r"quantize/embedding|codebook/sums", ("fsdp", None)),
    (r"conv_in/kernel", (None, None, None, "fsdp")),  # its inputs are the channels of an image or of latents
    (r"(conv_out|quant_conv|q|k)/kernel", (None, None, "fsdp", None)),
    (r"(conv2|proj_out)/kernel", (None, None, "tensor", "fsdp")),
    (r"(conv\w*|nin_shortcut|v|proj_in)/kernel", (None, None, "fsdp", "tensor")),
)
MIN_SIZE = 2**15  # elements; smaller parameters are replicated: splitting them saves nothing and costs a collective


def param_sharding(path: str, shape: tuple[int, ...], mesh: Mesh, rules: tuple[Rule, ...] = ()) -> NamedSharding:
    """Returns the sharding of one parameter; an axis of one device is not written.

    Args:
      path: the parameter's keys joined by "/".
      rules: a config's own, which come before the table's.

    Raises:
      ValueError: where no rule names a large parameter, or its dimension does not divide.
    """
    if math.prod(shape) < MIN_SIZE:
        return NamedSharding(mesh, PartitionSpec())
    for pattern, axes in (*rules, *RULES):
        if not re.search(rf"(^|/)({pattern})$", path):
            continue
        if len(axes) > len(shape):
            raise ValueError(f"{path} {shape} has fewer dimensions than the axes {axes} of its rule {pattern!r}")
        axes = (None,) * (len(shape) - len(axes)) + axes
        spec = [axis if mesh.shape.get(axis, 1) > 1 else None for axis in axes]
        for size, axis in zip(shape, spec, strict=True):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"{path} {shape}: {size} must be divisible by config.mesh.{axis}={mesh.shape[axis]}; "
                    f"choose a size of that axis that divides {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec) if any(spec) else PartitionSpec())
    raise ValueError(
        f"no sharding rule matches the parameter {path} {shape}; add one to config.mesh.rules, "
        "or to dit_jax/parallel/rules.py"
    )


def tree_shardings(tree: Params, mesh: Mesh, rules: tuple[Rule, ...] = ()) -> Params:
    """Returns the sharding of every leaf of a tree of parameters, optimizer state or a whole training state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: param_sharding(_join(path), leaf.shape, mesh, rules), tree
    )


def _join(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe_shardings(params: Params, mesh: Mesh, rules: tuple[Rule, ...] = ()) -> dict:
    """Returns the mesh's axes, and the PartitionSpec of every parameter that is split, by path, as JSON values."""
    leaves = jax.tree_util.tree_leaves_with_path(tree_shardings(params, mesh, rules))
    split = {_join(path): str(tuple(sharding.spec)) for path, sharding in leaves if any(sharding.spec)}
    return {"mesh": dict(mesh.shape), "split": split}
