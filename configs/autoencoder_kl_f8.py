"""The f8 KL autoencoder of LDM at 256 x 256 px (arXiv:2112.10752, table 8): 83.65 M parameters, 32 x 32 x 4 latents.

dit-jax train --config=configs/autoencoder_kl_f8.py --workdir=DIR
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config; the architecture is the schema's default."""
    config = ConfigDict()
    config.stage = "autoencoder"
    config.data = ConfigDict({"name": "imagenet2012", "image_size": 256, "eval_split": "validation"})
    config.autoencoder = ConfigDict()
    # Adam(0.5, 0.9) at 4.5e-6 per image of the batch (LDM code).
    config.optimizer = ConfigDict({"learning_rate": 4.5e-6 * 96, "b1": 0.5, "b2": 0.9})
    config.training = ConfigDict({"num_train_steps": 250_000, "global_batch_size": 96, "ema_decay": None})
    return config
