"""Class-conditional Fashion-MNIST in pixels, without an autoencoder: DiTs by how the label reaches them, and the U-Net.

dit-jax train --config=configs/fashion_mnist_pixels.py:in_context --workdir=DIR

`launch/fusion.sh` trains all of them with equal compute. Names: below.
"""

from ml_collections import ConfigDict

FUSIONS = {  # name -> config.dit.conditioning
    "adaln_zero": ("adaln_zero",),
    "cross_attention": ("cross_attention",),
    "in_context": ("in_context",),
    "mixed": ("adaln_zero", "cross_attention"),
}


def get_config(name: str = "adaln_zero") -> ConfigDict:
    """Returns the config of a name: a fusion, `long_skips` (in context, as U-ViT) or `unet`."""
    if name not in (*FUSIONS, "long_skips", "unet"):
        raise ValueError(f"{name!r} must be one of {', '.join(FUSIONS)}, long_skips, unet")
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict(
        {"name": "fashion_mnist", "image_size": 28, "channels": 1, "num_classes": 10, "horizontal_flip": False}
    )
    if name == "unet":
        config.unet = ConfigDict(
            {
                "base_channels": 16,
                "channel_multipliers": (1, 2, 4),
                "attention_levels": (1, 2),
                "num_res_blocks": 1,
                "num_heads": 2,
                "context_width": 64,
                "num_groups": 8,
            }
        )
    else:
        config.dit = ConfigDict(
            {
                "depth": 4,
                "width": 128,
                "num_heads": 2,
                "patch_size": 4,
                "conditioning": FUSIONS.get(name, ("in_context",)),
                "long_skips": name == "long_skips",
            }
        )
    config.diffusion = ConfigDict({"schedule": "cosine", "prediction": "v", "variance": "fixed_small"})
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100, "max_grad_norm": 1.0}
    )
    config.training = ConfigDict(
        {
            "num_train_steps": 2000,
            "global_batch_size": 32,
            "ema_decay": 0.995,
            "log_every_steps": 100,
            "eval_every_steps": 400,
            "checkpoint_every_steps": 1000,
        }
    )
    config.sampling = ConfigDict(
        {
            "sampler": "dpm_solver",
            "num_steps": 20,
            "cfg_scale": 1.5,
            "cfg_channels": None,
            "x_0_limit": 1.0,
            "batch_size": 50,
        }
    )
    return config
