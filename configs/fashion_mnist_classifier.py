"""A classifier of noised latents that guides the quick start's DiT (ADM, arXiv:2105.05233, section 4).

dit-jax train --config=configs/fashion_mnist_classifier.py --workdir=runs/classifier --config.latents.path=runs/latents
dit-jax sample --workdir=runs/dit --cfg_scale=1 --classifier=runs/classifier --classifier_scale=2
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.stage = "classifier"
    config.data = ConfigDict(
        {"name": "fashion_mnist", "image_size": 28, "channels": 1, "num_classes": 10, "horizontal_flip": False}
    )
    config.latents = ConfigDict({"shape": (7, 7, 6)})
    config.dit = ConfigDict({"depth": 3, "width": 64, "num_heads": 1, "patch_size": 1, "class_conditional": False})
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100, "weight_decay": 0.05, "max_grad_norm": 1.0}
    )
    config.training = ConfigDict(
        {
            "num_train_steps": 3000,
            "global_batch_size": 64,
            "ema_decay": 0.99,
            "eval_every_steps": 1000,
            "checkpoint_every_steps": 1000,
            "num_eval_examples": 2048,
        }
    )
    return config
