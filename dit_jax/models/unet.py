"""The U-Net of LDM (arXiv:2112.10752, section 3.2 and appendix E), which is ADM's (arXiv:2105.05233, section 3) with
transformer blocks that attend to tokens of a condition.

    x_t [B, H, W, C] --conv_in--> levels down, each at half the resolution of the one before --middle--> levels up

Every block on the way up takes, beside the features from below, those that a block on the way down made at its
resolution, the last first.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from dit_jax.models.conditioners import Condition, SequenceConditioner, as_conditions, join_conditions, with_spatial
from dit_jax.models.text_encoder import TextShape
from dit_jax.nn.constraints import IMAGES, constrain
from dit_jax.nn.embeddings import LabelEmbedder, TimestepEmbedder
from dit_jax.nn.remat import rematerialized
from dit_jax.nn.resnet import (
    RES_BLOCK_EPSILON,
    ConditionedResBlock,
    Downsample,
    Upsample,
    conv,
    conv_init,
    doubled,
    group_norm,
    halved,
)
from dit_jax.nn.spatial_attention import SpatialAttention, SpatialTransformer
from dit_jax.types import Array, Conditions

EMBEDDING_RATIO = 4  # width of the conditioning vector over base_channels (ADM's code)


class UNet(nn.Module):
    """The denoiser: predicts epsilon (or x_0, or v) and, with 2C output channels, the variance's interpolation.

    Call with x_t [B, H, W, C] float32, H and W divisible by 2^(levels - 1), t [B] int32 in [0, num_timesteps), and raw
    conditions (`models.conditioners`), of which a label is not read where num_classes is None; returns
    [B, H, W, out_channels] float32. The fields without a comment are `config.UNetConfig`'s.
    """

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    num_heads: int | None
    head_channels: int | None
    out_channels: int
    context_width: int | None = None
    transformer_depth: int = 1
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    num_classes: int | None = None  # None: unconditional
    label: str = "context"
    sequences: tuple[tuple[str, TextShape | None], ...] = ()  # other conditions of tokens, and their trained encoders
    num_groups: int = 32
    dtype: jnp.dtype = jnp.float32  # of the matmuls and convolutions; norms and the residual stream stay float32
    remat: str = "none"  # these two: see `config.ComputeConfig`
    attention: str = "xla"

    @nn.compact
    def __call__(self, x_t: Array, t: Array, conditions: Conditions | Array) -> Array:
        _, height, width, _ = x_t.shape
        factor = 2 ** (len(self.channel_multipliers) - 1)
        if height % factor or width % factor:
            raise ValueError(f"{height} x {width} must be divisible by {factor}, the U-Net's downsampling")
        conditions = as_conditions(conditions)
        c = self._condition(t, conditions)
        widths = [self.base_channels * multiplier for multiplier in self.channel_multipliers]
        h = constrain(conv(self.base_channels, "conv_in")(with_spatial(x_t, conditions)), IMAGES)
        skips = [h]
        for level, channels in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = self._res_block(h, c, channels, f"down_{level}_block_{i}")
                h = self._attend(h, c, f"down_{level}_attn_{i}") if level in self.attention_levels else h
                skips.append(h)
            if level < len(widths) - 1:
                h = self._resize(h, c, f"down_{level}_downsample", halved)
                skips.append(h)
        h = self._res_block(h, c, widths[-1], "mid_block_1")
        h = self._attend(h, c, "mid_attn_1")
        h = self._res_block(h, c, widths[-1], "mid_block_2")
        for level, channels in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                h = self._res_block(jnp.concatenate([h, skips.pop()], axis=-1), c, channels, f"up_{level}_block_{i}")
                h = self._attend(h, c, f"up_{level}_attn_{i}") if level in self.attention_levels else h
            if level > 0:
                h = self._resize(h, c, f"up_{level}_upsample", doubled)
        h = nn.swish(group_norm(self.num_groups, "norm_out", RES_BLOCK_EPSILON)(h))
        return conv(self.out_channels, "conv_out", kernel_init=nn.initializers.zeros)(h)

    def _condition(self, t: Array, conditions: Conditions) -> Condition:
        width = EMBEDDING_RATIO * self.base_channels
        read = [Condition(TimestepEmbedder(width, self.base_channels, conv_init, name="t_embedder")(t), None)]
        if self.num_classes is not None:
            is_vector = self.label == "vector"
            embedder = LabelEmbedder(self.num_classes, width if is_vector else self.context_width, name="y_embedder")
            label = embedder(conditions["label"])
            read.append(Condition(label, None) if is_vector else Condition(None, label[:, None]))
        widths = (width, None) if self.context_width is None else (None, self.context_width)
        for name, encoder in self.sequences:
            conditioner = SequenceConditioner(encoder, *widths, self.dtype, self.remat, name=name)
            read.append(conditioner(conditions[name]))
        return join_conditions(read)

    def _res_block(self, h: Array, c: Condition, channels: int, name: str, resize=None) -> Array:
        block = rematerialized(ConditionedResBlock, self.remat)
        return block(channels, self.num_groups, self.scale_shift_norm, resize, self.dtype, name=name)(h, c.vector)

    def _attend(self, h: Array, c: Condition, name: str) -> Array:
        num_heads = self.num_heads or h.shape[-1] // self.head_channels
        settings = {"dtype": self.dtype, "implementation": self.attention, "name": name}
        if self.context_width is None:
            return rematerialized(SpatialAttention, self.remat)(num_heads, self.num_groups, **settings)(h)
        block = rematerialized(SpatialTransformer, self.remat)
        return block(self.transformer_depth, num_heads, self.num_groups, **settings)(h, c.tokens, c.mask)

    def _resize(self, h: Array, c: Condition, name: str, resize) -> Array:
        if self.resblock_updown:
            return self._res_block(h, c, h.shape[-1], name, resize)
        # Of an even size, zeros above and left alone do what a row and a column on every side do (padding=1).
        layer = functools.partial(Downsample, (1, 0)) if resize is halved else Upsample
        return layer(dtype=self.dtype, name=name)(h)
