"""Between another program's named tensors and our tree of parameters: a table of entries, read in both directions."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange

from dit_jax.types import Params

Tensors = Mapping[str, np.ndarray]


class Entry(NamedTuple):
    """One of our parameters, and the tensors that hold it elsewhere."""

    path: str  # ours, keys joined by "/"
    names: tuple[str, ...]  # theirs, joined along their first axis
    linear: bool = False  # theirs is [outputs, inputs], ours [inputs, outputs], or [inputs, k, outputs / k] of k fused
    flat: bool = False  # theirs is [outputs], ours too, or [k, outputs / k] of k fused
    heads: int | None = None  # theirs has q, k and v of one head after another as outputs; ours all q, all k, all v
    patch_size: int | None = None  # theirs is a convolution over patches [outputs, channels, p, p], ours [p * p * C, D]
    conv: bool = False  # theirs is [outputs, inputs, h, w], ours [h, w, inputs, outputs]
    drop_kernel_axes: bool = False  # theirs is the [outputs, inputs] of a 1x1 convolution; read in either form
    copies: tuple[str, ...] = ()  # further tensors that must hold the same as the first


def from_tensors(entries: Sequence[Entry], tensors: Tensors, abstract: Params) -> Params:
    """Returns our parameters, float32, of another program's tensors.

    Args:
      entries: one for each of our parameters; tensors: by their names, nothing but what the entries name.
      abstract: our tree of shapes.

    Raises:
      ValueError: naming the first tensor that is missing, extra, of another shape, or unlike its copy.
    """
    expected = {name for entry in entries for name in (*entry.names, *entry.copies)}
    for problem, names in (("is missing", expected - set(tensors)), ("is not expected", set(tensors) - expected)):
        if names:
            raise ValueError(f"tensor {min(names)!r} {problem} ({len(names)} such)")
    shapes = dict(flatten(abstract))
    params: dict = {}
    for entry in entries:
        shape = shapes[entry.path].shape
        if entry.drop_kernel_axes:
            tensors = tensors | {name: _without_kernel_axes(tensors[name]) for name in entry.names}
        parts = _to_theirs(np.broadcast_to(np.float32(0), shape), entry)  # for their shapes
        for name, part in zip(entry.names, parts, strict=True):
            if tensors[name].shape != part.shape:
                raise ValueError(f"tensor {name!r} must have shape {part.shape}, but has {tensors[name].shape}")
        joined = np.concatenate([tensors[name] for name in entry.names])
        for name in entry.copies:
            if not np.array_equal(tensors[name], joined):
                raise ValueError(f"tensor {name!r} must equal {entry.names[0]!r}: here they are one parameter")
        *parents, leaf = entry.path.split("/")
        branch = params
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[leaf] = np.ascontiguousarray(_to_ours(joined, entry), np.float32).reshape(shape)
    return params


def to_tensors(entries: Sequence[Entry], params: Params) -> dict[str, np.ndarray]:
    """Returns another program's tensors, float32, of our parameters."""
    arrays = dict(flatten(params))
    tensors = {}
    for entry in entries:
        array = np.asarray(arrays[entry.path], np.float32)
        for name, part in zip(entry.names, _to_theirs(array, entry), strict=True):
            tensors[name] = np.ascontiguousarray(part)
        tensors |= dict.fromkeys(entry.copies, tensors[entry.names[0]])
    return tensors


def flatten(tree: Params, prefix: str = "") -> Iterable[tuple[str, np.ndarray]]:
    """Yields (path joined by "/", leaf) of a tree of dicts."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def unwrapped(tensors: Tensors, firsts: Sequence[str], inside: str = "") -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns a model's tensors without what a program that holds the model put before their names, and notes.

    Args:
      firsts: names, one of which every such model has; inside: what stands before them where the model is part of one
        whose other tensors are wanted too, and stays.

    Raises:
      ValueError: where two such models are there.
    """
    found = {name.removesuffix(first) for first in firsts for name in tensors if f".{name}".endswith(f".{first}")}
    found = {prefix.removesuffix(inside) for prefix in found if prefix.endswith(inside)} or found
    averages = {prefix for prefix in found if "ema" in re.split(r"[._]", prefix)}
    prefixes = sorted(averages if len(found) > 1 == len(averages) else found)
    if len(prefixes) > 1 and "" not in prefixes:
        raise ValueError(f"the tensors of two models are there, of {prefixes[0]!r} and of {prefixes[1]!r}; keep one")
    if not prefixes or "" in prefixes:
        return dict(tensors), []
    kept = {name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items() if name.startswith(prefixes[0])}
    left = sorted(name for name in tensors if not name.startswith(prefixes[0]))
    notes = [f"taken: the tensors whose names begin with {prefixes[0]!r}"]
    return kept, notes + [f"left out: {len(left)} tensors such as {name!r}" for name in left[:1]]


def _to_ours(array: np.ndarray, entry: Entry) -> np.ndarray:
    if entry.patch_size:
        return rearrange(array, "d c p q -> (p q c) d")
    if entry.conv:
        array = array[:, :, None, None] if entry.drop_kernel_axes else array
        return array.transpose(2, 3, 1, 0)
    if entry.heads:
        array = rearrange(array, "(n three d) ... -> (three n d) ...", n=entry.heads, three=3)
    return array.T if entry.linear else array


def _to_theirs(array: np.ndarray, entry: Entry) -> list[np.ndarray]:
    if entry.patch_size:
        array = rearrange(array, "(p q c) d -> d c p q", p=entry.patch_size, q=entry.patch_size)
    elif entry.conv:
        array = array.transpose(3, 2, 0, 1)
        array = array[:, :, 0, 0] if entry.drop_kernel_axes else array
    elif entry.linear:
        array = array.reshape(len(array), -1).T
    elif entry.flat:
        array = array.reshape(-1)
    if entry.heads:
        array = rearrange(array, "(three n d) ... -> (n three d) ...", n=entry.heads, three=3)
    return np.split(array, len(entry.names))


def _without_kernel_axes(array: np.ndarray) -> np.ndarray:
    return array[:, :, 0, 0] if array.ndim == 4 and array.shape[2:] == (1, 1) else array
