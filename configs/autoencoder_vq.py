"""The VQ autoencoders of LDM at 256 x 256 px (arXiv:2112.10752, table 8), one a name: f4, f8, f8-256 or f16.

dit-jax train --config=configs/autoencoder_vq.py:f4 --workdir=DIR

The paper's, trained on OpenImages and measured on ImageNet's validation images:

    f4      8,192 codes   rFID 0.58  PSNR 27.43 dB  533K steps
    f8      16,384 codes  rFID 1.14  PSNR 23.07 dB  971K steps
    f8-256  256 codes     rFID 1.49  PSNR 22.35 dB  1,609K steps
    f16     16,384 codes  rFID 5.15  PSNR 20.83 dB  1,101K steps
"""

from ml_collections import ConfigDict

# Multipliers of the channels at each level, levels with attention, latent channels, codes; then the discriminator's
# layers, start and weight; steps.
ARCHITECTURES = {
    "f4": ((1, 2, 4), (), 3, 8192, (3, 0, 0.75), 533_000),  # 55.32 M parameters
    "f8": ((1, 2, 2, 4), (3,), 4, 16_384, (2, 1, 0.6), 971_000),  # 67.72 M
    "f8-256": ((1, 2, 2, 4), (3,), 4, 256, (2, 250_001, 0.75), 1_609_000),  # 67.65 M
    "f16": ((1, 1, 2, 2, 4), (4,), 8, 16_384, (2, 250_001, 0.75), 1_101_000),  # 69.59 M
}


def get_config(name: str = "f4") -> ConfigDict:
    """Returns the config of a name."""
    if name not in ARCHITECTURES:
        raise ValueError(f"{name!r} must be one of {', '.join(ARCHITECTURES)}")
    multipliers, attention_levels, channels, num_codes, discriminator, num_train_steps = ARCHITECTURES[name]
    num_layers, start_step, weight = discriminator
    config = ConfigDict()
    config.stage = "autoencoder"
    config.data = ConfigDict({"name": "imagenet2012", "image_size": 256, "eval_split": "validation"})
    config.autoencoder = ConfigDict(
        {
            "channel_multipliers": multipliers,
            "attention_levels": attention_levels,
            "latent_channels": channels,
            "perceptual_weight": 1.0,
            "codebook": {"num_codes": num_codes},
            "discriminator": {"num_layers": num_layers, "start_step": start_step, "weight": weight},
        }
    )
    # Adam(0.5, 0.9) at 4.5e-6 per image of the batch (LDM code).
    config.optimizer = ConfigDict({"learning_rate": 4.5e-6 * 64, "b1": 0.5, "b2": 0.9})
    config.training = ConfigDict({"num_train_steps": num_train_steps, "global_batch_size": 64, "ema_decay": None})
    return config
