"""The quick start's autoencoder: Fashion-MNIST, 28 x 28 grey images to 7 x 7 x 4 latents (4x per side).

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
    # Few channels at full resolution: there a convolution's gradient is slowest on CPU, and the images are simple.
    config.autoencoder = ConfigDict(
        {
            "base_channels": 16,
            "channel_multipliers": (1, 2, 4),
            "num_res_blocks": 1,
            "latent_channels": 4,
            "num_groups": 8,
        }
    )
    config.optimizer = ConfigDict(
        {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50, "max_grad_norm": 1e3}
    )
    config.training = ConfigDict(
        {
            "num_train_steps": 600,
            "global_batch_size": 64,
            "ema_decay": 0.99,
            "log_every_steps": 20,
            "eval_every_steps": 200,
            "checkpoint_every_steps": 200,
            "num_eval_examples": 1024,
        }
    )
    return config
