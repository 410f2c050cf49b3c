"""Checkpoints of older versions."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.checkpoint import Checkpoints
from dit_jax.config import MeshConfig
from dit_jax.parallel.mesh import make_mesh
from tests.tiny import dit_config


def remove_manifest(folder):
    """Makes of a checkpoint one that was saved before there were manifests."""
    shutil.rmtree(folder / "manifest")
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    del metadata["item_handlers"]["manifest"]
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))


def test_fused_projections_that_were_saved_as_one_matrix_are_restored_bit_for_bit(tmp_path):
    kernel, bias = np.random.default_rng(0).normal(size=(16, 48)).astype(np.float32), np.arange(48, dtype=np.float32)
    other = np.arange(12, dtype=np.float32).reshape(3, 4)
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    optimizer = optax.adamw(1e-3)

    def tree(*qkv_shape):
        shapes = {"kernel": (16, *qkv_shape), "bias": qkv_shape}
        return {"qkv": {name: x.reshape(shapes[name]) for name, x in (("kernel", kernel), ("bias", bias))}, "x": other}

    def moments(params):
        return jax.tree.map(lambda x: x + 1 if x.ndim else x, optimizer.init(params))

    old, new = (jax.tree.map(jnp.asarray, tree(*shape)) for shape in ((48,), (3, 16)))
    with Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        checkpoints.save(3, {"params": old, "opt_state": moments(old)}, dit_config(tmp_path))
        checkpoints.wait()
        split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, None, "tensor"), ()))
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim == 3 else whole),
            {"params": new, "opt_state": moments(new)},
        )
        remove_manifest(tmp_path / "checkpoints" / "3")
        checkpoints.log = (lines := []).append
        restored = checkpoints.restore(3, abstract)
    assert len(lines) == 1 and "has no manifest" in lines[0] and "cannot be verified" in lines[0]
    jax.tree.map(np.testing.assert_array_equal, restored, {"params": new, "opt_state": moments(new)})
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)
