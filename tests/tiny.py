"""Tiny configs and data: what end-to-end tests train in seconds."""

import dataclasses
import json
import pathlib

import numpy as np
from PIL import Image

from dit_jax.config import Config, config_from_dict, config_to_dict

NUM_CLASSES = 3


def make_image_folder(root: pathlib.Path, num_images: int = 20, size: int = 8) -> pathlib.Path:
    """Writes `num_images` grey PNGs for each of three classes: bars of a class's direction, jittered."""
    rng = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True)
        for i in range(num_images):
            image = rng.integers(0, 60, (size, size))
            if label < 2:
                image[(slice(None), rng.integers(size))[:: 1 if label else -1]] = 255
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


def data_section(folder: pathlib.Path) -> dict:
    """Returns the data section of a folder of `make_image_folder`."""
    return {"name": str(folder), "image_size": 8, "channels": 1, "num_classes": NUM_CLASSES, "num_threads": 1}


def training_section(**overrides) -> dict:
    """Returns a training section of few, small steps."""
    section = {
        "num_train_steps": 4,
        "global_batch_size": 8,
        "ema_decay": 0.5,
        "log_every_steps": 1,
        "eval_every_steps": 2,
        "checkpoint_every_steps": 2,
        "num_eval_examples": 6,
    }
    return section | overrides


def autoencoder_config(folder: pathlib.Path, **training) -> Config:
    """Returns an autoencoder of 8 x 8 images with 4 x 4 x 2 latents."""
    return config_from_dict(
        {
            "stage": "autoencoder",
            "data": data_section(folder),
            "autoencoder": {
                "base_channels": 8,
                "channel_multipliers": (1, 1),
                "num_res_blocks": 1,
                "latent_channels": 2,
                "num_groups": 4,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": training_section(**training),
        }
    )


def adversarial_config(folder: pathlib.Path, codebook: dict | None = None, start_step: int = 2, **training) -> Config:
    """Returns the autoencoder with a discriminator and a learned log-variance; VQ with the fields of a codebook."""
    config = autoencoder_config(folder, **training)
    values = config_to_dict(config)
    values["autoencoder"] |= {
        "learn_log_variance": True,
        "codebook": codebook,
        "discriminator": {"num_layers": 1, "base_channels": 8, "start_step": start_step},
    }
    return config_from_dict(values)


def dit_config(folder: pathlib.Path, **training) -> Config:
    """Returns a DiT of 8 x 8 pixels; replace `latents` for one of latents."""
    return config_from_dict(
        {
            "stage": "diffusion",
            "data": data_section(folder),
            "dit": {"depth": 2, "width": 32, "num_heads": 2, "patch_size": 2},
            "optimizer": {"learning_rate": 1e-3},
            "training": training_section(**training),
            "sampling": {"sampler": "ddim", "num_steps": 3, "cfg_scale": 2.0, "cfg_channels": None, "batch_size": 8},
        }
    )


WORDS = ("a", "red", "flag", "star", ":")


def write_tokenizer(folder):
    """Writes BERT's tokenizer with WORDS as its vocabulary; returns the folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_text_encoder(folder, width=12, max_length=8):
    """Writes a frozen text encoder of random weights with that tokenizer; returns the folder."""
    import jax

    from dit_jax.models.text_encoder import TextShape, abstract_text_encoder
    from dit_jax.pretrained.files import write_tensors
    from dit_jax.pretrained.name_map import flatten

    shape = TextShape(4 + len(WORDS), max_length, width, depth=1, num_heads=2, head_dim=4)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape, np.float32), abstract_text_encoder(shape))
    write_tokenizer(folder)
    (folder / "text_encoder.json").write_text(json.dumps(dataclasses.asdict(shape)))
    write_tensors(folder / "text_encoder.safetensors", dict(flatten(params)))
    return folder


def write_captions(folder, captions=None):
    """Gives the images of `make_image_folder` captions: those of each class, or of one, two and three of WORDS."""
    lines = []
    for i, path in enumerate(sorted(folder.glob("*/*.png"))):
        words = [WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 3)]
        caption = captions[int(path.parent.name[-1])] if captions else " ".join(words)
        lines.append(json.dumps({"file_name": path.relative_to(folder).as_posix(), "caption": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def store_tfds(data_dir, name="tiny_objects", size=6, num_images=None):
    """Stores a TFDS data set of colour images and three classes, train and test; returns its name."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)

    def examples(count):
        for i in range(count):
            yield i, {"image": rng.integers(0, 256, (size, size, 3), np.uint8), "label": i % NUM_CLASSES}

    tfds.dataset_builders.store_as_tfds_dataset(
        name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(size, size, 3)),
                "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
            }
        ),
        split_datasets={split: examples(n) for split, n in (num_images or {"train": 12, "test": 5}).items()},
        data_dir=str(data_dir),
        file_format="array_record",
        disable_shuffling=True,
    )
    return name
