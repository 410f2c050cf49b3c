"""Scenes of emoji of nine categories at 32 x 32 pixels, by a DiT that is told what is where.

./launch/emoji_scenes.sh
dit-jax train --config=configs/emoji_scenes.py:layout --workdir=runs/layout
dit-jax sample --workdir=runs/layout --layout="flags 0.05 0.1 0.55 0.45; smileys_emotion 0.5 0.5 0.95 0.95"
dit-jax train --config=configs/emoji_scenes.py:semantic --workdir=runs/semantic
dit-jax sample --workdir=runs/semantic --map=data/emoji_scenes/maps/test/00000.png

Names: `layout`, boxes, to whose tokens the transformer attends, and `semantic`, a map of categories, read beside x_t.
"""

from ml_collections import ConfigDict

CLASSES = (
    "activities", "animals_nature", "flags", "food_drink", "objects", "people_body", "smileys_emotion", "symbols",
    "travel_places",
)  # fmt: skip


def get_config(name: str = "layout") -> ConfigDict:
    """Returns the config of one of the names above."""
    if name not in ("layout", "semantic"):
        raise ValueError(f"{name!r} must be one of layout, semantic")
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "data/emoji_scenes", "image_size": 32, "num_classes": 1})
    config.dit = ConfigDict({"depth": 6, "width": 128, "num_heads": 2, "patch_size": 4, "class_conditional": False})
    if name == "layout":
        transformer = {"width": 128, "depth": 2, "num_heads": 2}
        config.conditions = ConfigDict({"layout": {"classes": CLASSES, "max_objects": 4, "transformer": transformer}})
        config.dit.conditioning = ("adaln_zero", "cross_attention")
    else:
        num_classes = 1 + len(CLASSES)  # 0: white
        config.data.map_field = "map"
        config.conditions = ConfigDict({"spatial": {"kind": "semantic", "num_classes": num_classes, "dropout": 0.1}})
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
