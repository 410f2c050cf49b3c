"""Semantic synthesis: emoji scenes for a map of their categories, at 32 x 32 pixels, by a DiT that reads it beside x_t.

./launch/emoji_scenes.sh
dit-jax train --config=configs/emoji_semantic.py --workdir=runs/semantic
dit-jax sample --workdir=runs/semantic --map=data/emoji_scenes/maps/test/00000.png
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "data/emoji_scenes", "image_size": 32, "num_classes": 1, "map_field": "map"})
    config.conditions = ConfigDict({"spatial": {"kind": "semantic", "num_classes": 10, "dropout": 0.1}})
    config.dit = ConfigDict({"depth": 6, "width": 128, "num_heads": 2, "patch_size": 4, "class_conditional": False})
    # A small network learns to predict pixels sooner than the noise on them, which fills all of a patch's dimensions.
    config.diffusion = ConfigDict({"schedule": "cosine", "prediction": "x_0", "variance": "fixed_small"})
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100, "max_grad_norm": 1.0}
    )
    config.training = ConfigDict(
        {
            "num_train_steps": 4000,
            "global_batch_size": 16,
            "ema_decay": 0.998,
            "log_every_steps": 100,
            "eval_every_steps": 1000,
            "checkpoint_every_steps": 1000,
            "num_eval_examples": 400,
        }
    )
    config.sampling = ConfigDict(
        {"sampler": "ddim", "num_steps": 25, "cfg_scale": 2.0, "cfg_channels": None, "x_0_limit": 1.0, "batch_size": 50}
    )
    return config
