"""The KL-regularised convolutional autoencoder of LDM (arXiv:2112.10752, section 3.1 and appendix G).

    images [B, H, W, C] --encode--> moments [B, H/f, W/f, 2c] --sample--> z [B, H/f, W/f, c] --decode--> images

Moments are the posterior's mean and log-variance, in this order along the channels. f = 2^(levels - 1).
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dit_jax.nn.resnet import AttentionBlock, Downsample, ResBlock, Upsample, conv, group_norm
from dit_jax.types import Array, Params, PRNGKey

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # LDM code: keeps the posterior's variance finite early in training


def split_moments(moments: Array) -> tuple[Array, Array]:
    """Returns mean and log-variance [..., c], the latter clamped, from moments [..., 2c]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)


def sample_posterior(moments: Array, key: PRNGKey) -> Array:
    """Returns a draw z = mean + std * noise [..., c] of the posterior N(mean, std^2)."""
    mean, log_variance = split_moments(moments)
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)


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
    out_channels: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = conv(self.base_channels, "conv_in")(x)
        for level, multiplier in enumerate(self.channel_multipliers):
            for i in range(self.num_res_blocks):
                h = ResBlock(self.base_channels * multiplier, self.num_groups, name=f"down_{level}_block_{i}")(h)
                if level in self.attention_levels:
                    h = AttentionBlock(self.num_groups, name=f"down_{level}_attn_{i}")(h)
            if level < len(self.channel_multipliers) - 1:
                h = Downsample(name=f"down_{level}_downsample")(h)
        h = Middle(self.num_groups, name="mid")(h)
        return conv(self.out_channels, "conv_out")(nn.swish(group_norm(self.num_groups, "norm_out")(h)))


class Decoder(nn.Module):
    """Latents [B, h, w, c] to images [B, f h, f w, out_channels]."""

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    num_groups: int
    out_channels: int

    @nn.compact
    def __call__(self, z: Array) -> Array:
        h = conv(self.base_channels * self.channel_multipliers[-1], "conv_in")(z)
        h = Middle(self.num_groups, name="mid")(h)
        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            for i in range(self.num_res_blocks + 1):
                h = ResBlock(self.base_channels * multiplier, self.num_groups, name=f"up_{level}_block_{i}")(h)
                if level in self.attention_levels:
                    h = AttentionBlock(self.num_groups, name=f"up_{level}_attn_{i}")(h)
            if level > 0:
                h = Upsample(name=f"up_{level}_upsample")(h)
        return conv(self.out_channels, "conv_out")(nn.swish(group_norm(self.num_groups, "norm_out")(h)))


class Autoencoder(nn.Module):
    """Encoder and decoder with the 1x1 convolutions around the latent.

    Methods: `encode(images) -> moments`, `decode(z) -> images`; a call encodes, samples with `key` and decodes.
    Images are float32 in [-1, 1].
    """

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    latent_channels: int
    num_groups: int
    image_channels: int

    def setup(self):
        shape = (
            self.base_channels,
            self.channel_multipliers,
            self.num_res_blocks,
            self.attention_levels,
            self.num_groups,
        )
        self.encoder = Encoder(*shape, out_channels=2 * self.latent_channels)
        self.decoder = Decoder(*shape, out_channels=self.image_channels)
        self.quant_conv = conv(2 * self.latent_channels, kernel=1)
        self.post_quant_conv = conv(self.latent_channels, kernel=1)

    def encode(self, images: Array) -> Array:
        """Returns the posterior's moments [B, H/f, W/f, 2c]."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Array) -> Array:
        """Returns images [B, H, W, C], not clipped."""
        return self.decoder(self.post_quant_conv(z))

    def __call__(self, images: Array, key: PRNGKey) -> tuple[Array, Array]:
        """Returns reconstructions of one posterior sample, and the moments."""
        moments = self.encode(images)
        return self.decode(sample_posterior(moments, key)), moments


@flax.struct.dataclass
class Codec:
    """A trained autoencoder, with latents at the unit variance that diffusion works in."""

    params: Params
    module: Autoencoder = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)

    def moments(self, images: Array) -> Array:
        """Returns the posterior's moments [B, H/f, W/f, 2c], unscaled, as a latent cache holds them."""
        moments = self.module.apply({"params": self.params}, images, method="encode")
        return jnp.concatenate(split_moments(moments), axis=-1)  # clamped

    def encode(self, images: Array) -> Array:
        """Returns scaled latents [B, H/f, W/f, c], the posterior's mean."""
        return self.scale * split_moments(self.moments(images))[0]

    def decode(self, latents: Array) -> Array:
        """Returns images [B, H, W, C] of scaled latents."""
        return self.module.apply({"params": self.params}, latents / self.scale, method="decode")
