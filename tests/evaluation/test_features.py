"""Features do not depend, by a bit, on batches, devices or processes."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import MeshConfig
from dit_jax.evaluation.features import extract_features, rebatched
from dit_jax.metrics.feature_network import FeatureNetwork
from dit_jax.parallel.mesh import make_mesh

IMAGES = np.random.default_rng(0).integers(0, 256, (75, 9, 9, 3), np.uint8)


def network():
    """Returns a network of convolutions and a matmul, such as round differently by shape."""
    rng = np.random.default_rng(1)
    params = {
        "first": rng.standard_normal((3, 3, 3, 64)).astype(np.float32),
        "second": rng.standard_normal((3, 3, 64, 96)).astype(np.float32) / 24,
        "last": rng.standard_normal((96, 50)).astype(np.float32),
    }

    def apply(params, images):
        x = images / 128 - 1.0
        for name in ("first", "second"):
            x = jax.lax.conv_general_dilated(
                x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        pool = x.mean(axis=(1, 2))
        return {"pool": pool, "logits": pool @ params["last"], "unused": pool + 1}

    return FeatureNetwork("test", "FD-test", params, apply)


def extract(network, sizes, num_devices=1, **mesh):
    mesh = make_mesh(MeshConfig(**mesh), jax.devices()[:num_devices])
    batches = np.split(IMAGES, np.cumsum(sizes)[:-1])
    found = list(extract_features(network, batches, mesh, ("pool", "logits")))
    return {name: np.concatenate([outputs[name] for outputs in found]) for name in ("pool", "logits")}


def test_features_do_not_depend_on_batches_or_devices():
    net = network()
    expected = extract(net, [75])
    whole = net.apply(net.params, jnp.asarray(IMAGES))
    for name, array in expected.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, whole[name], rtol=0, atol=1e-4)
    for sizes, devices, mesh in (([1] * 75, 1, {}), ([64, 11], 2, {}), ([30, 45], 8, {"data": 2, "fsdp": 4})):
        found = extract(net, sizes, devices, **mesh)
        for name, array in expected.items():
            assert np.array_equal(found[name], array), (sizes, devices, name)


@pytest.mark.parametrize("sizes", [[10], [1] * 10, [7, 3], [3, 0, 7]])
def test_rows_keep_their_order_in_batches_of_another_size(sizes):
    batches = list(rebatched(np.split(np.arange(10), np.cumsum(sizes)[:-1]), 4))
    assert [list(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(rebatched([], 4)) == []


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from dit_jax.parallel.distributed import start_processes
start_processes()
import test_features
assert jax.process_count() == 2 and len(jax.devices()) == 4
found = test_features.extract(test_features.network(), [20, 55], 4)
np.savez(sys.argv[2], **found)
"""


def test_features_do_not_depend_on_processes(tmp_path):
    """Two processes of two devices; each has all the images and gets all the features."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "DIT_JAX_NUM_PROCESSES": "2"}
    environment |= {"DIT_JAX_COORDINATOR": coordinator}
    command = [sys.executable, "-c", PROCESS, str(pathlib.Path(__file__).parent)]
    processes = [
        subprocess.Popen([*command, tmp_path / f"{i}.npz"], env=environment | {"DIT_JAX_PROCESS_ID": str(i)})
        for i in range(2)
    ]
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    expected = extract(network(), [75])
    for i in range(2):
        found = np.load(tmp_path / f"{i}.npz")
        for name, array in expected.items():
            assert np.array_equal(found[name], array), name
