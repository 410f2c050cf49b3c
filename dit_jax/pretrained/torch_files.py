"""PyTorch's files of tensors: the zip archives of today, and the form before version 1.6.

They are read without PyTorch: the pickle in one says how its tensors lie in the bytes beside it (`pickles`), and no
more than what is there is taken.
"""

import errno
import functools
import io
import math
import os
import pathlib
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from dit_jax.pretrained.pickles import (
    MAX_PICKLE_BYTES,
    PERSISTENT,
    Made,
    Name,
    array_of,
    is_array,
    is_call,
    is_shape,
    kind_of,
    mapping_of,
    read_pickle,
    shown,
)

ZIP_MAGIC, LOCAL_HEADER = b"PK\x03\x04", 30  # bytes of the header before a member's name
OLD_MAGIC, OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAX_NESTS = 8  # dicts around the weights
MAX_EXPANSION = 4  # of a file's size, in memory: weights hardly compress, and a byte becomes a float32
MAX_LINE = 2**16  # bytes of a line in a pickle
# Where training programs keep the weights, best first: averages, then what they are averages of.
AVERAGES = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "params_ema")
NESTS = (*AVERAGES, "model", "state_dict", "model_state_dict", "params", "module")
DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
STORAGES = {  # the classes of typed storages
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool"},
}
Storage = Callable[[str], bytearray]  # from a storage's key to its bytes


class View(NamedTuple):
    """A tensor: numbers of a storage."""

    key: str  # of the storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors of a PyTorch file by name, float32, and notes on what of it was taken and left.

    Of a training program's file those of its average, else of its model, whatever else is in it.

    Raises:
      ValueError: where it is damaged, holds no plain tensors by name, or would take far more memory than its size.
    """
    size = path.stat().st_size
    with _SizedFile(path) as file:
        try:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC  # as PyTorch tells its two forms apart
            file.seek(0)
            content, read_storage, swapped = (_open_zip if is_zip else _open_old)(file, size)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # what a made-up file can raise is no short list
            reason = " ".join(str(error).split()) if isinstance(error, ValueError) else type(error).__name__
            raise ValueError(f"{path} is truncated or not a PyTorch file ({reason}); nothing of it was run") from error
        try:
            items, notes = _weights(content)
            return _tensors(items, read_storage, swapped, MAX_EXPANSION * size), notes
        except (OSError, MemoryError):
            raise
        except ValueError as error:
            raise ValueError(f"{path}: {error}; nothing of it was run") from error
        except Exception as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}); nothing of it was run") from error


def _weights(content: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns the dict of tensors in what a file says, through the dicts around it, and notes."""
    held: dict[int, bool] = {}

    def holds(node: Any, depth: int = 0) -> bool:
        """Returns whether tensors by name are in something, or in a dict of weights within it."""
        if id(node) not in held:
            items = mapping_of(node) if depth < MAX_NESTS else None
            held[id(node)] = False  # while it is looked at: it may hold itself
            held[id(node)] = items is not None and (
                any(type(key) is str and _is_tensor(value) for key, value in items.items())
                or any(holds(items[nest], depth + 1) for nest in NESTS if nest in items)
            )
        return held[id(node)]

    trail, notes = [], []
    while True:
        items = mapping_of(content)
        if items is None:
            raise ValueError(f"it must hold a dict of tensors, not {kind_of(content)}")
        named = {key: value for key, value in items.items() if type(key) is str}
        if any(_is_tensor(value) for value in named.values()):
            break
        inner = [key for key, value in named.items() if holds(value)]
        nest = next((nest for nest in NESTS if nest in inner), inner[0] if len(inner) == 1 else None)
        if nest is None:
            seen = [f"{shown(key)} ({kind_of(value)})" for key, value in named.items()]
            what = "several dicts of tensors; save one of them alone" if inner else "no tensors by name"
            raise ValueError(f"it holds {what}; it has {', '.join(seen[:8]) or 'nothing'}{' ...' * (len(seen) > 8)}")
        if nest not in AVERAGES:
            missed = [name for name in AVERAGES if isinstance(named.get(name), dict | list | Made) and named[name]]
            notes += [f"the average {name!r} holds no tensors by name: {shown(nest)} is taken" for name in missed]
        trail.append(nest)
        if len(trail) > MAX_NESTS:
            raise ValueError(f"its tensors are in more than {MAX_NESTS} dicts")
        content = named[nest]
    others = [key for key, value in named.items() if not _is_tensor(value)]
    if trail:
        notes.append(f"taken: what the file has in {shown('.'.join(trail))}")
    if others:
        what = ", ".join(f"{shown(key)} ({kind_of(named[key])})" for key in others[:3])
        notes.append(f"left out, no tensors: {len(others)} values such as {what}")
    return {key: value for key, value in named.items() if key not in others}, notes


def _is_tensor(node: Any) -> bool:
    """Returns whether something would be a tensor of PyTorch's, of any kind, or an array of floats."""
    function = node.function if isinstance(node, Made) else None
    if isinstance(function, Name) and function.module.startswith("torch.") and "_rebuild" in function.name:
        return True
    try:
        return is_array(node) and array_of(node) is not None
    except ValueError:
        return False


def _tensors(items: dict[str, Any], read_storage: Storage, swapped: bool, most: int) -> dict[str, np.ndarray]:
    """Returns tensors, float32; raises ValueError where one is no plain tensor, or they take more than `most` bytes."""
    views = {name: array_of(node) if is_array(node) else _view(node, shown(name)) for name, node in items.items()}
    size = 4 * sum(math.prod(view.shape) for view in views.values())
    if size > most:  # a tensor may repeat its storage any number of times
        raise ValueError(f"its tensors would take {size:,} bytes, {MAX_EXPANSION} times more than it has")
    read_storage = functools.cache(read_storage)  # tensors share them
    tensors = {}
    for name, view in views.items():
        if isinstance(view, View):
            dtype, content = np.dtype(DTYPES[view.dtype]), read_storage(view.key)
            try:
                strides = [step * dtype.itemsize for step in view.stride]
                order = dtype.newbyteorder() if swapped else dtype
                view = np.ndarray(view.shape, order, content, view.offset * dtype.itemsize, strides)
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"tensor {shown(name)} does not fit its {len(content):,} bytes") from error
        tensors[name] = np.ascontiguousarray(view, np.float32).reshape(view.shape)  # of no axes, too
    return tensors


def _view(node: Any, name: str) -> View:
    """Returns what a call that makes a plain tensor says; raises ValueError where it makes another thing."""
    for _ in range(MAX_NESTS):
        if is_call(node, "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            node = node.arguments[0]
        elif is_call(node, "torch._tensor._rebuild_from_type_v2"):  # of a subclass, or one with attributes
            node = Made(node.arguments[0], node.arguments[2])
    if not is_call(node, *(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))):
        raise ValueError(f"tensor {name} is made by {kind_of(node)}, so it is no plain tensor; save it as one")
    storage, offset, shape, stride, *more = node.arguments
    kind, type_, key, _, _, *views = storage.arguments if is_call(storage, str(PERSISTENT)) else (None,) * 5
    dtype = STORAGES.get(type_.name) if isinstance(type_, Name) else None
    metadata = more[2:]
    if str(node.function).endswith("_v3"):
        dtype, metadata = more[2].name, more[3:]
    if kind != "storage" or type(key) is not str or dtype not in DTYPES:
        said = dtype if type(dtype) is str else kind_of(type_)
        raise ValueError(f"tensor {name} is of {said}, not of {', '.join(DTYPES)}; save it as one of these")
    if any(True in mapping_of(each).values() for each in metadata if each):
        raise ValueError(f"tensor {name} is negated or conjugated when it is read; save it as a plain tensor")
    if views and views[0] is not None:  # as PyTorch before 0.4 wrote storages within storages
        offset += views[0][1]
    if not is_shape(shape) or not is_shape(stride) or len(shape) != len(stride) or not is_shape((offset,)):
        raise ValueError(f"tensor {name} is damaged: it has no shape")
    return View(key, dtype, offset, shape, stride)


def _open_zip(file: BinaryIO, size: int) -> tuple[Any, Storage, bool]:
    """Returns what a zip archive's pickle says, what reads its storages, and whether their bytes are swapped."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    unpacked = sum(entry.file_size for entry in entries.values())
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError(f"it unpacks to {unpacked:,} bytes from {size:,}; PyTorch does not write such files")
    root = next((name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")), None)
    if root is None:
        raise ValueError("it has no data.pkl")
    if f"{root}constants.pkl" in entries:
        raise ValueError("it is a program of TorchScript; save the model's state_dict() instead")

    def read(name: str) -> bytearray:
        if name not in entries:
            raise ValueError(f"it has no {shown(name)}")
        entry = entries[name]
        file.seek(entry.header_offset)
        header = file.read(LOCAL_HEADER)
        lengths = struct.unpack("<HH", header[-4:])  # of the name and the extra field
        file.seek(sum(lengths), os.SEEK_CUR)
        content = bytearray(entry.file_size)
        count = file.readinto(content)
        if count != len(content) or (entry.CRC and zlib.crc32(content) != entry.CRC):  # 0: written without sums
            raise ValueError(f"{shown(name)} in it is damaged: it is not what its sum is of; fetch it again")
        return content

    if entries[f"{root}data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has more than {MAX_PICKLE_BYTES:,} bytes")
    pickle = bytes(read(f"{root}data.pkl"))
    big = f"{root}byteorder" in entries and read(f"{root}byteorder") == b"big"
    content, _ = read_pickle(pickle, len(pickle))
    return content, lambda key: read(f"{root}data/{key}"), big != (sys.byteorder == "big")


def _open_old(file: BinaryIO, size: int) -> tuple[Any, Storage, bool]:
    """Returns the same of a file of the old form: pickles one after the other, then the storages."""
    if read_pickle(file, size)[0] != OLD_MAGIC or read_pickle(file, size)[0] != OLD_PROTOCOL:
        raise ValueError("it is a pickle of something else")
    system, _ = read_pickle(file, size)
    content, references = read_pickle(file, size)
    sizes = {}
    for reference in references:
        _, type_, key, *_ = reference.arguments
        if type_.name not in STORAGES:
            raise ValueError(f"it has a storage of {type_}")
        sizes[key] = np.dtype(DTYPES[STORAGES[type_.name]]).itemsize
    places, (keys, _) = {}, read_pickle(file, size)
    for key in keys:
        header = file.read(8)
        length = struct.unpack("<q", header)[0] * sizes[key] if len(header) == 8 else -1
        places[key] = file.tell(), length
        if length < 0 or file.seek(length, os.SEEK_CUR) > size:
            raise ValueError(f"storage {shown(key)} is not there as a whole; fetch it again")

    def read(key: str) -> bytearray:
        place, length = places[key]
        file.seek(place)
        content = bytearray(length)
        if file.readinto(content) != length:
            raise ValueError(f"storage {shown(key)} is not there as a whole; fetch it again")
        return content

    return content, read, bool(system["little_endian"]) != (sys.byteorder == "little")


class _SizedFile(io.BufferedReader):
    """A file that is read for no more than it has, and a pickle may: asked for 4 GB, Python takes 4 GB first."""

    def __init__(self, path: pathlib.Path):
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError("it names a place that no file has") from error

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > MAX_PICKLE_BYTES:
            raise ValueError(f"it has {wanted:,} bytes where files of weights have at most {MAX_PICKLE_BYTES:,}")
        return super().read(wanted)

    def readline(self, size: int | None = -1) -> bytes:
        return super().readline(MAX_LINE if size is None or size < 0 else min(size, MAX_LINE))
