"""U-Nets between the forms of `pretrained.unet` and configs: what `convert --kind=unet` knows beyond names.

Where a model was never trained without labels, the label's table has no row for the null class there; here it has one,
of zeros, and `label_dropout=0` keeps guidance from it. In the same way a text's states reach a converted U-Net as they
are, and the null text is zeros.
"""

from typing import Any

import numpy as np

from dit_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    LatentsConfig,
    SamplingConfig,
    TrainingConfig,
    UNetConfig,
)
from dit_jax.models.build import abstract_params, num_outputs
from dit_jax.pretrained import unet as names
from dit_jax.pretrained.name_map import Entry, Tensors, flatten, from_tensors, to_tensors
from dit_jax.types import Params

FIELDS = (
    *("base_channels", "channel_multipliers", "num_res_blocks", "attention_levels", "context_width", "num_groups"),
    *("transformer_depth", "scale_shift_norm", "resblock_updown"),
)
# By base_channels and channel_multipliers what no tensor of a released model tells: the heads, the side of its inputs,
# and the pixels that one of them is wide (arXiv:2112.10752, tables 12 and 13; arXiv:2105.05233, table 11).
RELEASED = {
    (256, (1, 2, 4)): {"num_heads": None, "head_channels": 32, "height": 32, "factor": 8},
    (192, (1, 2, 3, 5)): {"num_heads": 1, "head_channels": None, "height": 64, "factor": 4},
    (224, (1, 2, 3, 4)): {"num_heads": None, "head_channels": 32, "height": 64, "factor": 4},
    (256, (1, 1, 2, 3, 4)): {"num_heads": None, "head_channels": 64, "height": 128, "factor": 1},
    (256, (1, 1, 2, 2, 4, 4)): {"num_heads": None, "head_channels": 64, "height": 256, "factor": 1},
}
LATENT_SCALE = 1.0  # of latents of the released VQ autoencoders (LDM code)
NUM_CLASSES = 1000  # ImageNet's: a table of so many labels has no row for the null class


def released_config(shape: dict[str, Any]) -> Config:
    """Returns the config of a U-Net of this shape, in all else as LDM's or ADM's were trained."""
    shape = RELEASED.get((shape["base_channels"], shape["channel_multipliers"]), {}) | shape
    if "num_heads" not in shape:
        raise ValueError("the weights do not tell the number of heads of this U-Net; give --config=FILE")
    if shape["context_width"] is not None and (shape["label_rows"] is None or shape["label"] == "vector"):
        raise ValueError("the weights attend to a text, and do not tell which; give --config=FILE")
    channels, height, rows = shape["channels"], shape["height"], shape["label_rows"]
    if shape["out_channels"] not in (channels, 2 * channels):
        raise ValueError(
            f"the weights read {channels} channels and predict {shape['out_channels']}: an image is read beside x_t, "
            "and they do not tell which; give --config=FILE, with its config.conditions.spatial"
        )
    factor = shape.get("factor", 1 if channels in (1, 3) else 8)
    guided = rows is not None and rows != NUM_CLASSES
    schedule = {"schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195} if factor > 1 else {}
    return Config(
        stage="diffusion",
        data=DataConfig(
            name="imagenet2012",
            image_size=factor * height,
            channels=channels if factor == 1 else 3,
            num_classes=1 if rows is None else rows - guided,
            eval_split="validation",
        ),
        training=TrainingConfig(num_train_steps=1_000_000),
        unet=UNetConfig(
            **{name: shape[name] for name in (*FIELDS, "num_heads", "head_channels", "label") if name in shape},
            class_conditional=rows is not None,
            label_dropout=0.1 if guided else 0.0,
        ),
        latents=LatentsConfig(shape=(height, height, channels), scale=LATENT_SCALE) if factor > 1 else None,
        diffusion=DiffusionConfig(
            variance="learned_range" if shape["out_channels"] == 2 * channels else "fixed_small", **schedule
        ),
        sampling=SamplingConfig(
            cfg_scale=1.5 if guided else 1.0, cfg_channels=None, x_0_limit=1.0 if factor == 1 else None
        ),
    )


def shape_of(config: Config) -> dict[str, Any]:
    """Returns the shape of a config's U-Net, in the keys of `pretrained.unet.diffusers_shape`."""
    unet, spatial = config.unet, config.spatial
    return {name: getattr(unet, name) for name in (*FIELDS, "label")} | {
        "heads": tuple(unet.heads_of(channels) for channels in unet.level_channels),
        "channels": config.input_shape[-1] + (config.spatial_shape[-1] if spatial else 0),
        "out_channels": num_outputs(config),
        "label_rows": config.data.num_classes + (unet.label_dropout > 0) if unet.class_conditional else None,
        "height": config.input_shape[0],
    }


def check_shape(config: Config, shape: dict[str, Any]) -> None:
    """Raises ValueError where a config describes another U-Net than the one that was read."""
    ours, theirs = shape_of(config), dict(shape)
    num_heads, head_channels = theirs.pop("num_heads", None), theirs.pop("head_channels", None)
    if num_heads or head_channels:
        widths = [theirs["base_channels"] * multiplier for multiplier in theirs["channel_multipliers"]]
        theirs["heads"] = tuple(num_heads or width // head_channels for width in widths)
    if theirs["label_rows"] is None:
        del theirs["label"]
    theirs.pop("height", None)  # a U-Net takes images of other sizes too
    differences = [f"{name} {ours[name]} (weights: {value})" for name, value in theirs.items() if ours[name] != value]
    if differences:
        raise ValueError(f"the weights are of another model than the config: {'; '.join(differences)}")
    text = config.conditions and config.conditions.text
    others = {name for name, value in vars(config.conditions).items() if value} if config.conditions else set()
    if others - {"text", "spatial"}:
        raise ValueError(f"a U-Net with {', '.join(sorted(others))} has no released form")
    if text and (text.transformer or text.dropout or text.frozen_width != ours["context_width"]):
        raise ValueError(
            f"config.conditions.text must be of a frozen encoder with frozen_width={ours['context_width']}, the "
            "context_width, and have dropout=0: the weights have no text encoder and no null text of ours"
        )


def import_params(config: Config, tensors: Tensors, diffusers: bool) -> Params:
    """Returns our parameters of a U-Net's tensors in one of its two forms."""
    abstract = abstract_params(config)
    text = abstract.pop("text", None)
    entries = make_entries(config, abstract, diffusers)
    for name in label_tables(config, entries):
        if name in tensors and tensors[name].ndim == 2:
            tensors = tensors | {name: np.pad(tensors[name], ((0, 1), (0, 0)))}
    params = from_tensors(entries, tensors, abstract)
    if text:
        params["text"] = {
            path: np.zeros(leaf.shape, np.float32) if "null" in path else identity(leaf) for path, leaf in text.items()
        }
    return params


def identity(layer: Params) -> Params:
    """Returns the parameters of a linear layer that changes nothing."""
    return {
        "kernel": np.eye(*layer["kernel"].shape, dtype=np.float32),
        "bias": np.zeros(layer["bias"].shape, np.float32),
    }


def export_tensors(config: Config, params: Params, diffusers: bool) -> dict[str, np.ndarray]:
    """Returns a U-Net's tensors in one of its two forms."""
    entries = make_entries(config, params, diffusers)
    tensors = to_tensors(entries, params)
    tensors |= {name: tensors[name][:-1] for name in label_tables(config, entries)}
    return tensors if diffusers else names.to_compvis(tensors)


def make_entries(config: Config, params: Params, diffusers: bool) -> list[Entry]:
    """Returns the names of a U-Net's tensors in one of its two forms, by our parameters or their shapes."""
    shapes, unet = {path: leaf.shape for path, leaf in flatten(params)}, config.unet
    if diffusers and unet.class_conditional and unet.label == "context":
        raise ValueError("diffusers has no place for the tokens of classes (config.unet.label='context')")
    table = (
        names.CLASS_VECTORS["diffusers" if diffusers else "compvis"] if unet.label == "vector" else names.CLASS_TOKENS
    )
    form, num_levels = "diffusers" if diffusers else "compvis", len(unet.channel_multipliers)
    return names.entries(form, shapes, num_levels, unet.num_res_blocks, unet.heads_of, table)


def label_tables(config: Config, entries: list[Entry]) -> list[str]:
    """Returns the name of the label's table where it has a row here that it does not have there."""
    return [e.names[0] for e in entries if e.path.endswith("embedding_table") and config.unet.label_dropout == 0]


def diffusers_config(config: Config) -> dict[str, Any]:
    """Returns the config of a `UNet2DModel` or `UNet2DConditionModel`."""
    shape = shape_of(config)
    keys = ("channels", "out_channels", "height", "label_rows")
    return names.diffusers_config(config.unet, **{name: shape[name] for name in keys})
