"""Names of the parameters of the Inception-v3 of 2015-12-05 in its PyTorch port and in TensorFlow's own graph."""

import pathlib
import re
from collections.abc import Iterator

import numpy as np

from dit_jax.pretrained.name_map import Entry, Tensors, flatten
from dit_jax.types import Params

UNUSED = "num_batches_tracked"  # PyTorch's counters of training
MAX_GRAPH_BYTES = 2**28  # the released graph has 96 MB
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")  # in order
STEM_TENSOR = "Conv2d_1a_3x3.conv.weight"  # of the port
BLOCKS = ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]  # in order
TOWERS = {"3x3": 0, "5x5": 0, "7x7": 0, "3x3dbl": 1, "7x7dbl": 1, "7x7x3": 1, "pool": 2}  # by a branch's name
PORT_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
GRAPH_LEAVES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def port_entries(params: Params) -> Iterator[Entry]:
    """Yields the entries of `pt_inception-2015-12-05-6726825d.pth`, whose names ours follow."""
    for path, _ in flatten(params):
        *parents, leaf = path.split("/")
        kernel = leaf == "kernel"
        name = ".".join([*parents, PORT_LEAVES[leaf]])
        yield Entry(path, (name,), conv=kernel and parents[-1] == "conv", linear=kernel and parents[-1] == "fc")


def without_counters(tensors: Tensors) -> dict:
    """Returns the tensors of a port's file that are parameters."""
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] != UNUSED}


def graph_entries(params: Params) -> Iterator[Entry]:
    """Yields the entries of TensorFlow's graph, in whose layout ours are."""
    for path, _ in flatten(params):
        *parents, leaf = path.split("/")
        if parents == ["fc"]:
            yield Entry(path, ("softmax/weights" if leaf == "kernel" else "softmax/biases",))
        else:
            layer = graph_layer("/".join(parents[:-1]))
            part = "conv2d_params" if leaf == "kernel" else f"batchnorm/{GRAPH_LEAVES[leaf]}"
            yield Entry(path, (f"{layer}/{part}",))


def graph_layer(path: str) -> str:
    """Returns the graph's name of a layer, such as `mixed_9/tower/mixed/conv_1` of `Mixed_7b/branch3x3_2b`.

    The graph counts what has one name: conv, conv_1, ...; a branch of several convolutions is a tower.
    """
    if path in STEM:
        return _counted("conv", STEM.index(path))
    block, branch = path.split("/")
    mixed = _counted("mixed", BLOCKS.index(block.removeprefix("Mixed_")))
    kind, number, split = re.fullmatch(r"branch_?(\w+?)(?:_(\d)([ab]?))?", branch).groups()
    if kind != "pool" and number is None:
        return f"{mixed}/conv"  # of one convolution
    tower = 0 if block == "Mixed_6a" else TOWERS[kind]  # there it is the only one
    conv = f"mixed/{_counted('conv', 'ab'.index(split))}" if split else _counted("conv", int(number or 1) - 1)
    return f"{mixed}/{_counted('tower', tower)}/{conv}"


def read_graph(path: pathlib.Path, names: set[str]) -> dict[str, np.ndarray]:
    """Returns those constants of a frozen TensorFlow graph that are named and float32.

    The graph is parsed, never run.

    Raises:
      ValueError: where the file is not a graph, or a constant's bytes do not fit its shape.
    """
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise ValueError(f"{path} must be at most {MAX_GRAPH_BYTES:,} bytes, but has {path.stat().st_size:,}")
    from google.protobuf.message import DecodeError
    from tensorflow.core.framework import graph_pb2, types_pb2

    graph = graph_pb2.GraphDef()
    try:
        graph.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is truncated or not a TensorFlow graph ({error}); fetch it again") from error
    tensors = {}
    for node in graph.node:
        if node.op != "Const" or node.name not in names:
            continue
        tensor = node.attr["value"].tensor
        shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
        values = (
            np.frombuffer(tensor.tensor_content, "<f4") if tensor.tensor_content else np.array(tensor.float_val, "f4")
        )
        if (
            tensor.dtype != types_pb2.DT_FLOAT
            or min(shape, default=1) < 1
            or values.size != np.prod(shape, dtype=object)
        ):
            raise ValueError(f"{path}: constant {node.name!r} must be {list(shape)} floats, but has {values.size:,}")
        tensors[node.name] = values.reshape(shape)
    return tensors


def _counted(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name
