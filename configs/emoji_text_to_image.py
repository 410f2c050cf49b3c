"""Text to image in pixels, on emoji and their names (`launch/emoji.sh`), read by a MiniLM (`launch/text_weights.sh`).

dit-jax train --config=configs/emoji_text_to_image.py --workdir=runs/emoji
dit-jax sample --workdir=runs/emoji --prompt="a red apple"

Captions are encoded by a frozen MiniLM; their tokens stand in context, beside those of the image, in one transformer
with long skips, and their pooled vector modulates its norms.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "data/emoji", "image_size": 32, "num_classes": 9, "horizontal_flip": False})
    config.dit = ConfigDict(
        {
            "depth": 6,
            "width": 128,
            "num_heads": 2,
            "patch_size": 4,
            "conditioning": ("adaln_zero", "in_context"),
            "long_skips": True,
            "class_conditional": False,
        }
    )
    config.conditions = ConfigDict({"text": {"max_length": 16}})
    config.diffusion = ConfigDict({"schedule": "cosine", "prediction": "v", "variance": "fixed_small"})
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100, "max_grad_norm": 1.0}
    )
    config.training = ConfigDict(
        {
            "num_train_steps": 4500,
            "global_batch_size": 32,
            "ema_decay": 0.998,
            "log_every_steps": 100,
            "eval_every_steps": 1500,
            "checkpoint_every_steps": 500,
            "num_eval_examples": 384,
        }
    )
    config.sampling = ConfigDict(
        {
            "sampler": "dpm_solver",
            "num_steps": 30,
            "cfg_scale": 3.0,
            "cfg_channels": None,
            "x_0_limit": 1.0,
            "batch_size": 32,
        }
    )
    return config
