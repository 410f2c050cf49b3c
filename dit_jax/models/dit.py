"""The diffusion transformer (DiT, arXiv:2212.09748, figure 3 and section 3.2), with each of its ways of conditioning.

Patches of x [B, H, W, C] become tokens [B, T, D], pass through `depth` blocks, and become [B, H, W, out_channels].
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models.conditioners import Condition, SequenceConditioner, as_conditions, join_conditions, with_spatial
from dit_jax.models.text_encoder import TextShape
from dit_jax.nn.attention import CrossAttention, SelfAttention
from dit_jax.nn.constraints import TOKENS, constrain
from dit_jax.nn.embeddings import LabelEmbedder, TimestepEmbedder, patchify, sincos_2d, unpatchify
from dit_jax.nn.linear import Linear
from dit_jax.nn.mlp import Mlp
from dit_jax.nn.modulation import AffineNorm, Modulation, modulated_norm
from dit_jax.nn.remat import rematerialized
from dit_jax.types import Array, Conditions, Params


class DiTBlock(nn.Module):
    """Self-attention, cross-attention if asked for, and MLP, each on a norm of x and added to x.

    `modulation` says what conditions the norms: "none" (a learned scale and shift), "adaln" (scale and shift from
    c.vector) or "adaln_zero" (a gate before the sum as well; gates start at zero, so the block starts as identity).
    """

    num_heads: int
    mlp_ratio: float
    modulation: str
    cross_attention: bool
    dtype: jnp.dtype
    attention: str = "xla"  # the implementation of self-attention (`nn.attention.attend`)

    @nn.compact
    def __call__(self, x: Array, c: Condition, mask: Array | None = None, skip: Array | None = None) -> Array:
        """x: [B, T, D]; mask: [B, T] bool, the tokens of x that may be attended to, None for all.

        skip: [B, T, D], what an earlier block made, which is joined to x (U-ViT, arXiv:2209.12152, section 3).
        """
        if skip is not None:
            x = constrain(Linear(x.shape[-1], name="skip")(jnp.concatenate([x, skip], axis=-1)), TOKENS)
        attention = SelfAttention(self.num_heads, self.dtype, self.attention, name="attn")
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")
        gate_a = gate_m = 1.0
        if self.modulation == "none":
            norm_a, norm_m = AffineNorm(name="norm1"), AffineNorm(name="norm2")
        else:
            num_outputs = {"adaln": 4, "adaln_zero": 6}[self.modulation]
            outputs = Modulation(num_outputs, name="adaLN_modulation")(c.vector)
            if self.modulation == "adaln_zero":
                gate_a, gate_m = outputs.pop(2), outputs.pop(-1)
            shift_a, scale_a, shift_m, scale_m = outputs
            norm_a = lambda x: modulated_norm(x, shift_a, scale_a)  # noqa: E731
            norm_m = lambda x: modulated_norm(x, shift_m, scale_m)  # noqa: E731
        x = constrain(x + gate_a * attention(norm_a(x), mask), TOKENS)
        if self.cross_attention:
            cross = CrossAttention(self.num_heads, self.dtype, name="cross_attn")
            x = constrain(x + cross(AffineNorm(name="norm_cross")(x), c.tokens, c.mask), TOKENS)
        return constrain(x + gate_m * mlp(norm_m(x)), TOKENS)


class FinalLayer(nn.Module):
    """A norm, modulated where the blocks' are, then a zero-initialised Linear to the pixels of a patch."""

    features: int
    modulation: str

    @nn.compact
    def __call__(self, x: Array, c: Condition) -> Array:
        if self.modulation == "none":
            x = AffineNorm(name="norm_final")(x)
        else:
            shift, scale = Modulation(2, name="adaLN_modulation")(c.vector)
            x = modulated_norm(x, shift, scale)
        return Linear(self.features, kernel_init=nn.initializers.zeros, name="linear")(x)


class DiT(nn.Module):
    """The denoiser: predicts epsilon (or x_0, or v) and, with 2C output channels, the variance's interpolation.

    Call with x_t [B, H, W, C] float32, t [B] int32 in [0, num_timesteps), and raw conditions (`models.conditioners`),
    of which a label is not read where num_classes is None; returns [B, H, W, out_channels] float32.
    """

    depth: int
    width: int
    num_heads: int
    patch_size: int
    num_classes: int | None  # None: unconditional
    out_channels: int
    conditioning: tuple[str, ...] = ("adaln_zero",)  # of "adaln_zero", "adaln", "cross_attention", "in_context"
    sequences: tuple[tuple[str, TextShape | None], ...] = ()  # other conditions of tokens, and their trained encoders
    long_skips: bool = False
    mlp_ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32  # of the matmuls; norms, modulation and the residual stream stay float32
    scan_blocks: bool = False  # these three: see `config.ComputeConfig`
    remat: str = "none"
    attention: str = "xla"

    @nn.compact
    def __call__(self, x_t: Array, t: Array, conditions: Conditions | Array) -> Array:
        conditions = as_conditions(conditions)
        x = self.trunk(with_spatial(x_t, conditions), t, conditions, self.patch_size**2 * self.out_channels)
        return unpatchify(x, self.patch_size, x_t.shape[1])

    def trunk(self, x: Array, t: Array, conditions: Conditions, num_outputs: int) -> Array:
        """Returns [B, T, num_outputs] of the patches of x [B, H, W, C]: all of the network but what they mean."""
        _, height, width, _ = x.shape
        p = self.patch_size
        x = Linear(self.width, name="x_embedder")(patchify(x, p))  # [B, T, D]
        x = constrain(x + sincos_2d(height // p, width // p, self.width), TOKENS)
        return self._blocks(x, self._condition(t, conditions), num_outputs)

    def _condition(self, t: Array, conditions: Conditions) -> Condition:
        parts = [TimestepEmbedder(self.width, name="t_embedder")(t)]  # [B, D] each
        if self.num_classes is not None:
            parts.append(LabelEmbedder(self.num_classes, self.width, name="y_embedder")(conditions["label"]))
        read = [Condition(vector=sum(parts), tokens=jnp.stack(parts, axis=1))]
        has_vector = any(way.startswith("adaln") for way in self.conditioning)
        has_tokens = not {"cross_attention", "in_context"}.isdisjoint(self.conditioning)
        widths = self.width if has_vector else None, self.width if has_tokens else None
        for name, encoder in self.sequences:
            conditioner = SequenceConditioner(encoder, *widths, self.dtype, self.remat, name=name)
            read.append(conditioner(conditions[name]))
        return join_conditions(read)

    def _blocks(self, x: Array, c: Condition, num_outputs: int) -> Array:
        modulation = next((m for m in self.conditioning if m.startswith("adaln")), "none")
        num_tokens, mask = x.shape[1], None
        if "in_context" in self.conditioning:
            x = jnp.concatenate([x, c.tokens], axis=1)
            if c.mask is not None:
                mask = jnp.concatenate([jnp.ones((len(x), num_tokens), bool), c.mask], axis=1)
        block = functools.partial(
            rematerialized(DiTBlock, self.remat, in_scan=self.scan_blocks),
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            modulation=modulation,
            cross_attention="cross_attention" in self.conditioning,
            dtype=self.dtype,
            attention=self.attention,
        )
        names = [f"blocks_{i}" for i in range(self.depth)]
        if self.scan_blocks and not self.is_initializing():
            # The parameters of a block keep names of their own, so that checkpoints and sharding rules know of no loop.
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(self.variables["params"][n] for n in names))

            def body(x: Array, params: Params) -> tuple[Array, None]:
                return block(parent=None, name=names[0]).apply({"params": params}, x, c, mask), None

            x, _ = jax.lax.scan(body, x, stacked)
        else:
            skips = []
            for i, name in enumerate(names):
                skip = skips.pop() if self.long_skips and 2 * i >= self.depth + self.depth % 2 else None
                x = block(name=name)(x, c, mask, skip)
                if self.long_skips and 2 * i < self.depth - 1:
                    skips.append(x)
        return FinalLayer(num_outputs, modulation, name="final_layer")(x[:, :num_tokens], c)


class DiTClassifier(DiT):
    """The classifier of noised images (arXiv:2105.05233, section 4.1) on a DiT's trunk: logits, the mean over patches.

    Call with x_t and t as a DiT; returns [B, out_channels] float32, a channel a class.
    """

    @nn.compact
    def __call__(self, x_t: Array, t: Array) -> Array:
        return self.trunk(x_t, t, {}, self.out_channels).mean(axis=1)
