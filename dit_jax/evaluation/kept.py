"""What evaluation makes once and keeps: weights as safetensors, arrays as `.npz`, each with a sum of its content.

What is damaged, or of something else than its name says, is told in one line and made again.
"""

import hashlib
import json
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dit_jax.checkpoint import params_digest
from dit_jax.files import check_seal, file_lock, parse_json, sealed, written_whole
from dit_jax.parallel.distributed import is_first
from dit_jax.types import Params

RECORD, SUM = "record", "sha256"  # of a file of weights, and of one of arrays
# What reading a damaged file raises, beside ValueError.
WEIGHTS_ERRORS = (SafetensorError, OSError, KeyError, TypeError, AttributeError)
ARRAYS_ERRORS = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    KeyError,
    TypeError,
    SyntaxError,
    zlib.error,
    NotImplementedError,
    RuntimeError,
)


def kept_file(cache: pathlib.Path, kind: str, key: Mapping[str, Any], suffix: str) -> pathlib.Path:
    """Returns the file in a cache of what the key, JSON values, determines."""
    return cache / f"{kind}-{hashlib.sha256(_to_text(key).encode()).hexdigest()[:16]}{suffix}"


def kept_weights(
    path: pathlib.Path, key: Mapping[str, Any], make: Callable[[], tuple[Params, dict[str, Any]]]
) -> tuple[Params, dict[str, Any]]:
    """Returns weights and facts of them (JSON values) from a file, or makes them and writes it.

    Other processes that want the same wait meanwhile.

    Args:
      key: JSON values that determine them.
    """
    with file_lock(path.with_suffix(".lock")):
        if path.is_file():
            try:
                return _read_weights(path, key)
            except (ValueError, *WEIGHTS_ERRORS) as error:
                _tell(path, error)
        params, facts = make()
        record = sealed({"of": key, "facts": facts, "weights": params_digest(params)})
        with written_whole(path) as temporary:
            save_file(flatten_dict(params, sep="/"), temporary, metadata={RECORD: json.dumps(record)})
        return params, facts


def _read_weights(path: pathlib.Path, key: Mapping[str, Any]) -> tuple[Params, dict[str, Any]]:
    with safe_open(path, framework="numpy") as file:
        record = check_seal(parse_json(file.metadata()[RECORD]))
        params = unflatten_dict({name: file.get_tensor(name) for name in file.keys()}, sep="/")  # noqa: SIM118
    if record["weights"] != params_digest(params):
        raise ValueError("its weights are not what their sum is of")
    if _to_text(record["of"]) != _to_text(key):
        raise ValueError("it is of something else")
    return params, record["facts"]


def read_arrays(path: pathlib.Path, key: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a file of `write_arrays`; None where there is none, or it is damaged, which is told."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # before NumPy believes what an array's header says
                raise ValueError(f"{damaged} has other bytes than were written")
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        found = arrays.pop(SUM, None)
        if found is None or found.tobytes() != _arrays_sum(arrays, key):
            raise ValueError("its arrays are not what their sum is of")
        return arrays
    except (ValueError, *ARRAYS_ERRORS) as error:
        _tell(path, error)
        return None


def write_arrays(path: pathlib.Path, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to an `.npz` file, with their sum; key: JSON values that determine them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, **{SUM: np.frombuffer(_arrays_sum(arrays, key), np.uint8)})


def _arrays_sum(arrays: Mapping[str, np.ndarray], key: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(_to_text(key).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.digest()


def _tell(path: pathlib.Path, error: Exception) -> None:
    if is_first():
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"{path} is damaged and made again: {reason}", file=sys.stderr, flush=True)


def _to_text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
