"""The Inception-v3 of 2015-12-05 becomes the same file from its PyTorch port and from TensorFlow's graph."""

import functools

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from random_networks import random_params
from tensorflow.core.framework import graph_pb2, types_pb2

from dit_jax.cli.main import main
from dit_jax.evaluation.feature_networks import load_network
from dit_jax.metrics.inception import abstract_inception

# TensorFlow's names of the layers, by the port's.
STEM = dict(
    zip(
        ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
        ("conv", "conv_1", "conv_2", "conv_3", "conv_4"),
        strict=True,
    )
)
A = """branch1x1 conv  branch5x5_1 tower/conv  branch5x5_2 tower/conv_1  branch3x3dbl_1 tower_1/conv
    branch3x3dbl_2 tower_1/conv_1  branch3x3dbl_3 tower_1/conv_2  branch_pool tower_2/conv"""
B = "branch3x3 conv  branch3x3dbl_1 tower/conv  branch3x3dbl_2 tower/conv_1  branch3x3dbl_3 tower/conv_2"
C = """branch1x1 conv  branch7x7_1 tower/conv  branch7x7_2 tower/conv_1  branch7x7_3 tower/conv_2
    branch7x7dbl_1 tower_1/conv  branch7x7dbl_2 tower_1/conv_1  branch7x7dbl_3 tower_1/conv_2
    branch7x7dbl_4 tower_1/conv_3  branch7x7dbl_5 tower_1/conv_4  branch_pool tower_2/conv"""
D = """branch3x3_1 tower/conv  branch3x3_2 tower/conv_1  branch7x7x3_1 tower_1/conv  branch7x7x3_2 tower_1/conv_1
    branch7x7x3_3 tower_1/conv_2  branch7x7x3_4 tower_1/conv_3"""
E = """branch1x1 conv  branch3x3_1 tower/conv  branch3x3_2a tower/mixed/conv  branch3x3_2b tower/mixed/conv_1
    branch3x3dbl_1 tower_1/conv  branch3x3dbl_2 tower_1/conv_1  branch3x3dbl_3a tower_1/mixed/conv
    branch3x3dbl_3b tower_1/mixed/conv_1  branch_pool tower_2/conv"""
BLOCKS = {"5b mixed": A, "5c mixed_1": A, "5d mixed_2": A, "6a mixed_3": B, "6b mixed_4": C, "6c mixed_5": C}
BLOCKS |= {"6d mixed_6": C, "6e mixed_7": C, "7a mixed_8": D, "7b mixed_9": E, "7c mixed_10": E}


def graph_layers():
    layers = dict(STEM)
    for names, table in BLOCKS.items():
        (port, graph), words = names.split(), table.split()
        layers |= {
            f"Mixed_{port}/{ours}": f"{graph}/{theirs}" for ours, theirs in zip(words[::2], words[1::2], strict=True)
        }
    return layers


@functools.lru_cache
def random_inception():
    return random_params(abstract_inception())


def port_tensors():
    """Returns the port's tensors by name, in its layout."""
    tensors = {}
    for path, array in flatten_dict(random_inception(), sep="/").items():
        name = path.replace("/kernel", "/weight").replace("/scale", "/weight").replace("/mean", "/running_mean")
        order = (3, 2, 0, 1) if array.ndim == 4 else range(array.ndim)[::-1]
        tensors[name.replace("/var", "/running_var").replace("/", ".")] = array.transpose(order)
    return tensors


def graph(change=None):
    """Returns the graph's bytes: constants among other nodes."""
    message = graph_pb2.GraphDef()
    message.node.add(name="ExpandDims", op="ExpandDims", input=["DecodeJpeg"])
    leaves = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
    layers, params = graph_layers(), flatten_dict(random_inception(), sep="/")
    for path, array in params.items():
        layer, part, leaf = path.rsplit("/", 2) if not path.startswith("fc/") else ("", *path.split("/"))
        if part == "fc":
            name = {"kernel": "softmax/weights", "bias": "softmax/biases"}[leaf]
        else:
            name = f"{layers[layer]}/{'conv2d_params' if part == 'conv' else f'batchnorm/{leaves[leaf]}'}"
        node = message.node.add(name=name, op="Const")
        tensor = node.attr["value"].tensor
        tensor.dtype = types_pb2.DT_FLOAT
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)
        if name == "softmax/biases":
            tensor.float_val.extend(array.tolist())  # the other form of a constant
        else:
            tensor.tensor_content = array.tobytes()
        if change:
            change(node)
    layer = message.node.add(name="pool_3/shape", op="Const")
    layer.attr["value"].tensor.dtype = types_pb2.DT_INT32
    return message.SerializeToString()


def convert(source, output):
    main(["convert", "--kind=inception", f"--input={source}", f"--output={output}"])
    return output


def save_port(path, tensors):
    torch.save({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}, path)
    return path


def test_the_port_and_the_graph_give_the_same_network(tmp_path):
    state = port_tensors() | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.array(7)}
    port = convert(save_port(tmp_path / "pt_inception-2015-12-05-6726825d.pth", state), tmp_path / "port.safetensors")
    (tmp_path / "classify_image_graph_def.pb").write_bytes(graph())
    of_graph = convert(tmp_path / "classify_image_graph_def.pb", tmp_path / "graph.safetensors")
    for path in (port, of_graph):
        jax.tree.map(np.testing.assert_array_equal, load_network(path).params, random_inception())
    assert port.read_bytes() == of_graph.read_bytes()


def refused(source, message, capsys):
    with pytest.raises(SystemExit):
        convert(source, source.with_name("out.safetensors"))
    line = capsys.readouterr().err.strip()
    assert line.count("\n") == 0 and message in line and str(source) in line, line
    assert not source.with_name("out.safetensors").exists()


def test_what_does_not_fit_is_named(tmp_path, capsys):
    tensors = port_tensors()
    lacking = {name: array for name, array in tensors.items() if name != "Mixed_7c.branch_pool.bn.running_var"}
    refused(save_port(tmp_path / "a.pth", lacking), "'Mixed_7c.branch_pool.bn.running_var' is missing", capsys)
    torchvisions = tensors | {"fc.weight": np.zeros((1000, 2048), np.float32)}
    refused(save_port(tmp_path / "b.pth", torchvisions), "'fc.weight' must have shape (1008, 2048)", capsys)
    more = tensors | {"AuxLogits.fc.bias": np.zeros(1000, np.float32)}
    refused(save_port(tmp_path / "c.pth", more), "'AuxLogits.fc.bias' is not expected", capsys)


def test_a_graph_that_is_damaged_or_another_is_named(tmp_path, capsys):
    path = tmp_path / "graph.pb"
    whole = graph()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "truncated or not a TensorFlow graph", capsys)
    path.write_bytes(graph(lambda node: setattr(node, "name", f"model/{node.name}")))
    refused(path, "is missing", capsys)

    def claims_more(node):
        if node.name == "conv/conv2d_params":
            node.attr["value"].tensor.tensor_shape.dim[0].size = 2**40

    path.write_bytes(graph(claims_more))
    refused(path, "constant 'conv/conv2d_params' must be [1099511627776, 3, 3, 32] floats, but has 864", capsys)


def test_a_file_of_something_else_is_no_network(tmp_path):
    save_port(tmp_path / "other.pth", {"weight": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"other.pth: tensor .* is missing"):
        load_network(tmp_path / "other.pth")
