"""Names of the autoencoders' parameters in CompVis checkpoints, and in diffusers' `AutoencoderKL` and `VQModel`."""

import re
from collections.abc import Iterator

import numpy as np

from dit_jax.pretrained.name_map import Entry, Tensors

COMPVIS_PREFIX = "first_stage_model."  # of an autoencoder inside a diffusion checkpoint
NOT_PARAMETERS = {  # in CompVis checkpoints: what else an autoencoder's names begin with
    "loss.": "the training loss's (discriminator, LPIPS)",
    "model_ema.": "a moving average of the weights",
    "quantize.embedding.cluster_size": "the codes' moving averages",
    "quantize.embedding.embed_avg": "the codes' moving averages",
}
CODES = Entry("quantize/embedding", ("quantize.embedding.weight",))  # [n, c] of a VQ autoencoder, in every form
OLD_DIFFUSERS_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def compvis_entries(num_levels: int, num_res_blocks: int, attention_levels: tuple[int, ...], widens: set[str]):
    """Returns the entries of a CompVis checkpoint without its prefix.

    widens: our paths of the residual blocks that change the width, and so have a convolution on the skip.
    """

    def theirs(path: str) -> str:
        name = re.sub(r"(down|up)_(\d+)_(block|attn)_(\d+)", r"\1.\2.\3.\4", path)
        return re.sub(r"(down|up)_(\d+)_(downsample|upsample)", r"\1.\2.\3", name).replace("/", ".")

    entries: list[Entry] = []
    for path, kind in layers(num_levels, num_res_blocks, attention_levels, widens):
        entries += _layer(path, theirs(path), "conv" if kind == "attention" else kind)
    return entries


def diffusers_entries(num_levels: int, num_res_blocks: int, attention_levels: tuple[int, ...], widens: set[str]):
    """Returns the entries of a diffusers folder; there the decoder counts its levels from the latent up."""

    def theirs(path: str) -> str:
        side, *rest = path.split("/")
        if not rest:
            return path
        head, *tail = rest
        if match := re.fullmatch(r"(down|up)_(\d+)_(\w+?)(?:_(\d+))?", head):
            direction, level, part, index = match[1], int(match[2]), match[3], match[4] or "0"
            level = level if direction == "down" else num_levels - 1 - level
            part = {"block": "resnets", "attn": "attentions"}.get(part, f"{part}rs")  # downsample: downsamplers
            head = f"{direction}_blocks.{level}.{part}.{index}"
        elif head == "mid":
            block = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}[tail.pop(0)]
            head = f"mid_block.{block}"
        head = {"norm_out": "conv_norm_out"}.get(head, head)
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        names = attention if "attentions" in head else {"nin_shortcut": "conv_shortcut"}
        return ".".join([side, head, *(names.get(name, name) for name in tail)])

    entries: list[Entry] = []
    for path, kind in layers(num_levels, num_res_blocks, attention_levels, widens):
        entries += _layer(path, theirs(path), kind)
    return entries


def layers(
    num_levels: int, num_res_blocks: int, attention_levels: tuple[int, ...], widens: set[str]
) -> Iterator[tuple[str, str]]:
    """Yields (our path, kind) of every layer; kinds: conv, norm, attention (a 1x1 convolution, or linear elsewhere)."""

    def block(path: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{path}/norm1", "norm"), (f"{path}/conv1", "conv"))
        yield from ((f"{path}/norm2", "norm"), (f"{path}/conv2", "conv"))
        if path in widens:
            yield f"{path}/nin_shortcut", "conv"

    def attention(path: str) -> Iterator[tuple[str, str]]:
        yield f"{path}/norm", "norm"
        yield from ((f"{path}/{name}", "attention") for name in ("q", "k", "v", "proj_out"))

    for side, direction, extra in (("encoder", "down", 0), ("decoder", "up", 1)):
        yield f"{side}/conv_in", "conv"
        for level in range(num_levels):
            for i in range(num_res_blocks + extra):
                yield from block(f"{side}/{direction}_{level}_block_{i}")
                if level in attention_levels:
                    yield from attention(f"{side}/{direction}_{level}_attn_{i}")
            if level < num_levels - 1 and direction == "down":
                yield f"{side}/down_{level}_downsample/conv", "conv"
            if level > 0 and direction == "up":
                yield f"{side}/up_{level}_upsample/conv", "conv"
        yield from block(f"{side}/mid/block_1")
        yield from attention(f"{side}/mid/attn_1")
        yield from block(f"{side}/mid/block_2")
        yield from ((f"{side}/norm_out", "norm"), (f"{side}/conv_out", "conv"))
    yield from (("quant_conv", "conv"), ("post_quant_conv", "conv"))


def _layer(path: str, name: str, kind: str) -> Iterator[Entry]:
    if kind == "norm":
        yield Entry(f"{path}/scale", (f"{name}.weight",))
    else:
        yield Entry(f"{path}/kernel", (f"{name}.weight",), conv=True, drop_kernel_axes=kind == "attention")
    yield Entry(f"{path}/bias", (f"{name}.bias",))


def without_prefix(tensors: Tensors) -> tuple[dict, list[str]]:
    """Returns a CompVis autoencoder by the names of `compvis_entries`, and a note on each group that is left out."""
    prefix = COMPVIS_PREFIX if any(name.startswith(COMPVIS_PREFIX) for name in tensors) else ""
    kept: dict = {}
    left_out: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        own_name = name.removeprefix(prefix)
        groups = [group for start, group in NOT_PARAMETERS.items() if own_name.startswith(start)]
        if not name.startswith(prefix):
            groups = ["not the autoencoder's"]
        if groups:
            left_out.setdefault(groups[0], []).append(name)
        elif tensor.ndim == 2 and ".attn" in own_name:
            kept[own_name] = tensor[:, :, None, None]  # re-saved as a linear layer: the same numbers
        else:
            kept[own_name] = tensor
    return kept, [
        f"left out, {group}: {len(names)} tensors such as {min(names)!r}" for group, names in left_out.items()
    ]


def with_new_attention_names(tensors: Tensors) -> dict:
    """Returns a diffusers folder's tensors with attention named as newer versions name it."""

    def renamed(name: str) -> str:
        parts = name.rsplit(".", 2)
        if "attentions" in name and len(parts) == 3 and parts[1] in OLD_DIFFUSERS_ATTENTION:
            return f"{parts[0]}.{OLD_DIFFUSERS_ATTENTION[parts[1]]}.{parts[2]}"
        return name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def with_identity(tensors: Tensors, name: str, channels: int) -> dict:
    """Returns tensors with the 1x1 convolution `name` that changes nothing, for a model that has none there."""
    kernel, bias = np.eye(channels, dtype=np.float32)[:, :, None, None], np.zeros(channels, np.float32)
    return {**tensors, f"{name}.weight": kernel, f"{name}.bias": bias}


def count_codes(tensors: Tensors) -> int | None:
    """Returns the number of codes of an autoencoder in either form; None: it is KL-regularised.

    Raises:
      ValueError: where the latents between the two 1x1 convolutions have other channels than the networks around them.
    """
    kernel = tensors.get("post_quant_conv.weight")
    if kernel is not None and kernel.shape[0] != kernel.shape[1]:
        outside, inside = kernel.shape[:2]
        raise ValueError(
            f"embed_dim={inside} (diffusers: vq_embed_dim) must equal z_channels={outside} (latent_channels): "
            "an autoencoder here has one number of latent channels"
        )
    codes = tensors.get(CODES.names[0])
    return None if codes is None else len(codes)


def compvis_shape(tensors: Tensors) -> dict:
    """Returns what the shapes of a CompVis checkpoint say: `AutoencoderConfig` fields, image_channels, num_codes."""
    if "encoder.conv_in.weight" not in tensors or "post_quant_conv.weight" not in tensors:
        raise ValueError("tensor 'encoder.conv_in.weight' or 'post_quant_conv.weight' is missing; not an autoencoder's")
    base, image_channels = tensors["encoder.conv_in.weight"].shape[:2]
    found = [m for m in (re.match(r"encoder\.down\.(\d{1,3})\.block\.(\d{1,3})\.conv2\.bias", n) for n in tensors) if m]
    if not found:
        raise ValueError("tensor 'encoder.down.0.block.0.conv2.bias' is missing; not a CompVis autoencoder's")
    has_attention = lambda level: f"encoder.down.{level}.attn.0.q.weight" in tensors  # noqa: E731
    widths = {int(m[1]): len(tensors[m[0]]) for m in found}
    return {
        "base_channels": base,
        "channel_multipliers": tuple(widths[level] // base for level in sorted(widths)),
        "num_res_blocks": 1 + max(int(m[2]) for m in found),
        "attention_levels": tuple(level for level in sorted(widths) if has_attention(level)),
        "latent_channels": len(tensors["post_quant_conv.weight"]),
        "image_channels": image_channels,
        "num_codes": count_codes(tensors),
    }
