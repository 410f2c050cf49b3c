"""The DiT paper's models on ImageNet with its recipe (arXiv:2212.09748, section 4), one a name such as S/8 or XL/2-512.

dit-jax train --config=configs/dit_imagenet.py:XL/2 --workdir=DIR --config.latents.path=CACHE
dit-jax info --config=configs/dit_imagenet.py:B/4-512

Names: S, B, L or XL, a patch size (2, 4 or 8), and the images' size (256, unless it follows after a dash).
"""

from ml_collections import ConfigDict

from dit_jax.models.dit_sizes import dit_size

# FID-50K at 256 px after 400K steps, without guidance (table 4). XL/2 goes on to 7M steps (2.27 with guidance 1.5), and
# at 512 px to 3M (3.04).
PAPER_FID = {
    "S/8": 153.60,
    "S/4": 100.41,
    "S/2": 68.40,
    "B/8": 122.74,
    "B/4": 68.38,
    "B/2": 43.47,
    "L/8": 118.87,
    "L/4": 45.64,
    "L/2": 23.33,
    "XL/8": 106.41,
    "XL/4": 43.01,
    "XL/2": 19.47,
}
NUM_TRAIN_STEPS = {"XL/2-256": 7_000_000, "XL/2-512": 3_000_000}  # the others: 400K


def get_config(name: str = "XL/2") -> ConfigDict:
    """Returns the config of a name."""
    size, _, image_size = name.partition("-")
    image_size = image_size or "256"
    if size not in PAPER_FID or image_size not in ("256", "512"):
        raise ValueError(f"{name!r} must be one of {', '.join(PAPER_FID)}, with -512 after it for 512 px")
    latent_size = int(image_size) // 8
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "imagenet2012", "image_size": int(image_size), "eval_split": "validation"})
    config.latents = ConfigDict({"shape": (latent_size, latent_size, 4), "scale": 0.18215})
    config.dit = ConfigDict(dit_size(size))
    config.compute = ConfigDict({"scan_blocks": config.dit.depth > 12})  # compiles 28 blocks as fast as 1
    config.training = ConfigDict({"num_train_steps": NUM_TRAIN_STEPS.get(f"{size}-{image_size}", 400_000)})
    return config
