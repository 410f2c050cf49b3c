"""Names of the U-Net's parameters in CompVis checkpoints (ADM's are the same), and in diffusers' `UNet2DModel` and
`UNet2DConditionModel`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dit_jax.config import UNetConfig
from dit_jax.pretrained.autoencoder import with_new_attention_names
from dit_jax.pretrained.name_map import Entry, Tensors

COMPVIS_PREFIX = "model.diffusion_model."  # of a U-Net inside a checkpoint; ADM's files have none
COMPVIS_AVERAGES = "model_ema.diffusion_model"  # of its moving averages there; the rest of their names has no dots
CLASS_TOKENS = "cond_stage_model.embedding.weight"  # of a class token, in a CompVis checkpoint
CLASS_VECTORS = {"compvis": "label_emb.weight", "diffusers": "class_embedding.weight"}

# Of each layer of ours the names in CompVis' form and in diffusers'; several are joined along their outputs.
LAYERS = {
    "conv_in": ("input_blocks.0.0", "conv_in"),
    "t_embedder/mlp_0": ("time_embed.0", "time_embedding.linear_1"),
    "t_embedder/mlp_2": ("time_embed.2", "time_embedding.linear_2"),
    "norm_out": ("out.0", "conv_norm_out"),
    "conv_out": ("out.2", "conv_out"),
}
RES_BLOCK_LAYERS = {
    "norm1": ("in_layers.0", "norm1"),
    "conv1": ("in_layers.2", "conv1"),
    "emb_shift": ("emb_layers.1", "time_emb_proj"),
    "emb_scale_shift": ("emb_layers.1", "time_emb_proj"),
    "norm2": ("out_layers.0", "norm2"),
    "conv2": ("out_layers.3", "conv2"),
    "nin_shortcut": ("skip_connection", "conv_shortcut"),
}
ATTENTION_LAYERS = {
    "norm": ("norm", "group_norm"),
    "attn/qkv": ("qkv", "to_q to_k to_v"),
    "attn/proj": ("proj_out", "to_out.0"),
}
TRANSFORMER_LAYERS = {  # the same in both
    "attn/qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn/proj": "attn1.to_out.0",
    "cross_attn/q": "attn2.to_q",
    "cross_attn/kv": "attn2.to_k attn2.to_v",
    "cross_attn/proj": "attn2.to_out.0",
    "mlp/value_gate": "ff.net.0.proj",
    "mlp/fc2": "ff.net.2",
}


def entries(
    form: str,
    shapes: Mapping[str, tuple[int, ...]],
    num_levels: int,
    num_res_blocks: int,
    num_heads: Callable[[int], int],
    label_table: str,
) -> list[Entry]:
    """Returns the entries of a U-Net's parameters in a form: "compvis" (as `without_prefix` gives it) or "diffusers".

    Args:
      shapes: of our parameters by path; num_heads: of an attention, by its channels.
      label_table: the name of the label's table: `CLASS_TOKENS`, or of `CLASS_VECTORS`.
    """
    attends = {int(match[1]) for match in (re.match(r"down_(\d+)_attn_", path) for path in shapes) if match}
    transforms = any(path.startswith("mid_attn_1/proj_in/") for path in shapes)

    def block_name(block: str) -> str:
        place, part, index = re.fullmatch(r"(mid|(?:down|up)_\d+)_([a-z]+)(?:_(\d+))?", block).groups()
        direction, _, level = place.partition("_")
        level, index = int(level or 0), int(index or 0)
        if form == "diffusers":
            parts = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers", "upsample": "upsamplers"}
            if place == "mid":
                return f"mid_block.{parts[part]}.{index - 1}"
            level = level if direction == "down" else num_levels - 1 - level
            return f"{direction}_blocks.{level}.{parts[part]}.{index}"
        if place == "mid":
            return f"middle_block.{ {'block_1': 0, 'attn_1': 1, 'block_2': 2}[f'{part}_{index}'] }"
        if direction == "down":  # one place each for conv_in, every residual block with its attention, and downsampling
            index = num_res_blocks if part == "downsample" else index
            return f"input_blocks.{1 + level * (num_res_blocks + 1) + index}.{int(part == 'attn')}"
        index = num_res_blocks if part == "upsample" else index  # it shares the place of the level's last block
        child = {"block": 0, "attn": 1, "upsample": 1 + (level in attends)}[part]
        return f"output_blocks.{(num_levels - 1 - level) * (num_res_blocks + 1) + index}.{child}"

    def names(path: str) -> list[str]:
        """Returns their names of a layer of ours, without ".weight" or ".bias"."""
        column = 0 if form == "compvis" else 1
        if path in LAYERS:
            return [LAYERS[path][column]]
        block, layer = path.split("/", 1)
        if match := re.match(r"block_(\d+)/", layer):  # of a transformer
            rest = layer.removeprefix(match[0])
            inner = [f"transformer_blocks.{match[1]}.{name}" for name in TRANSFORMER_LAYERS.get(rest, rest).split()]
        elif "_attn_" in block:
            inner = [layer] if transforms else ATTENTION_LAYERS[layer][column].split()
        elif layer == "conv":  # of a downsampling or an upsampling
            inner = ["op" if form == "compvis" and block.endswith("downsample") else "conv"]
        else:
            inner = [RES_BLOCK_LAYERS[layer][column]]
        return [f"{block_name(block)}.{name}" for name in inner]

    found = []
    for path, shape in shapes.items():
        layer, _, leaf = path.rpartition("/")
        if leaf == "embedding_table":
            found.append(Entry(path, (label_table,)))
            continue
        fused_by_head = form == "compvis" and not transforms and layer.endswith("attn/qkv")
        found.append(
            Entry(
                path,
                tuple(f"{name}.{'bias' if leaf == 'bias' else 'weight'}" for name in names(layer)),
                linear=leaf == "kernel" and len(shape) < 4,
                flat=leaf == "bias",
                conv=leaf == "kernel" and len(shape) == 4,
                heads=num_heads(shape[-1]) if fused_by_head else None,
            )
        )
    return found


def from_compvis(tensors: Tensors) -> tuple[dict, list[str]]:
    """Returns a U-Net of a CompVis checkpoint, or of ADM's file, by the names of `entries`; and notes on the rest.

    Of weights that have moving averages in the checkpoint, those are taken: LDM samples with them.
    """
    prefix = COMPVIS_PREFIX if any(name.startswith(COMPVIS_PREFIX) for name in tensors) else ""
    kept, left_out, averages = {}, [], 0
    for name, tensor in tensors.items():
        if name == CLASS_TOKENS:
            kept[name] = tensor
        elif name.startswith(prefix):
            own_name = name.removeprefix(prefix)
            average = tensors.get(COMPVIS_AVERAGES + own_name.replace(".", ""))
            averages += average is not None
            kept[own_name] = tensor if average is None else average
        elif not name.startswith(COMPVIS_AVERAGES):
            left_out.append(name)
    if averages not in (0, len(kept) - (CLASS_TOKENS in kept)):
        raise ValueError(f"{averages} of {len(kept)} tensors have a moving average ({COMPVIS_AVERAGES}...); all must")
    notes = [f"left out: {len(left_out)} tensors such as {min(left_out)!r}"] if left_out else []
    if averages:
        notes.append("the moving averages of the weights are taken")
    return {name: _convolution(name, tensor) for name, tensor in kept.items()}, notes


def to_compvis(tensors: Tensors) -> dict:
    """Returns the tensors of `entries` as a CompVis checkpoint has them, with its prefix."""
    return {
        name if name == CLASS_TOKENS else COMPVIS_PREFIX + name: (
            tensor[..., None] if re.search(r"(qkv|proj_out)\.weight$", name) and tensor.ndim == 2 else tensor
        )
        for name, tensor in tensors.items()
    }


def _convolution(name: str, tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor with the axes of `entries`: attention is linear there, a transformer's projections are 1x1."""
    if re.search(r"(proj_in|proj_out)\.weight$", name) and tensor.ndim == 2:
        return tensor[:, :, None, None]
    return tensor[..., 0] if re.search(r"(qkv|proj_out)\.weight$", name) and tensor.ndim == 3 else tensor


def compvis_shape(tensors: Tensors) -> dict:
    """Returns what the shapes of `from_compvis` say: fields of `UNetConfig`, and the keys of `diffusers_shape`.

    They do not say how many heads an attention has.
    """
    out_width, outputs = _shape(tensors, "out.0.weight", 1)[0], _shape(tensors, "out.2.weight", 4)[0]
    base, inputs, *_ = _shape(tensors, "input_blocks.0.0.weight", 4)
    places = [match for match in (re.match(r"output_blocks\.(\d{1,4})\.(\d)\.", name) for name in tensors) if match]
    num_places = 1 + max((int(match[1]) for match in places), default=-1)
    upsamples = {m[1] for m in places if m[2] != "0" and re.match(r"(conv|in_layers)\.", m.string[m.end() :])}
    num_levels = 1 + len(upsamples)
    num_blocks = num_places // num_levels - 1
    whole = num_places == num_levels * (num_blocks + 1) <= len(tensors)
    if out_width != base or num_blocks < 1 or not whole:
        raise ValueError(f"{num_places} output_blocks, {len(upsamples)} of which upsample, are not those of a U-Net")
    firsts = [f"input_blocks.{1 + level * (num_blocks + 1)}" for level in range(num_levels)]
    widths = [_shape(tensors, f"{first}.0.out_layers.3.weight", 4)[0] for first in firsts]
    if any(width % max(base, 1) for width in widths):
        raise ValueError(f"the levels' channels {widths} must be multiples of the first convolution's {base}")
    transformer = [
        m for m in (re.match(r".+\.transformer_blocks\.(\d{1,4})\.attn2\.to_k", name) for name in tensors) if m
    ]
    depth = 1 + max((int(match[1]) for match in transformer), default=0)
    if depth > len(tensors):
        raise ValueError(f"transformer block {depth - 1} is there, but only {len(tensors)} tensors")
    tables = [name for name in (CLASS_TOKENS, CLASS_VECTORS["compvis"]) if name in tensors]
    return {
        "base_channels": base,
        "channel_multipliers": tuple(width // base for width in widths),
        "num_res_blocks": num_blocks,
        "attention_levels": tuple(level for level, first in enumerate(firsts) if f"{first}.1.norm.weight" in tensors),
        "context_width": _shape(tensors, transformer[0].string, 2)[1] if transformer else None,
        "transformer_depth": depth,
        "scale_shift_norm": len(tensors.get(f"{firsts[0]}.0.emb_layers.1.bias", ())) == 2 * widths[0],
        "resblock_updown": num_levels > 1 and f"input_blocks.{num_blocks + 1}.0.op.weight" not in tensors,
        "channels": inputs,
        "out_channels": outputs,
        "label_rows": _shape(tensors, tables[0], 2)[0] if tables else None,
        "label": "context" if CLASS_TOKENS in tables else "vector",
    }


def _shape(tensors: Tensors, name: str, num_axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing; these are not a U-Net's weights in this form")
    if tensors[name].ndim != num_axes:
        raise ValueError(f"tensor {name!r} must have {num_axes} axes, but has shape {tensors[name].shape}")
    return tensors[name].shape


# What diffusers' configs can say that no tensor tells, and that a U-Net here does not have otherwise.
DIFFUSERS_SETTINGS = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}


def diffusers_shape(values: Mapping[str, Any]) -> dict:
    """Returns what the config of a `UNet2DModel` or `UNet2DConditionModel` says: fields of `UNetConfig`, and
    channels, out_channels, label_rows (of the table of labels; None: there is none) and height.

    Raises:
      ValueError: where it says what no U-Net here has.
    """
    values = {**values, "act_fn": {"swish": "silu"}.get(values.get("act_fn"), values.get("act_fn", "silu"))}
    for name in ("layers_per_block", "transformer_layers_per_block", "only_cross_attention"):  # or of each level
        if isinstance(values.get(name), list):
            values[name] = _only(values[name])
    transforms = {"UNet2DModel": False, "UNet2DConditionModel": True}[values["_class_name"]]
    widths, types, heads = values["block_out_channels"], values["down_block_types"], values.get("attention_head_dim", 8)
    attention_levels = [level for level, block in enumerate(types) if "Attn" in block]
    by_blocks = "ResnetDownsampleBlock2D" in types[:-1] or values.get("downsample_type") == "resnet"
    known = DIFFUSERS_SETTINGS | diffusers_blocks(attention_levels, len(types), transforms, by_blocks)
    for name, value in known.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name}={values[name]!r} must be {value!r}: a U-Net here has no other")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels={widths} must be multiples of the first")
    num_groups = values.get("norm_num_groups", 32)
    attention_groups, scale_shift = values.get("attn_norm_num_groups"), values.get("resnet_time_scale_shift")
    if not transforms and attention_groups != num_groups and (attention_groups or scale_shift == "scale_shift"):
        raise ValueError(
            f"attn_norm_num_groups={attention_groups} must be norm_num_groups={num_groups}: a U-Net here has one number"
        )
    num_heads, head_channels = (heads, None) if transforms else (None, heads)
    if isinstance(num_heads, list):  # what a UNet2DConditionModel calls channels is the number of heads, of each level
        attend = [(widths[level], num_heads[level]) for level in sorted({*attention_levels, len(widths) - 1})]
        if len({count for _, count in attend}) == 1:
            num_heads = attend[0][1]
        else:
            num_heads, head_channels = None, _only(width // count for width, count in attend)
    size = values.get("sample_size") or 64
    return {
        "base_channels": widths[0],
        "channel_multipliers": tuple(width // widths[0] for width in widths),
        "num_res_blocks": values.get("layers_per_block", 2),
        "attention_levels": tuple(attention_levels),
        "num_heads": num_heads if transforms or heads else 1,
        "head_channels": head_channels,
        "context_width": values.get("cross_attention_dim", 1280) if transforms else None,
        "transformer_depth": values.get("transformer_layers_per_block", 1),
        "scale_shift_norm": values.get("resnet_time_scale_shift") == "scale_shift",
        "resblock_updown": by_blocks,
        "num_groups": num_groups,
        "channels": values["in_channels"],
        "out_channels": values["out_channels"],
        "label_rows": values.get("num_class_embeds"),
        "label": "vector",
        "height": _only(size) if isinstance(size, list) else size,
    }


def diffusers_config(unet: UNetConfig, channels: int, out_channels: int, height: int, label_rows: int | None) -> dict:
    """Returns the config of a `UNet2DModel`, or of a `UNet2DConditionModel` where there are transformer blocks."""
    transforms, num_levels = unet.context_width is not None, len(unet.channel_multipliers)
    widths = [unet.base_channels * multiplier for multiplier in unet.channel_multipliers]
    heads = unet.num_heads or [width // unet.head_channels for width in widths]
    values = diffusers_blocks(list(unet.attention_levels), num_levels, transforms, unet.resblock_updown)
    values |= {
        "_class_name": "UNet2DConditionModel" if transforms else "UNet2DModel",
        "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks,
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift_norm else "default",
        "norm_num_groups": unet.num_groups,
        "in_channels": channels,
        "out_channels": out_channels,
        "num_class_embeds": label_rows,
        "sample_size": height,
        "flip_sin_to_cos": True,
    }
    if transforms:
        return values | {
            "attention_head_dim": heads,
            "cross_attention_dim": unet.context_width,
            "transformer_layers_per_block": unet.transformer_depth,
        }
    return values | {
        "attention_head_dim": unet.head_channels or _only(width // unet.num_heads for width in widths),
        "attn_norm_num_groups": unet.num_groups,
    }


def diffusers_blocks(attention_levels: list[int], num_levels: int, transforms: bool, by_blocks: bool) -> dict:
    """Returns the names of a U-Net's levels in diffusers.

    Args:
      transforms: whether attention is of transformer blocks; by_blocks: whether residual blocks halve and double.
    """
    attention = "CrossAttn" if transforms else "Attn"
    if by_blocks and transforms and attention_levels:
        raise ValueError("diffusers has no levels of transformer blocks that residual blocks halve or double")
    plain = ("ResnetDownsample", "ResnetUpsample") if by_blocks else ("Down", "Up")
    names = [
        (f"{attention}Down", f"{attention}Up") if level in attention_levels else plain for level in range(num_levels)
    ]
    values = {
        "down_block_types": [f"{down}Block2D" for down, _ in names],
        "up_block_types": [f"{up}Block2D" for _, up in reversed(names)],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if transforms else "UNetMidBlock2D",
    }
    if attention_levels and not transforms:
        values |= dict.fromkeys(("downsample_type", "upsample_type"), "resnet" if by_blocks else "conv")
    return values


def from_diffusers(tensors: Tensors, values: Mapping[str, Any]) -> dict:
    """Returns the tensors of a diffusers folder as `entries` name them."""
    tensors = {name: _convolution(name, tensor) for name, tensor in with_new_attention_names(tensors).items()}
    first = "time_embedding.linear_1.weight"
    if not values.get("flip_sin_to_cos", True) and first in tensors:  # it takes sines first, where ours takes cosines
        tensors[first] = np.roll(tensors[first], tensors[first].shape[1] // 2, axis=1)
    return tensors


def _only(values: Iterable[int]) -> int:
    """Returns the one value of several that are equal."""
    values = set(values)
    if len(values) != 1:
        raise ValueError(f"{sorted(values)} must be one number, at every level: a U-Net here has no other")
    return values.pop()
