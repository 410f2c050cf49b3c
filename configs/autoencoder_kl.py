"""The KL autoencoders of LDM at 256 x 256 px (arXiv:2112.10752, table 8), one a name: f4, f8, f16 or f32.

dit-jax train --config=configs/autoencoder_kl.py:f8 --workdir=DIR

The paper's, trained on OpenImages and measured on ImageNet's validation images:

    f4   rFID 0.27  PSNR 27.53 dB  177K steps
    f8   rFID 0.90  PSNR 24.19 dB  247K steps
    f16  rFID 0.87  PSNR 24.08 dB  443K steps
    f32  rFID 2.04  PSNR 22.27 dB  407K steps
"""

from ml_collections import ConfigDict

# Multipliers of the channels at each level, levels with attention, latent channels; steps. Stable Diffusion's is an f8.
ARCHITECTURES = {
    "f4": ((1, 2, 4), (), 3, 177_000),  # 55.31 M parameters
    "f8": ((1, 2, 4, 4), (), 4, 247_000),  # 83.65 M
    "f16": ((1, 1, 2, 2, 4), (4,), 16, 443_000),  # 69.61 M
    "f32": ((1, 1, 2, 2, 4, 4), (4, 5), 64, 407_000),  # 103.88 M
}


def get_config(name: str = "f8") -> ConfigDict:
    """Returns the config of a name."""
    if name not in ARCHITECTURES:
        raise ValueError(f"{name!r} must be one of {', '.join(ARCHITECTURES)}")
    channel_multipliers, attention_levels, latent_channels, num_train_steps = ARCHITECTURES[name]
    config = ConfigDict()
    config.stage = "autoencoder"
    config.data = ConfigDict({"name": "imagenet2012", "image_size": 256, "eval_split": "validation"})
    config.autoencoder = ConfigDict(
        {
            "channel_multipliers": channel_multipliers,
            "attention_levels": attention_levels,
            "latent_channels": latent_channels,
            "perceptual_weight": 1.0,
            "learn_log_variance": True,
            "kl_weight": 1e-6,
            "discriminator": {"start_step": 50_001, "weight": 0.5},
        }
    )
    # Adam(0.5, 0.9) at 4.5e-6 per image of the batch (LDM code).
    config.optimizer = ConfigDict({"learning_rate": 4.5e-6 * 96, "b1": 0.5, "b2": 0.9})
    config.training = ConfigDict({"num_train_steps": num_train_steps, "global_batch_size": 96, "ema_decay": None})
    return config
