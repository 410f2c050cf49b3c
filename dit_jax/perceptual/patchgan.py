"""The patch discriminator (PatchGAN, arXiv:1611.07004) and the hinge loss (arXiv:1705.02894), as LDM trains with them.

A logit judges a patch of the image (70 x 70 px with three layers). The batch statistics are of the global batch:
under `jit` a mean over a sharded axis is over all devices.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.config import DiscriminatorConfig
from dit_jax.nn.convolution import convolve
from dit_jax.types import Array, PRNGKey


def scale_init(key: PRNGKey, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Returns N(1, 0.02): of BatchNorm's scales (pix2pix, section 6.2)."""
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class PatchDiscriminator(nn.Module):
    """Images [B, H, W, C] in [-1, 1] to logits [B, h, w, 1], above 0 for real ones; h = H / 2^num_layers - 2.

    Its statistics (collection `batch_stats`) are those of the batch in training, and tracked beside.
    """

    num_layers: int
    base_channels: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = functools.partial(
            nn.Conv,
            kernel_size=(4, 4),
            padding=1,
            kernel_init=nn.initializers.normal(0.02),  # pix2pix, section 6.2
            conv_general_dilated=convolve,
        )
        h = conv(self.base_channels, strides=2, name="conv_in")(x)
        for i in range(1, self.num_layers + 1):
            h = nn.leaky_relu(h, 0.2)
            channels = self.base_channels * min(2**i, 8)
            strides = 2 if i < self.num_layers else 1
            h = conv(channels, strides=strides, use_bias=False, name=f"conv_{i}")(h)
            h = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, scale_init=scale_init, name=f"norm_{i}")(h)
        return conv(1, name="conv_out")(nn.leaky_relu(h, 0.2))


def build_discriminator(discriminator: DiscriminatorConfig) -> PatchDiscriminator:
    """Returns the discriminator of a config."""
    return PatchDiscriminator(discriminator.num_layers, discriminator.base_channels)


def hinge_loss(real: Array, fake: Array) -> Array:
    """Returns what the discriminator minimises, a scalar, of its logits for images and for reconstructions."""
    return 0.5 * (jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + fake)))


def generator_loss(fake: Array) -> Array:
    """Returns what the autoencoder minimises, a scalar, of the logits for its reconstructions."""
    return -jnp.mean(fake)


def adaptive_weight(likelihood_gradient: Array, generator_gradient: Array) -> Array:
    """Returns the factor of the generator's loss: the ratio of two gradients' norms (VQGAN, equation 7).

    Both are with respect to the kernel of the decoder's last layer.
    """
    norms = jnp.linalg.norm(likelihood_gradient), jnp.linalg.norm(generator_gradient)
    return jnp.clip(norms[0] / (norms[1] + 1e-4), 0.0, 1e4)
