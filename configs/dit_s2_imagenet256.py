"""DiT-S/2 on ImageNet at 256 x 256 px, with the paper's recipe (arXiv:2212.09748, section 4).

dit-jax train --config=configs/dit_s2_imagenet256.py --workdir=DIR --config.latents.path=CACHE
"""

from ml_collections import ConfigDict

from dit_jax.models.dit_sizes import dit_size


def get_config() -> ConfigDict:
    """Returns the config; expected FID-50K after 400K steps without guidance: 68.40 (paper, table 4)."""
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict({"name": "imagenet2012", "image_size": 256, "eval_split": "validation"})
    config.latents = ConfigDict({"shape": (32, 32, 4), "scale": 0.18215})
    config.dit = ConfigDict(dit_size("S/2"))
    config.training = ConfigDict({"num_train_steps": 400_000})
    return config
