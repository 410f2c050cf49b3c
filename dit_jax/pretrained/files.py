"""Files of named tensors: PyTorch's, safetensors' and pickles of NumPy arrays, read without running any code in them.

They are written whole, or not at all.
"""

import gzip
import io
import math
import os
import pathlib
import pickle
import pickletools
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dit_jax.files import written_whole
from dit_jax.pretrained.name_map import Tensors

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
ZIP_MAGIC = b"PK\x03\x04"
NESTS = ("ema", "model", "state_dict")  # where training programs keep the weights, best first

MAX_PICKLE_BYTES = 2**28  # LPIPS' is 59 MB
MAX_PICKLE_OPCODES = 10_000  # LPIPS' has 1,200: 40 for an array
MAX_PATH = 200  # letters in the keys to an array
MAX_EXPANSION = 4  # of a file's size, in memory: weights hardly compress, and a byte becomes a float32
# What dicts of NumPy arrays are written with (protocols 3 and 4), and no more: no lists, no objects, no references
# outside, no numbers without a bound on their size.
PICKLE_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINUNICODE SHORT_BINUNICODE BINBYTES "
    "SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE "
    "BUILD BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET"
)


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors of a `.safetensors` file, or of a PyTorch one (its `ema`, else its `model`), by name.

    Half-precision tensors become float32.

    Raises:
      ValueError: where the file is damaged, holds anything but tensors, or would take far more memory than its size.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise ValueError(f"{path} must end in .safetensors, {', '.join(TORCH_SUFFIXES)}")


def read_pickled_arrays(path: str | os.PathLike, member: str | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays of a pickle of nested dicts, by their keys joined by "/", read-only.

    Nothing in the pickle is run, or built but arrays of floats: see `_ArrayUnpickler`.

    Args:
      path: the pickle; member: or the `.tar.gz` that it is in, as the file whose name ends so. Nothing is unpacked to
        disk.

    Raises:
      ValueError: where the file is damaged, too large, or holds anything but dicts of arrays.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise ValueError(f"{path} must be at most {MAX_PICKLE_BYTES:,} bytes, but has {path.stat().st_size:,}")
    content = path.read_bytes() if member is None else _read_member(path, member)
    try:
        _check_opcodes(content)
        tree = _ArrayUnpickler(io.BytesIO(content)).load()
        return dict(_arrays_by_path(tree))
    except Exception as error:  # what a made-up stream can raise in `pickle` is no short list
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} must be a pickle of dicts of NumPy arrays; it is damaged or another thing, and nothing of it was "
            f"run ({reason}); fetch it again"
        ) from error


def read_archive(path: str | os.PathLike, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Returns the wanted files in a `.tar.gz` by name, in its order.

    It is unpacked in memory, up to a bound, so that no header can ask for more. Nothing is unpacked to disk.

    Raises:
      ValueError: where it is damaged, or unpacks to more than weights do.
    """
    path = pathlib.Path(path)
    most = MAX_EXPANSION * path.stat().st_size + 2**20  # and the headers of small ones
    try:
        with gzip.open(path) as file:
            archive = file.read(most + 1)
        if len(archive) > most:
            raise ValueError(f"{path} unpacks to more than {most:,} bytes, as weights of its size do not")
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            found = [entry for entry in tar if entry.isreg() and wanted(entry.name)]
            return {entry.name: tar.extractfile(entry).read() for entry in found if not entry.issparse()}  # any size
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or not a .tar.gz file ({error}); fetch it again") from error


def write_tensors(path: str | os.PathLike, tensors: Tensors) -> None:
    """Writes tensors float32 in the form that the path's suffix says; the file appears whole, or not at all."""
    path = pathlib.Path(path)
    with written_whole(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(dict(tensors), temporary)
        elif path.suffix in TORCH_SUFFIXES:
            torch = _torch(path)
            torch.save({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}, temporary)
        else:
            raise ValueError(f"{path} must end in .safetensors, {', '.join(TORCH_SUFFIXES)}")


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file  # NumPy has no bfloat16 of its own

    try:
        return {name: np.asarray(array, np.float32) for name, array in load_file(path).items()}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is truncated or not a safetensors file ({reason}); fetch it again") from error


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch = _torch(path)
    import argparse

    with path.open("rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC  # as PyTorch tells its two forms apart
    if is_zip:
        _check_stored(path)
    try:
        # DiT's training program keeps its flags beside the weights, as a Namespace: plain attributes, no code.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # that a pickle is of another protocol: it is read, or an error, anyway
            with _SizedFile(path) as file:
                content = torch.load(path if is_zip else file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"{path} holds something other than tensors, or is damaged; nothing of it was run ({reason})"
        ) from error
    except Exception as error:  # what a made-up file can raise in PyTorch is no short list
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is truncated or not a PyTorch file ({reason}); fetch it again") from error
    for nest in NESTS:
        if isinstance(content, dict) and isinstance(content.get(nest), dict):
            content = content[nest]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, not a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} must hold tensors by name; {name!r} is a {type(value).__name__}")
        if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu":
            raise ValueError(f"{path} must hold plain tensors; {name!r} has {value.layout}, {value.dtype}")
    # A tensor may repeat its storage any number of times, and be as large as it likes.
    size, most = 4 * sum(value.numel() for value in content.values()), MAX_EXPANSION * path.stat().st_size
    if size > most:
        raise ValueError(f"{path}: its tensors would take {size:,} bytes, {MAX_EXPANSION} times more than it has")
    return {name: value.detach().to(torch.float32).numpy() for name, value in content.items()}


class _SizedFile(io.BufferedReader):
    """A file that is read for no more than it has: asked for 4 GB, Python takes 4 GB before it looks."""

    def __init__(self, path: pathlib.Path):
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _check_stored(path: pathlib.Path) -> None:
    """Raises ValueError where a zip archive, as PyTorch writes it, is compressed: PyTorch's own are not."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is truncated or not a PyTorch file ({error}); fetch it again") from error
    size = sum(entry.file_size for entry in entries)
    if size > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} unpacks to {size:,} bytes, more than it has; PyTorch does not write such files")


def _read_member(path: pathlib.Path, member: str) -> bytes:
    """Returns the first file in a `.tar.gz` whose name ends so."""
    for content in read_archive(path, lambda name: name.endswith(member)).values():
        return content
    raise ValueError(f"{path} must hold a file {member}, but does not; fetch it again")


def _check_opcodes(content: bytes) -> None:
    """Raises ValueError where a pickle has other opcodes than arrays need, or claims more than it has.

    Python's own unpickler believes what a stream says of its sizes: ten bytes can make it reserve 64 GB for its memo.
    """
    allowed = PICKLE_OPCODES.split()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in allowed:
            raise ValueError(f"it has opcode {opcode.name}")
        if count >= MAX_PICKLE_OPCODES:
            raise ValueError(f"it has more than {MAX_PICKLE_OPCODES:,} opcodes")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and argument > count:
            raise ValueError(f"it numbers its object {argument}, but has {count} opcodes before")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dicts, tuples, strings, numbers, and stand-ins for arrays and dtypes: nothing of NumPy's is called."""

    def find_class(self, module: str, name: str) -> Any:
        found = _STAND_INS.get((module, name))
        if found is None:
            raise ValueError(f"it refers to {module}.{name}")
        return found


class _PickledDtype:
    """Stands for `numpy.dtype`: a float's."""

    def __init__(self, name: str, align: Any, copy: Any):
        if name not in ("f2", "f4", "f8"):
            raise ValueError(f"its arrays must be float, not of dtype {name!r}")
        self.name, self.dtype = name, None

    def __setstate__(self, state: tuple) -> None:
        _, byte_order, *extras = state
        if byte_order not in ("<", ">") or any(extra not in (None, -1, 0) for extra in extras):
            raise ValueError(f"the state of a dtype is {state}")
        self.dtype = np.dtype(byte_order + self.name)


class _PickledArray:
    """Stands for `numpy.ndarray`: a view of the bytes that the pickle holds for it, of a shape that fits them."""

    def __init__(self, subtype: str, shape: Any, typecode: Any):
        self.array = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        if type(dtype) is not _PickledDtype or dtype.dtype is None or type(content) is not bytes:
            raise ValueError("an array in it is not one of floats")
        if type(shape) is not tuple or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"an array in it has shape {shape}")
        if math.prod(shape) * dtype.dtype.itemsize != len(content):
            raise ValueError(f"an array in it of shape {shape} has {len(content):,} bytes")
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if is_fortran is True else "C")


# A pickle can call and give state to what these return, so none is a function or a class of anyone else's.
_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): _PickledDtype,
}


def _arrays_by_path(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (keys joined by "/", array); a dict met twice is an error, since it may hold itself."""
    pending, seen = [("", tree)], set()
    while pending:
        path, node = pending.pop()
        if len(path) > MAX_PATH:
            raise ValueError(f"its keys {path[:50]!r}... are longer than {MAX_PATH} letters")
        if type(node) is _PickledArray and node.array is not None:
            yield path, node.array
            continue
        if type(node) is not dict or id(node) in seen:
            raise ValueError(f"{path!r} is a {type(node).__name__}, or a dict that is also elsewhere")
        seen.add(id(node))
        for key, value in node.items():
            if type(key) is not str:
                raise ValueError(f"a key is a {type(key).__name__}")
            pending.append((f"{path}/{key}" if path else key, value))


def _torch(path: pathlib.Path):
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file, which needs PyTorch: pip install torch; or give a .safetensors file"
        ) from error
    return torch
