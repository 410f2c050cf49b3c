"""Trees of arrays in files, as Orbax writes and reads them: one folder (an item of a checkpoint) a tree.

Orbax's handlers are used by themselves: they have no barriers, and so no process waits for one that fails.
"""

import asyncio
import glob
import logging
import math
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dit_jax.checkpoint.content import leaf_name


class OrbaxPath(epath.gpath.PosixGPath):
    """A folder as Orbax takes it, that is found also where its name has a wildcard: [, ], * or ?."""

    def glob(self, pattern: str) -> Iterator["OrbaxPath"]:
        """Yields what matches the pattern in this folder; etils' own takes the folder's name for a pattern, too."""
        return (self / name for name in glob.glob(pattern, root_dir=self))


# What asyncio says of Orbax's other tasks where one has failed.
GIVEN_UP = ("exception was never retrieved", "unhandled exception during asyncio.run() shutdown")
READ_BACK_BYTES = 1 << 29  # in memory at once, where arrays are read to be compared


def _is_news(record: logging.LogRecord) -> bool:
    """Returns False for errors that Orbax raises too: on a full disk it logs one of each array, with its trace."""
    # Some versions of absl name themselves as the place that logs: the error's trace knows better.
    trace = record.exc_info[2] if record.exc_info else None
    places = [record.pathname, *(frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))]
    from_orbax = record.levelno == logging.ERROR and any("orbax" in place for place in places)
    return not from_orbax and not any(text in str(record.msg) for text in GIVEN_UP)


for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(_is_news)

_unraisablehook = sys.unraisablehook


def _print_news(unraisable: "sys.UnraisableHookArgs") -> None:
    """Prints an error, but those of TensorStore's threads about a save that Orbax has given up: one an array."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        _unraisablehook(unraisable)


sys.unraisablehook = _print_news


def start_write(folder: pathlib.Path, tree: Any) -> Callable[[], None]:
    """Starts to write this process's shards; returns once they are copied from the device what waits for the files."""
    handler = ocp.StandardCheckpointHandler()
    futures = asyncio.run(handler.async_save(OrbaxPath(folder), args=ocp.args.StandardSave(tree)))

    def wait() -> None:
        for future in futures or ():
            future.result()

    return wait


def own_files(process: int) -> str:
    """Returns the folder, within an item's, of what a process writes itself."""
    return f"ocdbt.process_{process}"


def finish_item(folder: pathlib.Path) -> None:
    """Makes one store of what all processes have written."""
    ocp.StandardCheckpointHandler().finalize(OrbaxPath(folder))


def item_type(is_json: bool) -> str:
    """Returns the name of the class that Orbax's CheckpointManager reads an item with."""
    handler = ocp.JsonCheckpointHandler if is_json else ocp.StandardCheckpointHandler
    return f"{handler.__module__}.{handler.__qualname__}"


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns a tree's leaves by `leaf_name`."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def stored_form(folder: pathlib.Path, abstract: Any) -> Any:
    """Returns an abstract tree with the shapes and dtypes that its item has.

    Older ones have fused projections as [D, k * F], not [D, k, F]; the numbers are the same in the same order.
    """
    stored = named_leaves(_metadata(folder))

    def form(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
        there = stored.get(leaf_name(path), leaf)
        if there.shape == leaf.shape:
            return jax.ShapeDtypeStruct(leaf.shape, there.dtype, sharding=sharding)
        if leaf.ndim < 2 or there.shape != (*leaf.shape[:-2], math.prod(leaf.shape[-2:])):
            raise ValueError(f"{folder.name}/{leaf_name(path)} is {there.shape}, not {leaf.shape}")
        if isinstance(sharding, NamedSharding):  # its axes may not be those to split
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(there.shape, there.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(form, abstract)


def read_tree(folder: pathlib.Path, stored: Any) -> Any:
    """Returns an item's arrays, as its `stored_form` has them; each process reads the shards that it holds."""
    return ocp.StandardCheckpointHandler().restore(OrbaxPath(folder), args=ocp.args.StandardRestore(stored))


def as_wanted(array: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array, read in its stored form, in the wanted one."""
    if array.shape == wanted.shape and array.dtype == wanted.dtype:
        return array
    return jax.jit(lambda x: x.reshape(wanted.shape).astype(wanted.dtype), out_shardings=wanted.sharding)(array)


def read_back(folder: pathlib.Path, share: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every n-th array of an item from the i-th on, share = (i, n), by name; without any device."""
    tree = _metadata(folder)
    number, count = share
    left = list(named_leaves(tree).items())[number::count]
    while left:
        batch, size = set(), 0
        while left and (not batch or size + _num_bytes(left[0][1]) <= READ_BACK_BYTES):
            name, stored = left.pop(0)
            batch.add(name)
            size += _num_bytes(stored)
        item = jax.tree_util.tree_map_with_path(
            lambda path, leaf, batch=batch: leaf if leaf_name(path) in batch else ocp.PLACEHOLDER, tree
        )
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        arguments = ocp.args.PyTreeRestore(item, restore_args=numpy)
        arrays = named_leaves(ocp.PyTreeCheckpointHandler().restore(OrbaxPath(folder), args=arguments))
        yield from ((name, arrays[name]) for name in batch)


def _metadata(folder: pathlib.Path) -> Any:
    """Returns an item's tree with, in place of arrays, what is written about them."""
    return ocp.StandardCheckpointHandler().metadata(OrbaxPath(folder)).tree


def _num_bytes(stored: Any) -> int:
    return math.prod(stored.shape) * np.dtype(stored.dtype).itemsize
