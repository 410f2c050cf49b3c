"""The quick start's autoencoder: Fashion-MNIST, 28 x 28 grey images to 7 x 7 x 6 latents (4x per side).

dit-jax train --config=configs/fashion_mnist_autoencoder.py --workdir=runs/autoencoder
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.stage = "autoencoder"
    config.data = ConfigDict(
        {
            "name": "fashion_mnist",
            "image_size": 28,
            "channels": 1,
            "num_classes": 10,
            "horizontal_flip": False,  # every shoe of the data set points to the left
        }
    )
    # Few channels at full resolution, and a small batch: on CPU that is where a convolution's gradient is slowest, and
    # activations that stay in the cache are worth more than large batches.
    config.autoencoder = ConfigDict(
        {
            "base_channels": 8,
            "channel_multipliers": (1, 2, 4),
            "num_res_blocks": 1,
            "latent_channels": 6,
            "num_groups": 8,
            "reconstruction_loss": "l2",
        }
    )
    config.optimizer = ConfigDict({"learning_rate": 4e-3, "schedule": "cosine", "warmup_steps": 20})
    config.training = ConfigDict(
        {
            "num_train_steps": 3000,
            "global_batch_size": 16,
            "ema_decay": 0.995,
            "log_every_steps": 50,
            "eval_every_steps": 1000,
            "checkpoint_every_steps": 500,
            "num_eval_examples": 10_000,
        }
    )
    return config
