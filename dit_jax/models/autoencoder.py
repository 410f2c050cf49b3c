"""The convolutional autoencoders of LDM (arXiv:2112.10752, section 3.1 and appendix G), KL-regularised or quantized.

    KL: images [B, H, W, C] --encode--> moments [B, H/f, W/f, 2c] --sample--> z [B, H/f, W/f, c] --decode--> images
    VQ: images [B, H, W, C] --encode--> z [B, H/f, W/f, c] --quantize, decode--> images

Moments are the posterior's mean and log-variance, in this order along the channels; a quantized autoencoder's are z
alone. f = 2^(levels - 1). Latents are diffused before quantization: decoding quantizes (section 3.1 of LDM).
"""

from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dit_jax.models.quantizer import Codebook, straight_through
from dit_jax.models.tiles import apply_by_tiles
from dit_jax.nn.constraints import IMAGES, constrain
from dit_jax.nn.remat import rematerialized
from dit_jax.nn.resnet import AttentionBlock, Downsample, ResBlock, Upsample, conv, group_norm
from dit_jax.types import Array, Params, PRNGKey

FROZEN_WITH_ENCODER = ("encoder", "quant_conv", "quantize")  # the parameters that decide the latents
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # LDM code: keeps the posterior's variance finite early in training


def split_moments(moments: Array) -> tuple[Array, Array]:
    """Returns mean and log-variance [..., c], the latter clamped, from moments [..., 2c]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)


def posterior_sample(moments: Array, noise: Array) -> Array:
    """Returns z = mean + std * noise [..., c] of the posterior N(mean, std^2), of standard normal noise [..., c]."""
    mean, log_variance = split_moments(moments)
    return mean + jnp.exp(0.5 * log_variance) * noise


def latents_of(moments: Array, channels: int, noise: Array) -> Array:
    """Returns latents [..., c]: a sample of the posterior, or the moments themselves where they are latents (VQ)."""
    return moments if moments.shape[-1] == channels else posterior_sample(moments, noise)


def scaled(z: Array, scale: float, shift: float = 0.0) -> Array:
    """Returns an autoencoder's latents as diffusion works with them, at unit variance."""
    return scale * (z - shift if shift else z)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    num_groups: int

    @nn.compact
    def __call__(self, h: Array) -> Array:
        h = ResBlock(h.shape[-1], self.num_groups, name="block_1")(h)
        h = AttentionBlock(self.num_groups, name="attn_1")(h)
        return ResBlock(h.shape[-1], self.num_groups, name="block_2")(h)


class Encoder(nn.Module):
    """Images [B, H, W, C] to features [B, H/f, W/f, out_channels]."""

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    num_groups: int
    remat: str
    out_channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        res_block, attention_block = (rematerialized(layer, self.remat) for layer in (ResBlock, AttentionBlock))
        h = constrain(conv(self.base_channels, "conv_in")(x), IMAGES)
        for level, multiplier in enumerate(self.channel_multipliers):
            for i in range(self.num_res_blocks):
                h = res_block(self.base_channels * multiplier, self.num_groups, name=f"down_{level}_block_{i}")(h)
                if level in self.attention_levels:
                    h = attention_block(self.num_groups, name=f"down_{level}_attn_{i}")(h)
            if level < len(self.channel_multipliers) - 1:
                h = Downsample(name=f"down_{level}_downsample")(h)
        h = Middle(self.num_groups, name="mid")(h)
        return conv(self.out_channels, "conv_out")(nn.swish(group_norm(self.num_groups, "norm_out")(h)))


class Decoder(nn.Module):
    """Latents [B, h, w, c] to images [B, f h, f w, out_channels], and the features that its last layer takes."""

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    num_groups: int
    remat: str
    out_channels: int

    @nn.compact
    def __call__(self, z: Array) -> tuple[Array, Array]:
        res_block, attention_block = (rematerialized(layer, self.remat) for layer in (ResBlock, AttentionBlock))
        h = constrain(conv(self.base_channels * self.channel_multipliers[-1], "conv_in")(z), IMAGES)
        h = Middle(self.num_groups, name="mid")(h)
        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            for i in range(self.num_res_blocks + 1):
                h = res_block(self.base_channels * multiplier, self.num_groups, name=f"up_{level}_block_{i}")(h)
                if level in self.attention_levels:
                    h = attention_block(self.num_groups, name=f"up_{level}_attn_{i}")(h)
            if level > 0:
                h = Upsample(name=f"up_{level}_upsample")(h)
        features = nn.swish(group_norm(self.num_groups, "norm_out")(h))
        return conv(self.out_channels, "conv_out")(features), features


class Reconstruction(NamedTuple):
    """What one pass through an autoencoder gives."""

    images: Array  # [B, H, W, C], not clipped
    features: Array  # [B, H, W, base_channels]: what the decoder's last layer made the images of
    moments: Array  # of the posterior [B, H/f, W/f, 2c]; VQ: the latents [B, H/f, W/f, c]
    codes: Array | None  # VQ: the nearest codes [B, H/f, W/f, c]
    indices: Array | None  # VQ: theirs [B, H/f, W/f] int32


class Autoencoder(nn.Module):
    """Encoder and decoder with the 1x1 convolutions around the latent.

    Methods: `encode(images) -> moments`, `decode(z) -> images`; a call encodes, samples with `key` (VQ: quantizes) and
    decodes. Images are float32 in [-1, 1].
    """

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    latent_channels: int
    num_groups: int
    image_channels: int
    num_codes: int | None = None  # of a VQ autoencoder; None: KL-regularised
    frozen_encoder: bool = False  # no gradient reaches the encoder, nor the codes
    remat: str = "none"  # of the blocks at each level (`config.ComputeConfig`)

    def setup(self):
        shape = (
            self.base_channels,
            self.channel_multipliers,
            self.num_res_blocks,
            self.attention_levels,
            self.num_groups,
            self.remat,
        )
        num_moments = (1 if self.num_codes else 2) * self.latent_channels
        self.encoder = Encoder(*shape, out_channels=num_moments)
        self.decoder = Decoder(*shape, out_channels=self.image_channels)
        self.quant_conv = conv(num_moments, kernel=1)
        self.post_quant_conv = conv(self.latent_channels, kernel=1)
        if self.num_codes:
            self.quantize = Codebook(self.num_codes, self.latent_channels)

    def encode(self, images: Array) -> Array:
        """Returns the posterior's moments [B, H/f, W/f, 2c]; of a VQ autoencoder the latents [B, H/f, W/f, c]."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Array) -> Array:
        """Returns images [B, H, W, C], not clipped."""
        if self.num_codes:
            z, _ = self.quantize(z)
        return self.decoder(self.post_quant_conv(z))[0]

    def __call__(self, images: Array, key: PRNGKey | None, noise: Array | None = None) -> Reconstruction:
        """Returns reconstructions of a posterior sample (without a key: the mean; VQ: codes), and what made them.

        noise: [B, H/f, W/f, c] standard normal, of that sample; instead of a key.
        """
        moments = self.encode(images)
        codes = indices = None
        if self.num_codes:
            codes, indices = self.quantize(moments)
        if self.frozen_encoder:
            moments, codes = jax.lax.stop_gradient((moments, codes))
        if self.num_codes:
            z = straight_through(moments, codes)
        else:
            noise = noise if key is None else jax.random.normal(key, split_moments(moments)[0].shape)
            z = split_moments(moments)[0] if noise is None else posterior_sample(moments, noise)
        return Reconstruction(*self.decoder(self.post_quant_conv(z)), moments, codes, indices)


@flax.struct.dataclass
class Codec:
    """A trained autoencoder, with latents at the unit variance that diffusion works in: (z - shift) * scale."""

    params: Params
    module: Autoencoder = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)
    shift: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def factor(self) -> int:
        """f, the pixels that a latent is wide."""
        return 2 ** (len(self.module.channel_multipliers) - 1)

    def moments(self, images: Array, tile: int | None = None) -> Array:
        """Returns what a latent cache holds, unscaled: the posterior's moments [B, H/f, W/f, 2c]; VQ: the latents.

        tile: of larger images the side, in latents, of the overlapping tiles that they are encoded by; None: whole.
        """
        moments = self._apply("encode", images, tile, self.factor, 1)
        if self.module.num_codes:
            return moments
        return jnp.concatenate(split_moments(moments), axis=-1)  # clamped

    def encode(self, images: Array, tile: int | None = None) -> Array:
        """Returns scaled latents [B, H/f, W/f, c]: the posterior's mean; VQ: not quantized. tile: see `moments`."""
        return scaled(self.moments(images, tile)[..., : self.module.latent_channels], self.scale, self.shift)

    def decode(self, latents: Array, tile: int | None = None) -> Array:
        """Returns images [B, H, W, C] of scaled latents; larger ones by overlapping tiles of `tile` latents a side."""
        z = latents / self.scale
        return self._apply("decode", z + self.shift if self.shift else z, tile, 1, self.factor)

    def _apply(self, method: str, x: Array, tile: int | None, in_factor: int, out_factor: int) -> Array:
        def function(x: Array) -> Array:
            return self.module.apply({"params": self.params}, x, method=method)

        return function(x) if tile is None else apply_by_tiles(function, x, tile, in_factor, out_factor)
