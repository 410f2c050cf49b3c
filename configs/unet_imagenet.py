"""LDM's class-conditional U-Nets on ImageNet at 256 x 256 px (arXiv:2112.10752, tables 10 and 13): f4 or f8.

dit-jax encode --config=configs/unet_imagenet.py:f4 --autoencoder=AUTOENCODER --output=CACHE
dit-jax train --config=configs/unet_imagenet.py:f4 --workdir=DIR --config.latents.path=CACHE

The paper's FID-50K: f4 10.56, with guidance 1.25 3.95, with 1.5 3.60 (250 DDIM steps); f8 15.51 (200 DDIM steps).
"""

from ml_collections import ConfigDict

# Of the autoencoder with this downsampling: a latent's shape, the U-Net (395 M parameters and 400 M, without the table
# of classes); then steps, batch and learning rate.
ARCHITECTURES = {
    "f8": (
        (32, 32, 4),
        {"base_channels": 256, "channel_multipliers": (1, 2, 4), "attention_levels": (0, 1, 2), "head_channels": 32},
        (4_800_000, 64, 6.4e-5),
    ),
    "f4": (
        (64, 64, 3),
        {"base_channels": 192, "channel_multipliers": (1, 2, 3, 5), "attention_levels": (1, 2, 3), "num_heads": 1},
        (178_000, 1200, 1e-4),
    ),
}


def get_config(name: str = "f4") -> ConfigDict:
    """Returns the config of a name."""
    if name not in ARCHITECTURES:
        raise ValueError(f"{name!r} must be one of {', '.join(ARCHITECTURES)}")
    shape, unet, (num_train_steps, batch_size, learning_rate) = ARCHITECTURES[name]
    guided = name == "f4"  # by its own null class; the paper guides f8 by a classifier
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "imagenet2012", "image_size": 256, "eval_split": "validation"})
    config.latents = ConfigDict({"shape": shape, "scale": 1.0})  # VQ latents are not scaled (LDM code)
    config.unet = ConfigDict(unet | {"context_width": 512, "label_dropout": 0.1 if guided else 0.0})
    config.diffusion = ConfigDict(
        {"schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "variance": "fixed_small"}
    )
    config.sampling = ConfigDict(
        {
            "sampler": "ddim",
            "num_steps": 250 if guided else 200,
            "cfg_scale": 1.5 if guided else 1.0,
            "cfg_channels": None,
        }
    )
    # AdamW with the weight decay that PyTorch's has by default (LDM code).
    config.optimizer = ConfigDict({"learning_rate": learning_rate, "weight_decay": 0.01})
    config.training = ConfigDict({"num_train_steps": num_train_steps, "global_batch_size": batch_size})
    return config
