"""Checkpoints behind one module: Orbax, asynchronous, atomic, each with the config that made it.

`<workdir>/checkpoints/<step>/` holds the items `params`, and while training `ema_params` and `opt_state`, and the
`config` as JSON. A step is complete or absent: Orbax writes aside and renames.
"""

import hashlib
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.config import Config, config_from_dict, config_to_dict
from dit_jax.json_file import read_json
from dit_jax.types import Params

CONFIG_FILE = "config.json"
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"  # folders of a workdir; snapshots: see `models.averages`


class Checkpoints:
    """The checkpoints of a workdir, newest first in use; a context manager that waits for the last save."""

    def __init__(self, workdir: str | os.PathLike, max_to_keep: int | None = None, folder: str = CHECKPOINTS):
        create = max_to_keep is not None or folder == SNAPSHOTS
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=create)
        self._path = pathlib.Path(workdir).absolute() / folder
        self._manager = ocp.CheckpointManager(self._path, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    def all_steps(self) -> list[int]:
        """Returns the complete steps, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: dict[str, Any], config: Config) -> None:
        """Starts writing the trees of arrays in `items`; returns once they are copied from the device."""
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(config=ocp.args.JsonSave(config_to_dict(config)), **arguments))

    def drop_after(self, step: int) -> None:
        """Deletes the steps after this one."""
        for later in self.all_steps():
            if later > step:
                self._manager.delete(later)

    def wait(self) -> None:
        """Returns when the last save is complete."""
        self._manager.wait_until_finished()

    def restore(self, step: int, abstract_items: dict[str, Any]) -> dict[str, Any]:
        """Returns the items, each leaf with the shape, dtype and sharding of its abstract leaf."""
        stored = {name: self._stored_form(step, name, tree) for name, tree in abstract_items.items()}
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in stored.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        return {name: jax.tree.map(_as_wanted, restored[name], tree) for name, tree in abstract_items.items()}

    def _stored_form(self, step: int, name: str, abstract: Any) -> Any:
        """Returns an item's abstract tree with the shapes that the checkpoint has.

        Older ones have fused projections as [D, k * F], not [D, k, F]; the numbers are the same in the same order.
        """
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(self._path / str(step) / name).item_metadata.tree
        shapes = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

        def stored_leaf(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            fused = (*leaf.shape[:-2], math.prod(leaf.shape[-2:]))
            if leaf.ndim < 2 or shapes.get(_name(path)) != fused:
                return leaf
            whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())  # its axes may not be those to split
            return jax.ShapeDtypeStruct(fused, leaf.dtype, sharding=whole)

        return jax.tree_util.tree_map_with_path(stored_leaf, abstract)

    def restore_config(self, step: int) -> Config:
        """Returns the config of a checkpoint."""
        restored = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        return config_from_dict(restored["config"])

    def has_item(self, step: int, name: str) -> bool:
        """Returns whether a checkpoint holds an item."""
        return (self._path / str(step) / name).is_dir()


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _as_wanted(array: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    if array.shape == wanted.shape:
        return array
    return jax.jit(lambda x: x.reshape(wanted.shape), out_shardings=wanted.sharding)(array)


def write_config(workdir: str | os.PathLike, config: Config) -> None:
    """Writes `config.json`, the config for people and for the check that a resumed run is the same run."""
    temporary = pathlib.Path(workdir) / f".{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
    os.replace(temporary, pathlib.Path(workdir) / CONFIG_FILE)


def read_config(workdir: str | os.PathLike) -> Config | None:
    """Returns the config of a workdir, None where there is none yet."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return config_from_dict(read_json(path, "restore it or choose another workdir"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_checkpoint(workdir: str | os.PathLike, step: int | None = None) -> tuple[int, Config]:
    """Returns a step of a workdir, the newest if None, and its config.

    Raises:
      ValueError: where there is no such checkpoint.
    """
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        raise ValueError(f"{workdir} has no checkpoints; give the --workdir of a `dit-jax train` run")
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.all_steps()
        if not steps:
            raise ValueError(f"{workdir} has no complete checkpoint yet; train until its first one")
        if step is not None and step not in steps:
            raise ValueError(f"{workdir} has no checkpoint of step {step}; it has {steps}")
        step = max(steps) if step is None else step
        return step, checkpoints.restore_config(step)


def restore_eval_params(workdir: str | os.PathLike, step: int, abstract: Params) -> Params:
    """Returns the weights for evaluation: the EMA if the run keeps one, else the parameters."""
    with Checkpoints(workdir) as checkpoints:
        name = "ema_params" if checkpoints.has_item(step, "ema_params") else "params"
        return checkpoints.restore(step, {name: abstract})[name]


def params_digest(params: Params) -> str:
    """Returns a SHA-256 of the parameters' names, shapes and content: the identity of a trained network."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
