"""The KL autoencoders of LDM at 256 x 256 px (arXiv:2112.10752, table 8), one a name: f4, f8, f16 or f32.

dit-jax train --config=configs/autoencoder_kl.py:f8 --workdir=DIR
"""

from ml_collections import ConfigDict

# Multipliers of the channels at each level, levels with attention, latent channels. Stable Diffusion's is an f8.
ARCHITECTURES = {
    "f4": ((1, 2, 4), (), 3),  # 55.31 M parameters
    "f8": ((1, 2, 4, 4), (), 4),  # 83.65 M
    "f16": ((1, 1, 2, 2, 4), (4,), 16),  # 69.61 M
    "f32": ((1, 1, 2, 2, 4, 4), (4, 5), 64),  # 103.88 M
}


def get_config(name: str = "f8") -> ConfigDict:
    """Returns the config of a name."""
    if name not in ARCHITECTURES:
        raise ValueError(f"{name!r} must be one of {', '.join(ARCHITECTURES)}")
    channel_multipliers, attention_levels, latent_channels = ARCHITECTURES[name]
    config = ConfigDict()
    config.stage = "autoencoder"
    config.data = ConfigDict({"name": "imagenet2012", "image_size": 256, "eval_split": "validation"})
    config.autoencoder = ConfigDict(
        {
            "channel_multipliers": channel_multipliers,
            "attention_levels": attention_levels,
            "latent_channels": latent_channels,
        }
    )
    # Adam(0.5, 0.9) at 4.5e-6 per image of the batch (LDM code).
    config.optimizer = ConfigDict({"learning_rate": 4.5e-6 * 96, "b1": 0.5, "b2": 0.9})
    config.training = ConfigDict({"num_train_steps": 250_000, "global_batch_size": 96, "ema_decay": None})
    return config
