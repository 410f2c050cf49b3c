"""Names of DINOv2's parameters in released files (`dinov2_vitl14_pretrain.pth`) and in transformers' `Dinov2Model`."""

import re
from collections.abc import Iterator

from dit_jax.pretrained.name_map import Entry, Tensors

PATCH_SIZE = 14
CLASS_TOKEN, HF_CLASS_TOKEN = "cls_token", "embeddings.cls_token"
PATCHES = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")  # of either form
UNUSED = ("mask_token", "embeddings.mask_token")  # training's


def dinov2_shape(tensors: Tensors) -> tuple[int, int]:
    """Returns the width and depth of either form.

    Raises:
      ValueError: where it is neither.
    """
    token = tensors.get(CLASS_TOKEN, tensors.get(HF_CLASS_TOKEN))
    blocks = [re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", name) for name in tensors]
    numbers = {int(match[1]) for match in blocks if match}
    if token is None or not numbers or not token.shape[-1]:
        raise ValueError(f"tensor {CLASS_TOKEN!r} or those of its blocks are missing; not a DINOv2's")
    if token.shape[-1] % 64:
        raise ValueError(f"tensor {CLASS_TOKEN!r} must have whole heads of 64, but has shape {token.shape}")
    return token.shape[-1], len(numbers)


def dinov2_entries(tensors: Tensors, depth: int) -> list[Entry]:
    """Returns the entries of the form that the tensors are in."""
    return list(_huggingface(depth) if HF_CLASS_TOKEN in tensors else _released(depth))


def without_mask(tensors: Tensors) -> dict:
    """Returns the tensors that the features depend on."""
    return {name: tensor for name, tensor in tensors.items() if name not in UNUSED}


def _released(depth: int) -> Iterator[Entry]:
    yield from (Entry(CLASS_TOKEN, (CLASS_TOKEN,)), Entry("pos_embed", ("pos_embed",)))
    yield from _patches("patch_embed.proj")
    yield from _norm("norm", "norm")
    for i in range(depth):
        ours, theirs = f"blocks_{i}", f"blocks.{i}"
        yield from (*_norm(f"{ours}/norm1", f"{theirs}.norm1"), *_norm(f"{ours}/norm2", f"{theirs}.norm2"))
        yield from _linear(f"{ours}/qkv", f"{theirs}.attn.qkv")
        for layer, name in (("proj", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
            yield from _linear(f"{ours}/{layer}", f"{theirs}.{name}")
        yield from (Entry(f"{ours}/ls{j}", (f"{theirs}.ls{j}.gamma",)) for j in (1, 2))


def _huggingface(depth: int) -> Iterator[Entry]:
    yield Entry(CLASS_TOKEN, (HF_CLASS_TOKEN,))
    yield Entry("pos_embed", ("embeddings.position_embeddings",))
    yield from _patches("embeddings.patch_embeddings.projection")
    yield from _norm("norm", "layernorm")
    for i in range(depth):
        ours, theirs = f"blocks_{i}", f"encoder.layer.{i}"
        yield from (*_norm(f"{ours}/norm1", f"{theirs}.norm1"), *_norm(f"{ours}/norm2", f"{theirs}.norm2"))
        yield from _linear(f"{ours}/qkv", *(f"{theirs}.attention.attention.{x}" for x in ("query", "key", "value")))
        for layer, name in (("proj", "attention.output.dense"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
            yield from _linear(f"{ours}/{layer}", f"{theirs}.{name}")
        yield from (Entry(f"{ours}/ls{j}", (f"{theirs}.layer_scale{j}.lambda1",)) for j in (1, 2))


def _patches(name: str) -> Iterator[Entry]:
    yield Entry("patch_embed/kernel", (f"{name}.weight",), patch_size=PATCH_SIZE)
    yield Entry("patch_embed/bias", (f"{name}.bias",))


def _norm(path: str, name: str) -> Iterator[Entry]:
    yield from (Entry(f"{path}/scale", (f"{name}.weight",)), Entry(f"{path}/bias", (f"{name}.bias",)))


def _linear(path: str, *names: str) -> Iterator[Entry]:
    yield Entry(f"{path}/kernel", tuple(f"{name}.weight" for name in names), linear=True)
    yield Entry(f"{path}/bias", tuple(f"{name}.bias" for name in names), flat=True)
