"""The quick start's DiT: class-conditional Fashion-MNIST in the latents of `fashion_mnist_autoencoder.py`.

dit-jax encode --config=configs/fashion_mnist_autoencoder.py --autoencoder=runs/autoencoder --output=runs/latents
dit-jax train --config=configs/fashion_mnist_dit.py --workdir=runs/dit --config.latents.path=runs/latents
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.stage = "diffusion"
    config.data = ConfigDict(
        {"name": "fashion_mnist", "image_size": 28, "channels": 1, "num_classes": 10, "horizontal_flip": False}
    )
    config.latents = ConfigDict({"shape": (7, 7, 6)})
    # Small, with a small batch: in the same minutes on two cores, many short steps draw better than fewer long ones.
    config.dit = ConfigDict({"depth": 4, "width": 64, "num_heads": 1, "patch_size": 1})
    config.optimizer = ConfigDict(
        {"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 100, "max_grad_norm": 1.0}
    )
    config.training = ConfigDict(
        {
            "num_train_steps": 9000,
            "global_batch_size": 16,
            "ema_decay": 0.997,
            "log_every_steps": 100,
            "eval_every_steps": 3000,
            "checkpoint_every_steps": 1000,
            "num_eval_examples": 2048,
        }
    )
    config.sampling = ConfigDict(
        {"sampler": "ddim", "num_steps": 50, "cfg_scale": 3.5, "cfg_channels": None, "batch_size": 50}
    )
    return config
