"""Results of a long computation on disk, a part a file, so that it goes on where it was killed.

A folder holds the results of one computation, named by its identity: what else was computed there never mixes in. A
file is a SHA-256 over the identity, the part's number and the array, and then the array as `.npy`; so a part is read as
it was written, or is not there. Every file is written aside and renamed.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from dit_jax.files import only_one, patiently, written_whole

IDENTITY_NAME, LOCK_NAME = "identity.json", ".parts.lock"
DIGEST_BYTES = hashlib.sha256().digest_size


class Parts:
    """The parts of one computation; a context manager that keeps other processes from the folder they are in.

    Args:
      parent: the folder beside whose other files the parts' hidden folder is.
      identity: JSON values that determine the results to the last bit, such as settings, seed and weights.
    """

    def __init__(self, parent: str | os.PathLike, identity: Mapping[str, Any]):
        self._identity = json.dumps(identity, sort_keys=True, indent=2).encode() + b"\n"
        self.path = pathlib.Path(parent) / f".parts-{hashlib.sha256(self._identity).hexdigest()[:16]}"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Parts":
        what = f"another process writes to {self.path.parent}"
        self._stack.enter_context(only_one(self.path.with_name(LOCK_NAME), what))
        self.path.mkdir(exist_ok=True)
        self._write(IDENTITY_NAME, self._identity)
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def read(self, number: int) -> np.ndarray | None:
        """Returns a part; None where it is not there, damaged, or of another computation."""
        try:
            content = patiently((self.path / f"{number:06}").read_bytes)
        except FileNotFoundError:
            return None
        digest, array = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        return np.load(io.BytesIO(array), allow_pickle=False) if digest == self._digest(number, array) else None

    def write(self, number: int, array: np.ndarray) -> None:
        """Writes a part; it is there as a whole or not at all."""
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        self._write(f"{number:06}", self._digest(number, content.getvalue()) + content.getvalue())

    def remove(self) -> None:
        """Removes all parts, once what they were for is there."""
        shutil.rmtree(self.path)

    def _digest(self, number: int, array: bytes) -> bytes:
        digest = hashlib.sha256(self._identity + number.to_bytes(8, "little"))
        digest.update(array)
        return digest.digest()

    def _write(self, name: str, content: bytes) -> None:
        with written_whole(self.path / name) as temporary:
            temporary.write_bytes(content)


def unfinished(parent: str | os.PathLike) -> list[pathlib.Path]:
    """Returns the folders of computations in `parent` that have not come to their end."""
    return sorted(path for path in pathlib.Path(parent).glob(".parts-*") if path.is_dir())
