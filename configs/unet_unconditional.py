"""LDM's unconditional U-Net at 256 x 256 px in f4 latents (arXiv:2112.10752, table 12): celebahq, ffhq or bedrooms.

dit-jax encode --config=configs/unet_unconditional.py:ffhq --autoencoder=AUTOENCODER --output=CACHE
dit-jax train --config=configs/unet_unconditional.py:ffhq --workdir=DIR --config.latents.path=CACHE

config.data.name is a folder with the images in one sub-folder. The paper's FID-50K:

    celebahq  5.11  (200 DDIM steps, eta 0)
    ffhq      4.98  (200 DDIM steps, eta 1)
    bedrooms  2.95  (200 DDIM steps, eta 1)
"""

from ml_collections import ConfigDict

# Steps, batch and learning rate; eta of DDIM.
RECIPES = {
    "celebahq": (410_000, 48, 9.6e-5, 0.0),
    "ffhq": (635_000, 42, 8.4e-5, 1.0),
    "bedrooms": (1_900_000, 48, 9.6e-5, 1.0),
}


def get_config(name: str = "celebahq") -> ConfigDict:
    """Returns the config of a name."""
    if name not in RECIPES:
        raise ValueError(f"{name!r} must be one of {', '.join(RECIPES)}")
    num_train_steps, batch_size, learning_rate, eta = RECIPES[name]
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": name, "image_size": 256, "num_classes": 1})
    config.latents = ConfigDict({"shape": (64, 64, 3), "scale": 1.0})  # VQ latents are not scaled (LDM code)
    config.unet = ConfigDict(
        {
            "base_channels": 224,
            "channel_multipliers": (1, 2, 3, 4),
            "attention_levels": (1, 2, 3),
            "head_channels": 32,
            "class_conditional": False,
        }
    )
    config.diffusion = ConfigDict(
        {"schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "variance": "fixed_small"}
    )
    config.sampling = ConfigDict({"sampler": "ddim", "num_steps": 200, "eta": eta, "cfg_scale": 1.0})
    # AdamW with the weight decay that PyTorch's has by default (LDM code).
    config.optimizer = ConfigDict({"learning_rate": learning_rate, "weight_decay": 0.01})
    config.training = ConfigDict({"num_train_steps": num_train_steps, "global_batch_size": batch_size})
    return config
