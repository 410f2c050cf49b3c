"""LDM's text-to-image U-Net with its text transformer, at 256 x 256 px in f8 latents (arXiv:2112.10752, table 15).

dit-jax encode --config=configs/unet_text.py --autoencoder=AUTOENCODER --output=CACHE
dit-jax train --config=configs/unet_text.py --workdir=DIR --config.latents.path=CACHE

Trained on LAION-400M there; config.data.name is a folder of images with captions. Zero-shot FID on COCO: 23.31, with
guidance 1.5 12.63. Of the paper's 1.45 B parameters 39 M are logits of the text transformer, which nothing reads and
which are not here; the text's states are projected here, 1.6 M more.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "laion400m", "image_size": 256, "num_classes": 1, "horizontal_flip": False})
    config.latents = ConfigDict({"shape": (32, 32, 4), "scale": 0.18215})
    config.unet = ConfigDict(
        {
            "base_channels": 320,
            "channel_multipliers": (1, 2, 4, 4),
            "attention_levels": (0, 1, 2),
            "num_heads": 8,
            "context_width": 1280,
            "class_conditional": False,
        }
    )
    config.conditions = ConfigDict({"text": {"transformer": {"width": 1280, "depth": 32}}})
    config.diffusion = ConfigDict(
        {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "variance": "fixed_small"}
    )
    config.sampling = ConfigDict({"sampler": "ddim", "num_steps": 250, "cfg_scale": 1.5, "cfg_channels": None})
    # AdamW with the weight decay that PyTorch's has by default (LDM code).
    config.optimizer = ConfigDict({"learning_rate": 1e-4, "weight_decay": 0.01})
    config.training = ConfigDict({"num_train_steps": 390_000, "global_batch_size": 680})
    return config
