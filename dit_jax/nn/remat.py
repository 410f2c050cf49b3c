"""Rematerialization: what of a layer's activations the backward pass computes again instead of keeping them."""

import flax.linen as nn
import jax

_NO_BATCH = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _with_parameters(primitive, *args, **params) -> bool:
    """Says of an operation whether its result is kept: of matmuls with parameters and of convolutions.

    Not of attention's own matmuls, whose operands all have the batch: their results are the largest.
    """
    return primitive.name == "conv_general_dilated" or _NO_BATCH(primitive, *args, **params)


POLICIES = {  # by the value of config.compute.remat
    "dots": _with_parameters,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def rematerialized(layer: type[nn.Module], remat: str, in_scan: bool = False) -> type[nn.Module]:
    """Returns the class of a layer whose backward pass keeps only what `remat` says; "none": the class itself.

    in_scan: whether it is the body of a loop, which XLA cannot merge with the forward pass.
    """
    if remat == "none":
        return layer
    return nn.remat(layer, policy=POLICIES[remat], prevent_cse=not in_scan)
