"""Small trees of arrays as a run's state has them, and workdirs with checkpoints of them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_jax.checkpoint import Checkpoints
from dit_jax.config import MeshConfig
from dit_jax.parallel.mesh import make_mesh
from tests.tiny import dit_config

CONFIG = dit_config(pathlib.Path("images"))
SPECS = {"kernel": PartitionSpec("fsdp"), "bias": PartitionSpec(), "scale": PartitionSpec()}


def make_items(step: int) -> dict:
    """Returns parameters and an optimizer's state of NumPy arrays that differ from step to step."""
    rng = np.random.default_rng(step)
    params = {
        "layer": {"kernel": rng.normal(size=(16, 24)).astype(np.float32), "bias": np.zeros(24, np.float32)},
        "norm": {"scale": rng.normal(size=8).astype(np.float32).astype(jnp.bfloat16)},
    }
    return {"params": params, "opt_state": ({"count": np.int32(step), "mu": jax.tree.map(lambda x: x * 2, params)}, ())}


def shardings_on(mesh: Mesh, items: dict) -> dict:
    """Returns where a mesh has each array: kernels split over fsdp."""

    def sharding(path: tuple, _) -> NamedSharding:
        return NamedSharding(mesh, SPECS.get(str(getattr(path[-1], "key", "")), PartitionSpec()))

    return jax.tree_util.tree_map_with_path(sharding, items)


def abstract_on(mesh: Mesh, items: dict) -> dict:
    """Returns shapes, dtypes and shardings of the items on a mesh."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=s),
        items,
        shardings_on(mesh, items),
    )


def one_device() -> Mesh:
    """Returns the mesh of a single device."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def save_steps(workdir: pathlib.Path, steps: list[int], mesh: Mesh | None = None, **options) -> list[str]:
    """Saves checkpoints of `make_items`; returns what was logged."""
    lines: list[str] = []
    with Checkpoints(workdir, **{"max_to_keep": 10} | options, log=lines.append) as checkpoints:
        for step in steps:
            items = make_items(step)
            items = jax.device_put(items, shardings_on(mesh or one_device(), items))
            checkpoints.save(step, items, CONFIG, {"loss": 1.0 / step})
    return lines


def assert_same_items(found: dict, expected: dict) -> None:
    """Asserts that two trees have the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
