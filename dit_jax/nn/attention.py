"""Multi-head attention over tokens (Vaswani et al., arXiv:1706.03762, section 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)
from jax.sharding import PartitionSpec

from dit_jax.nn.constraints import AXES, HIDDEN, KEYS, QUERIES, axis_size, constrain, partition
from dit_jax.nn.linear import Linear
from dit_jax.types import Array


class SelfAttention(nn.Module):
    """Attention of `num_heads` heads; the q, k, v projection is fused, which sets its Xavier bound (DiT's init)."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    implementation: str = "xla"  # `attend`'s

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """x: [B, T, D]; mask: [B, T] bool, the tokens that may be attended to, None for all."""
        qkv = Linear((3, x.shape[-1]), dtype=self.dtype, name="qkv")(x)  # [B, T, 3, D]
        q, k, v = rearrange(qkv, "b t three (n d) -> three b t n d", n=self.num_heads)
        return Linear(x.shape[-1], dtype=self.dtype, name="proj")(attend(q, k, v, mask, self.implementation))


class CrossAttention(nn.Module):
    """Attention of `num_heads` heads from x to a sequence of other tokens."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array | None = None) -> Array:
        """x: [B, T, D]; tokens: [B, S, D]; mask: [B, S] bool, the tokens that may be attended to, None for all."""
        width = x.shape[-1]
        q = rearrange(Linear(width, dtype=self.dtype, name="q")(x), "b t (n d) -> b t n d", n=self.num_heads)
        kv = Linear((2, width), dtype=self.dtype, name="kv")(tokens)  # [B, S, 2, D]
        k, v = rearrange(kv, "b s two (n d) -> two b s n d", n=self.num_heads)
        return Linear(width, dtype=self.dtype, name="proj")(attend(q, k, v, mask))


def attend(q: Array, k: Array, v: Array, mask: Array | None, implementation: str = "xla") -> Array:
    """Returns [B, T, N * d] of q [B, T, N, d] and k, v [B, S, N, d]; softmax in float32; mask [B, S] bool or None.

    On a mesh that splits the tokens each device has the queries of its own, and gathers the keys and values of all.

    Args:
      implementation: "xla", "cudnn" or "flash" (`config.ComputeConfig.attention`).
    """
    q, k, v = constrain(q, QUERIES), constrain(k, KEYS), constrain(v, KEYS)
    if implementation == "flash":
        attended = flash_attention(q, k, v, mask)
    else:
        if mask is not None:  # cuDNN wants a row for each query
            rows = q.shape[1] if implementation == "cudnn" else 1
            mask = jnp.broadcast_to(mask[:, None, None], (len(mask), 1, rows, k.shape[1]))
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    return constrain(rearrange(attended, "b t n d -> b t (n d)"), HIDDEN)


def flash_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Returns [B, T, N, d] by JAX's splash attention kernel for TPU, each device's part by itself; arguments as above.

    No device holds the attention's weights: the kernel makes them by blocks, in the backward pass again.
    """
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    queries, keys = partition(q.shape, QUERIES), partition(k.shape, KEYS)
    axes = queries, keys, keys, PartitionSpec(keys[0], None)
    if axis_size(*AXES) == 1:
        return _flash_attention(q, k, v, mask)
    return jax.shard_map(_flash_attention, in_specs=axes, out_specs=queries, check_vma=False)(q, k, v, mask)


def _flash_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    (num_queries, num_heads, head_dim), num_keys = q.shape[1:], k.shape[1]
    block_q, block_k = (_block_size(n) for n in (num_queries, num_keys))
    q, k, v = (rearrange(x, "b t n d -> b n t d") for x in (q * head_dim**-0.5, k, v))
    pad_q, pad_k = -num_queries % block_q, -num_keys % block_k
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad_q), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad_k), (0, 0))) for x in (k, v))
    # A query attends to the keys of its own segment: 1 are those that are there, 0 masked ones and padding.
    segments = SegmentIds(
        jnp.ones((q.shape[0], q.shape[2]), jnp.int32), jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, pad_k)))
    )
    sizes = BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k,
        use_fused_bwd_kernel=True,
    )
    everything = MultiHeadMask([FullMask((q.shape[2], k.shape[2]))] * num_heads)
    kernel = make_splash_mha_single_device(everything, block_sizes=sizes)
    attended = jax.vmap(kernel)(q, k, v, segments)
    return rearrange(attended[:, :, :num_queries], "b n t d -> b t n d")


def _block_size(num_tokens: int) -> int:
    """Returns the tokens that the kernel works on at a time: a multiple of a TPU's 128 lanes, with little padding."""
    return min((512, 256, 128), key=lambda size: (-num_tokens % size, -size))
