"""Convolutions of images whose rows are split over devices.

XLA's partitioner cannot be left to split a convolution's rows: where another axis of the mesh holds copies (beside rows
over "sequence", that is "tensor"), it sums kernel gradients, and outputs of split kernels, over the copies too (jaxlib
0.10.2; `tests/nn/test_convolution.py` has the smallest case). Here every device convolves the rows it has, with the
rows beyond its edges fetched from its neighbours.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dit_jax.nn.constraints import axis_size
from dit_jax.types import Array


def convolve(x: Array, kernel: Array, strides: tuple[int, int], padding, **settings) -> Array:
    """Returns `jax.lax.conv_general_dilated` of x [B, H, W, C]; it is what a `nn.Conv` is given under that name.

    Where "sequence" does not divide the rows, or they do not come out as rows / stride, each device convolves them all.

    Args:
      kernel: [h, w, inputs, outputs]; padding: "SAME", or ((above, below), (left, right)).
      settings: of `conv_general_dilated`; not dilations.
    """
    num_parts = axis_size("sequence")
    if num_parts == 1:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (above, below), columns = padding
    if x.shape[1] % (num_parts * strides[0]) or above + below != kernel.shape[0] - strides[0]:
        return _whole_rows(jax.lax.conv_general_dilated(_whole_rows(x), kernel, strides, padding, **settings))

    def convolve_part(x: Array, kernel: Array) -> Array:
        # ppermute gives zeros where nothing is sent: above the first part and below the last, which are so padded.
        parts = range(num_parts - 1)
        rows = [x]
        if above:
            rows.insert(0, jax.lax.ppermute(x[:, -above:], "sequence", [(i, i + 1) for i in parts]))
        if below:
            rows.append(jax.lax.ppermute(x[:, :below], "sequence", [(i + 1, i) for i in parts]))
        x = jnp.concatenate(rows, axis=1)
        return jax.lax.conv_general_dilated(x, kernel, strides, ((0, 0), columns), **settings)

    rows = PartitionSpec(None, "sequence")  # the other axes are left to the partitioner
    split = functools.partial(jax.shard_map, axis_names={"sequence"}, in_specs=(rows, PartitionSpec()), out_specs=rows)
    return split(convolve_part)(x, kernel)


def _whole_rows(x: Array) -> Array:
    """Returns x, all rows of its images on every device of "sequence"."""
    unconstrained = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(unconstrained, None, None, unconstrained))
