"""Features do not depend, by a bit, on batches or devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import MeshConfig
from dit_jax.evaluation.features import extract_features, rebatched
from dit_jax.metrics.feature_network import FeatureNetwork
from dit_jax.parallel.mesh import make_mesh

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (75, 9, 9, 3), np.uint8)


def network():
    """Returns a network of convolutions and a matmul, such as round differently by shape."""
    params = {
        "first": RNG.standard_normal((3, 3, 3, 64)).astype(np.float32),
        "second": RNG.standard_normal((3, 3, 64, 96)).astype(np.float32) / 24,
        "last": RNG.standard_normal((96, 50)).astype(np.float32),
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
