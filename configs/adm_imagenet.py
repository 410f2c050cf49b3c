"""ADM's class-conditional U-Nets on ImageNet's pixels (arXiv:2105.05233, table 11), without an autoencoder: 128 or 256.

dit-jax train --config=configs/adm_imagenet.py:128 --workdir=DIR

The paper's FID-50K, 250 steps and no guidance: 5.91 at 128 x 128 px (422 M parameters), 10.94 at 256 x 256 (554 M).
"""

from ml_collections import ConfigDict

# Multipliers of the channels at each level, levels with attention, steps.
ARCHITECTURES = {
    "128": ((1, 1, 2, 3, 4), (2, 3, 4), 4_360_000),
    "256": ((1, 1, 2, 2, 4, 4), (3, 4, 5), 1_980_000),
}


def get_config(name: str = "256") -> ConfigDict:
    """Returns the config of a name."""
    if name not in ARCHITECTURES:
        raise ValueError(f"{name!r} must be one of {', '.join(ARCHITECTURES)}")
    multipliers, attention_levels, num_train_steps = ARCHITECTURES[name]
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "imagenet2012", "image_size": int(name), "eval_split": "validation"})
    config.unet = ConfigDict(
        {
            "base_channels": 256,
            "channel_multipliers": multipliers,
            "attention_levels": attention_levels,
            "head_channels": 64,
            "scale_shift_norm": True,
            "resblock_updown": True,
            "label": "vector",
            "label_dropout": 0.0,  # the paper guides by a classifier
        }
    )
    config.sampling = ConfigDict({"cfg_scale": 1.0, "x_0_limit": 1.0})
    config.training = ConfigDict({"num_train_steps": num_train_steps})
    return config
