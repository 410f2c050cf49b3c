"""A workdir's config and checkpoints, as those who only read them want them: `config.json`, the newest good step."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np

from dit_jax.checkpoint.manifest import DamagedCheckpoint
from dit_jax.checkpoint.store import CHECKPOINTS, SNAPSHOTS, Checkpoints
from dit_jax.config import Config, config_from_dict, config_to_dict
from dit_jax.files import read_json, to_json, write_text_whole
from dit_jax.types import Params

CONFIG_FILE = "config.json"
EVAL_ITEMS = ("ema_params", "params")  # weights for evaluation are in the first that a checkpoint has

Value = TypeVar("Value")


def write_config(workdir: str | os.PathLike, config: Config) -> None:
    """Writes `config.json`, the config for people and for the check that a resumed run is the same run."""
    write_text_whole(pathlib.Path(workdir) / CONFIG_FILE, to_json(config_to_dict(config)))


def read_config(workdir: str | os.PathLike) -> Config | None:
    """Returns the config of a workdir, None where there is none yet."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    try:
        return config_from_dict(read_json(path, "restore it or choose another workdir"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_newest_good(
    workdir: str | os.PathLike, read: Callable[[int], Value], step: int | None = None
) -> tuple[int, Value]:
    """Returns a step of a workdir, the newest that can be read if None, and what `read` of it gives.

    Raises:
      DamagedCheckpoint: where the checkpoint of `step` is.
      ValueError: where there is no such checkpoint, or none that can be read.
    """
    if not (pathlib.Path(workdir) / CHECKPOINTS).is_dir():
        raise ValueError(f"{workdir} has no checkpoints; give the --workdir of a `dit-jax train` run")
    checkpoints = Checkpoints(workdir)
    if step is None:
        found = checkpoints.newest_good(read)
        if found is None:
            raise ValueError(f"{workdir} has no complete checkpoint yet; train until its first one")
        return found
    if step not in checkpoints.all_steps():
        raise ValueError(f"{workdir} has no checkpoint of step {step}; it has {checkpoints.all_steps()}")
    return step, read(step)


def find_checkpoint(workdir: str | os.PathLike, step: int | None = None) -> tuple[int, Config]:
    """Returns a step of a workdir, the newest whose config and weights are intact if None, and its config.

    Raises:
      ValueError: where there is no such checkpoint, or none that can be read.
    """
    intact = EVAL_ITEMS if step is None else ()  # of a step that was asked for, an error is told when it is read
    return read_newest_good(workdir, lambda step: Checkpoints(workdir).restore_config(step, intact), step)


def verify_workdir(workdir: str | os.PathLike) -> Iterator[dict]:
    """Yields what became of each checkpoint and snapshot below a workdir, also of the autoencoder in it.

    A dict has its "path" there, its "state" ("good", "damaged", or "unverifiable" without a manifest) and, if good, how
    many "arrays" and "bytes" it has, else the "reason".
    """
    workdir = pathlib.Path(workdir)
    folders = sorted(path for name in (CHECKPOINTS, SNAPSHOTS) for path in workdir.rglob(name) if path.is_dir())
    for folder in folders:
        checkpoints = Checkpoints(folder.parent, folder=folder.name)
        for step in checkpoints.all_steps():
            report = {"path": (folder / str(step)).relative_to(workdir).as_posix()}
            try:
                manifest = checkpoints.verify(step)
            except DamagedCheckpoint as error:
                yield report | {"state": "damaged", "reason": str(error)}
                continue
            if manifest is None:
                yield report | {"state": "unverifiable", "reason": "an older version wrote it, without a manifest"}
                continue
            num_arrays = sum(map(len, manifest.arrays.values()))
            num_bytes = sum(size for size, _ in manifest.files.values())
            yield report | {"state": "good", "arrays": num_arrays, "bytes": num_bytes}


def restore_eval_params(workdir: str | os.PathLike, step: int, abstract: Params) -> Params:
    """Returns the weights for evaluation: the EMA if the run keeps one, else the parameters."""
    checkpoints = Checkpoints(workdir)
    held = checkpoints.items(step)
    name = next((name for name in EVAL_ITEMS if name in held), EVAL_ITEMS[-1])
    return checkpoints.restore(step, {name: abstract})[name]


def read_alone(workdir: str | os.PathLike) -> tuple[Config, dict[str, np.ndarray]]:
    """Returns the config and, by name, the weights for evaluation of a workdir's newest good checkpoint.

    They are compared with its manifest, by this process alone and without any device.

    Raises:
      ValueError: where there is no checkpoint, or none that is intact.
    """
    checkpoints, damaged = Checkpoints(workdir), []
    for step in reversed(checkpoints.all_steps()):
        try:
            return checkpoints.read_alone(step, EVAL_ITEMS)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
    raise ValueError("; ".join(damaged) or f"{workdir} has no checkpoint")


def params_digest(params: Params) -> str:
    """Returns a SHA-256 of the parameters' names, shapes and content: the identity of a trained network."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
