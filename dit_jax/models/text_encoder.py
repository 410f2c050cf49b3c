"""Text encoders: one transformer over the tokens of captions, in the forms of LDM, BERT, CLIP and T5.

LDM's is trained jointly with the denoiser (arXiv:2112.10752, section 4.3.1 and appendix E.2); the others come trained:
BERT (arXiv:1810.04805) and what is distilled from it, such as MiniLM (arXiv:2002.10957), CLIP's text tower
(arXiv:2103.00020) and T5's encoder (arXiv:1910.10683; gated: arXiv:2002.05202). `TextShape` says how they differ.
Captions are padded to a fixed length, and what follows a caption's end changes nothing.
"""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dit_jax.nn.constraints import HIDDEN, TOKENS, constrain
from dit_jax.nn.embeddings import normal_init
from dit_jax.nn.linear import Linear
from dit_jax.nn.remat import rematerialized
from dit_jax.nn.resnet import conv_init
from dit_jax.types import Array, Params

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's approximation
    "relu": nn.relu,
}
NUM_BUCKETS, MAX_DISTANCE = 32, 128  # of T5's relative positions


@dataclasses.dataclass(frozen=True)
class TextShape:
    """What tells text encoders apart; the defaults are LDM's.

    LDM's text model has 32 layers of width 1280 over BERT's 30,522 tokens, 542.9M parameters. LDM's code makes a layer
    of logits as well (39.1M), which it never uses and which is in the paper's 1.45B of text model and U-Net.
    """

    vocab_size: int
    max_length: int  # tokens of a caption: rows of the table of positions
    width: int
    depth: int
    num_heads: int = 8
    head_dim: int = 64
    hidden: int | None = None  # units of the MLP; None: 4 * width
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu"
    gated: bool = False  # the activation gates a second projection
    biases: Literal["all", "outputs", "none"] = "outputs"  # outputs: of all projections but q, k and v
    norm: Literal["layer", "rms"] = "layer"
    epsilon: float = 1e-5  # of the norms
    post_norm: bool = False  # normalise the sums, not what is added to them (and the embeddings, not the states)
    causal: bool = False  # a token attends to those before it alone
    positions: Literal["learned", "relative"] = "learned"  # relative: T5's biases of attention, by distance
    pooling: Literal["mean", "last"] = "mean"  # of the caption's tokens
    projection: int | None = None  # width of a linear map, without bias, of the pooled state
    normalized: bool = False  # the pooled state has length 1


class TextBlock(nn.Module):
    """Self-attention and MLP, each added to x [B, L, D]."""

    shape: TextShape
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, attended: Array, bias: Array | None) -> Array:
        """attended: [B, 1, 1 or L, L] bool; bias: [1, N, L, L] float32, of attention's logits."""
        shape = self.shape
        linear = functools.partial(Linear, kernel_init=conv_init, dtype=self.dtype, use_bias=shape.biases != "none")
        norm1, norm2 = (make_norm(shape, name) for name in ("norm1", "norm2"))

        def attention(x: Array) -> Array:
            inner = shape.num_heads * shape.head_dim
            qkv = linear((3, inner), use_bias=shape.biases == "all", name="qkv")(x)  # [B, L, 3, N * d]
            q, k, v = rearrange(qkv, "b l three (n d) -> three b l n d", n=shape.num_heads)
            heads = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=attended)
            heads = constrain(rearrange(heads, "b l n d -> b l (n d)"), HIDDEN)
            return linear(shape.width, name="proj")(heads)

        def mlp(x: Array) -> Array:
            size, activation = shape.hidden or 4 * shape.width, ACTIVATIONS[shape.activation]
            if shape.gated:
                both = linear((2, size), name="value_gate")(x)  # [B, L, 2, F]
                hidden = both[..., 0, :] * activation(both[..., 1, :])
            else:
                hidden = activation(linear(size, name="fc1")(x))
            return linear(shape.width, name="fc2")(constrain(hidden, HIDDEN))

        if shape.post_norm:
            x = norm1(constrain(x + attention(x), TOKENS))
            return norm2(constrain(x + mlp(x), TOKENS))
        x = constrain(x + attention(norm1(x)), TOKENS)
        return constrain(x + mlp(norm2(x)), TOKENS)


class TextEncoder(nn.Module):
    """Call with ids [B, L] int32 and mask [B, L] bool, True for a caption's tokens, which come first.

    Returns `states` [B, L, width] float32, 0 behind a caption's end, and `pooled` [B, width or projection] float32.
    """

    shape: TextShape
    dtype: jnp.dtype = jnp.float32  # of the matmuls
    remat: str = "none"  # `config.ComputeConfig`

    @nn.compact
    def __call__(self, ids: Array, mask: Array) -> dict[str, Array]:
        shape, length = self.shape, ids.shape[1]
        x = self.param("token_table", normal_init, (shape.vocab_size, shape.width))[ids]
        attended, bias = mask[:, None, None], None
        if shape.positions == "learned":
            x = x + self.param("position_table", normal_init, (shape.max_length, shape.width))[:length]
        else:
            table = self.param("relative_table", normal_init, (NUM_BUCKETS, shape.num_heads))
            bias = rearrange(table[relative_buckets(length)], "q k n -> 1 n q k")
        if shape.causal:
            attended = attended & np.tri(length, dtype=bool)
        if shape.post_norm:
            x = make_norm(shape, "norm")(x)
        x = constrain(x, TOKENS)
        block = rematerialized(TextBlock, self.remat)
        for i in range(shape.depth):
            x = block(shape, self.dtype, name=f"blocks_{i}")(x, attended, bias)
        if not shape.post_norm:
            x = make_norm(shape, "norm")(x)
        states = jnp.where(mask[..., None], x, 0.0)
        count = mask.sum(axis=1, keepdims=True)  # [B, 1], 0 for the null caption
        if shape.pooling == "mean":
            pooled = states.sum(axis=1) / jnp.maximum(count, 1)
        else:
            pooled = jnp.take_along_axis(states, jnp.maximum(count - 1, 0)[..., None], axis=1)[:, 0]
        if shape.projection:
            pooled = Linear(shape.projection, kernel_init=conv_init, use_bias=False, name="projection")(pooled)
        if shape.normalized:
            pooled = pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
        return {"states": states, "pooled": pooled}


def make_norm(shape: TextShape, name: str) -> nn.Module:
    """Returns a norm with a learned scale (and shift), float32."""
    settings = {"epsilon": shape.epsilon, "dtype": jnp.float32, "use_fast_variance": False, "name": name}
    return nn.LayerNorm(**settings) if shape.norm == "layer" else nn.RMSNorm(**settings)


def relative_buckets(length: int) -> np.ndarray:
    """Returns [length, length] int: which of T5's buckets the distance from a query to a key is in (its section 2.1).

    Half of the buckets are of keys behind the query. Of each half the first half has a distance each, the rest grow
    with the logarithm up to MAX_DISTANCE, and the last one has all beyond.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]  # of the key from the query
    half, exact = NUM_BUCKETS // 2, NUM_BUCKETS // 4
    size = np.abs(distance)
    # float32, as T5 computes it: distances on the border of a bucket come out as they were trained.
    growth = np.log(np.maximum(size, 1).astype(np.float32) / exact) / np.float32(np.log(MAX_DISTANCE / exact))
    far = np.minimum(exact + (growth * (half - exact)).astype(int), half - 1)
    return np.where(distance > 0, half, 0) + np.where(size < exact, size, far)


def abstract_text_encoder(shape: TextShape) -> Params:
    """Returns the tree of the parameters' shapes."""
    ids, mask = (jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (jnp.int32, jnp.bool_))
    return jax.eval_shape(TextEncoder(shape).init, jax.random.key(0), ids, mask)["params"]


@flax.struct.dataclass
class FrozenTextEncoder:
    """A trained text encoder."""

    params: Params
    module: TextEncoder = flax.struct.field(pytree_node=False)

    def encode(self, ids: Array, mask: Array) -> dict[str, Array]:
        """Returns a denoiser's raw condition of captions: `states`, `pooled` (see `TextEncoder`) and `mask`."""
        return self.module.apply({"params": self.params}, ids, mask) | {"mask": mask}
