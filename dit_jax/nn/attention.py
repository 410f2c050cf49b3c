"""Multi-head attention over tokens (Vaswani et al., arXiv:1706.03762, section 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from dit_jax.nn.constraints import AXES, HIDDEN, KEYS, QUERIES, axis_size, constrain, partition
from dit_jax.nn.linear import Linear
from dit_jax.types import Array


class SelfAttention(nn.Module):
    """Attention of `num_heads` heads; the q, k, v projection is fused, which sets its Xavier bound (DiT's init)."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    implementation: str = "xla"  # `attend`'s
    qkv_bias: bool = True
    qkv_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    proj_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """x: [B, T, D]; mask: [B, T] bool, the tokens that may be attended to, None for all."""
        width = x.shape[-1]
        qkv = Linear((3, width), self.qkv_init, self.dtype, self.qkv_bias, name="qkv")(x)  # [B, T, 3, D]
        q, k, v = rearrange(qkv, "b t three (n d) -> three b t n d", n=self.num_heads)
        return Linear(width, self.proj_init, self.dtype, name="proj")(attend(q, k, v, mask, self.implementation))


class CrossAttention(nn.Module):
    """Attention of `num_heads` heads from x to a sequence of other tokens."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    qkv_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array | None = None) -> Array:
        """x: [B, T, D]; tokens: [B, S, E]; mask: [B, S] bool, the tokens that may be attended to, None for all."""
        width, settings = x.shape[-1], (self.kernel_init, self.dtype)
        q = rearrange(Linear(width, *settings, self.qkv_bias, name="q")(x), "b t (n d) -> b t n d", n=self.num_heads)
        kv = Linear((2, width), *settings, self.qkv_bias, name="kv")(tokens)  # [B, S, 2, D]
        k, v = rearrange(kv, "b s two (n d) -> two b s n d", n=self.num_heads)
        return Linear(width, *settings, name="proj")(attend(q, k, v, mask))


def attend(q: Array, k: Array, v: Array, mask: Array | None, implementation: str = "xla") -> Array:
    """Returns [B, T, N * d] of q [B, T, N, d] and k, v [B, S, N, d]; softmax in float32; mask [B, S] bool or None.

    On a mesh that splits the tokens each device has the queries of its own, and gathers the keys and values of all.

    Args:
      implementation: "xla", "cudnn" or "flash" (`config.ComputeConfig.attention`).
    """
    q, k, v = constrain(q, QUERIES), constrain(k, KEYS), constrain(v, KEYS)
    attended = {"xla": attend_by_xla, "cudnn": attend_by_cudnn, "flash": attend_by_flash}[implementation](q, k, v, mask)
    return constrain(rearrange(attended, "b t n d -> b t (n d)"), HIDDEN)


def attend_by_xla(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Returns [B, T, N, d] of q [B, T, N, d], k, v [B, S, N, d] and mask [B, S] bool or None, written out in einsums.

    What can be done to [T, d] numbers is not done to [T, S]: the scale is the queries', and the softmax's sum divides
    the output. On CPU that makes it twice as fast as `jax.nn.dot_product_attention`.
    """
    logits = jnp.einsum("btnd,bsnd->bnts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - largest)  # [B, N, T, S], up to their sum
    attended = jnp.einsum("bnts,bsnd->bntd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    attended = attended / weights.sum(axis=-1, keepdims=True)
    return rearrange(attended, "b n t d -> b t n d").astype(q.dtype)


def attend_by_cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Returns the same by cuDNN's fused kernel, for NVIDIA's GPUs; bfloat16."""
    if mask is not None:  # which cuDNN wants with a row for each query
        mask = jnp.broadcast_to(mask[:, None, None], (len(mask), 1, q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def attend_by_flash(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Returns the same by JAX's splash attention kernel for TPU, each device's part by itself.

    No device holds the attention's weights: the kernel makes them by blocks, in the backward pass again.
    """
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    queries, keys = partition(q.shape, QUERIES), partition(k.shape, KEYS)
    axes = queries, keys, keys, PartitionSpec(keys[0], None)
    if axis_size(*AXES) == 1:
        return _flash_attention(q, k, v, mask)
    return jax.shard_map(_flash_attention, in_specs=axes, out_specs=queries, check_vma=False)(q, k, v, mask)


def _flash_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second, which few runs need

    (num_queries, num_heads, head_dim), num_keys = q.shape[1:], k.shape[1]
    block_q, block_k = (_block_size(n) for n in (num_queries, num_keys))
    q, k, v = (rearrange(x, "b t n d -> b n t d") for x in (q * head_dim**-0.5, k, v))
    pad_q, pad_k = -num_queries % block_q, -num_keys % block_k
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad_q), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad_k), (0, 0))) for x in (k, v))
    # A query attends to the keys of its own segment: 1 are those that are there, 0 masked ones and padding.
    segments = splash.SegmentIds(
        jnp.ones((q.shape[0], q.shape[2]), jnp.int32), jnp.pad(mask.astype(jnp.int32), ((0, 0), (0, pad_k)))
    )
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k,
        use_fused_bwd_kernel=True,
    )
    everything = splash.MultiHeadMask([splash.FullMask((q.shape[2], k.shape[2]))] * num_heads)
    kernel = splash.make_splash_mha_single_device(everything, block_sizes=sizes)
    attended = jax.vmap(kernel)(q, k, v, segments)
    return rearrange(attended[:, :, :num_queries], "b n t d -> b t n d")


def _block_size(num_tokens: int) -> int:
    """Returns the tokens that the kernel works on at a time: a multiple of a TPU's 128 lanes, with little padding."""
    return min((512, 256, 128), key=lambda size: (-num_tokens % size, -size))
