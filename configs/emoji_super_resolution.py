"""4x super-resolution of emoji, 8 x 8 to 32 x 32 pixels, by a DiT in pixels that reads the small image beside x_t.

./launch/emoji.sh
dit-jax train --config=configs/emoji_super_resolution.py --workdir=runs/super_resolution
dit-jax evaluate --workdir=runs/super_resolution
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "data/emoji", "image_size": 32, "num_classes": 9})
    config.conditions = ConfigDict({"spatial": {"kind": "low_resolution", "factor": 4}})
    config.dit = ConfigDict({"depth": 6, "width": 128, "num_heads": 2, "patch_size": 4, "class_conditional": False})
    # A small network learns to predict pixels sooner than the noise on them, which fills all of a patch's dimensions.
    config.diffusion = ConfigDict({"schedule": "cosine", "prediction": "x_0", "variance": "fixed_small"})
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100, "max_grad_norm": 1.0}
    )
    config.training = ConfigDict(
        {
            "num_train_steps": 3000,
            "global_batch_size": 16,
            "ema_decay": 0.995,
            "log_every_steps": 100,
            "eval_every_steps": 1000,
            "checkpoint_every_steps": 1000,
            "num_eval_examples": 400,
        }
    )
    config.sampling = ConfigDict(
        {"sampler": "ddim", "num_steps": 25, "cfg_scale": 1.0, "x_0_limit": 1.0, "batch_size": 50}
    )
    return config
