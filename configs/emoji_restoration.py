"""Restoration of emoji at 32 x 32 pixels, by a U-Net that reads beside x_t what is left of the image.

./launch/emoji.sh && ./launch/lpips_weights.sh
dit-jax train --config=configs/emoji_restoration.py:super_resolution --workdir=runs/super_resolution
dit-jax evaluate --workdir=runs/super_resolution

Names: `super_resolution`, from 8 x 8 pixels, and `inpainting`, of a masked image.
"""

from ml_collections import ConfigDict

SPATIAL = {"super_resolution": {"kind": "low_resolution", "factor": 4}, "inpainting": {"kind": "inpainting"}}


def get_config(name: str = "super_resolution") -> ConfigDict:
    """Returns the config of one of the names above."""
    if name not in SPATIAL:
        raise ValueError(f"{name!r} must be one of {', '.join(SPATIAL)}")
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "data/emoji", "image_size": 32, "num_classes": 9})
    config.conditions = ConfigDict({"spatial": SPATIAL[name]})
    # Detail is local: after equal minutes a DiT of these pixels' patches restores less of it.
    config.unet = ConfigDict(
        {
            "base_channels": 32,
            "channel_multipliers": (1, 2, 3),
            "attention_levels": (2,),
            "num_res_blocks": 1,
            "num_heads": 2,
            "num_groups": 8,
            "scale_shift_norm": True,
            "class_conditional": False,
        }
    )
    # A small network learns to predict pixels sooner than the noise on them.
    config.diffusion = ConfigDict({"schedule": "cosine", "prediction": "x_0", "variance": "fixed_small"})
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100, "max_grad_norm": 1.0}
    )
    config.training = ConfigDict(
        {
            "num_train_steps": 1400,
            "global_batch_size": 16,
            "ema_decay": 0.99,
            "log_every_steps": 50,
            "eval_every_steps": 700,
            "checkpoint_every_steps": 350,
            "num_eval_examples": 400,
        }
    )
    config.sampling = ConfigDict(
        {"sampler": "ddim", "num_steps": 25, "cfg_scale": 1.0, "x_0_limit": 1.0, "batch_size": 50}
    )
    return config
