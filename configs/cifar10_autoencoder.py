"""Autoencoders of CIFAR-10, 32 x 32 to 8 x 8 x 3 latents (4x per side), one a name: kl or vq.

All of LDM's losses on real colour images, at a size that two CPU cores train in half an hour; `launch/autoencoders.sh`
runs both and writes a page about them:

dit-jax train --config=configs/cifar10_autoencoder.py:kl --workdir=runs/cifar10_kl
"""

from ml_collections import ConfigDict

REGULARIZERS = {"kl": {}, "vq": {"codebook": {"num_codes": 512, "restart_usage": 0.03}}}


def get_config(name: str = "kl") -> ConfigDict:
    """Returns the config of a name."""
    if name not in REGULARIZERS:
        raise ValueError(f"{name!r} must be one of {', '.join(REGULARIZERS)}")
    config = ConfigDict()
    config.stage = "autoencoder"
    config.data = ConfigDict({"name": "cifar10", "image_size": 32, "num_classes": 10})
    config.autoencoder = ConfigDict(
        {
            "base_channels": 32,
            "channel_multipliers": (1, 2, 4),
            "num_res_blocks": 1,
            "latent_channels": 3,
            "num_groups": 8,
            "perceptual_weight": 1.0,
            "learn_log_variance": name == "kl",
            "discriminator": {"num_layers": 2, "base_channels": 32, "start_step": 1500, "weight": 0.1},
            **REGULARIZERS[name],
        }
    )
    config.optimizer = ConfigDict(
        {"learning_rate": 4e-4, "schedule": "cosine", "warmup_steps": 50, "b1": 0.5, "b2": 0.9}
    )
    config.training = ConfigDict(
        {
            "num_train_steps": 2500,
            "global_batch_size": 16,
            "ema_decay": 0.99,  # the adversary moves its target from step to step
            "log_every_steps": 50,
            "eval_every_steps": 125,
            "checkpoint_every_steps": 250,
            "num_eval_examples": 1024,
        }
    )
    return config
