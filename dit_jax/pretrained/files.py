"""Files of named tensors: PyTorch's, safetensors' and pickles of NumPy arrays, read without running any code in them.

They are written whole, or not at all.
"""

import gzip
import io
import os
import pathlib
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dit_jax.files import read_json, written_whole
from dit_jax.pretrained.name_map import Tensors
from dit_jax.pretrained.pickles import MAX_PICKLE_BYTES, array_of, is_array, kind_of, read_pickle, shown
from dit_jax.pretrained.torch_files import DTYPES, MAX_EXPANSION, read_torch_file

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
SAFETENSORS_DTYPES = {  # theirs: PyTorch's
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn"},
    **{"F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    "BOOL": "bool",
}
INDEX = ".index.json"  # ends the name of a list of the files that a model's tensors are in
HUGGING_FACE_STEMS = ("model", "pytorch_model")  # of the files of weights in transformers' folders
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # PyTorch's, around a layer
MAX_PATH = 200  # letters in the keys to an array


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, float32, by name: `read_weights` without its notes."""
    return read_weights(path)[0]


def read_weights(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors of a file, float32, by name, and notes on what of it was taken and left.

    Of what wraps a layer for training (`WRAPPERS`) nothing is left in the names.

    Args:
      path: a `.safetensors` file, a PyTorch one (of a training program's its average, else its model), or the index of
        several files of these, which are beside it.

    Raises:
      ValueError: where a file is damaged, holds anything but tensors, or would take far more memory than its size.
    """
    path = pathlib.Path(path)
    tensors, notes = (_read_sharded if path.name.endswith(".json") else _read_file)(path)
    bare: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        own_name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if own_name in bare:
            raise ValueError(f"{path}: tensor {shown(own_name)} is there twice, as {shown(name)} too; keep one of them")
        bare[own_name] = tensor
    return bare, notes


def find_weights(folder: pathlib.Path, stems: tuple[str, ...]) -> tuple[pathlib.Path, list[str]]:
    """Returns a folder's file of weights (or the index of several), and a note where it is of a variant.

    Args:
      stems: what the file's name may begin with, such as "model".

    Raises:
      ValueError: where there is none, or there are several variants.
    """
    names = sorted(path.name for path in folder.iterdir())
    whole = [f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in stems]
    for name in (f"{name}{end}" for name in whole for end in ("", INDEX)):
        if name in names:
            return folder / name, []
    form = rf"(?:{'|'.join(map(re.escape, stems))})\.(?:(\w+)\.{{0}}(?:\.index\.json)?|{{0}}\.index\.(\w+)\.json)"
    for suffix in ("safetensors", "bin"):
        found = [match for match in (re.fullmatch(form.replace("{0}", suffix), name) for name in names) if match]
        if len(found) > 1:
            raise ValueError(f"{folder} has weights of several variants, {' and '.join(m[0] for m in found)}; keep one")
        if found:
            return folder / found[0][0], [f"the weights of variant {found[0][1] or found[0][2]} are taken"]
    raise ValueError(f"{folder} has none of {stems[0]}.safetensors, {stems[-1]}.bin, nor an index or a variant of them")


def read_pickled_arrays(path: str | os.PathLike, member: str | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays of a pickle of nested dicts, by their keys joined by "/", read-only.

    Nothing in the pickle is run, or built but arrays of floats.

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
        tree, _ = read_pickle(content, len(content))
        return dict(_arrays_by_path(tree))
    except Exception as error:  # what a made-up stream can raise is no short list
        reason = " ".join(str(error).split()) if isinstance(error, ValueError) else type(error).__name__
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
            raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}")


def _read_file(path: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), []
    if path.suffix in TORCH_SUFFIXES:
        return read_torch_file(path)
    raise ValueError(f"{path} must end in {', '.join(SUFFIXES)}, or {INDEX} of these")


def _read_sharded(path: pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors that an index names, of the files that it names, and notes."""
    index = read_json(path, "fetch it again")
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path} must be the index of a model's files, with a weight_map; fetch it again")
    by_file: dict[str, list[str]] = {}
    for name, file in places.items():
        plain = isinstance(file, str) and re.fullmatch(r"[^/\\\0]+", file) and file.endswith(SUFFIXES)
        if not plain:
            raise ValueError(f"{path}: {shown(file)} must be the name of a file beside it; fetch it again")
        by_file.setdefault(file, []).append(name)
    tensors, notes = {}, []
    for file, names in sorted(by_file.items()):
        shard, more = _read_file(path.parent / file)
        missing = sorted(set(names) - set(shard))
        if missing:
            raise ValueError(f"{path.parent / file} lacks tensor {shown(missing[0])} of {path.name}; fetch it again")
        tensors |= {name: shard[name] for name in names}
        notes += [note for note in more if note not in notes]
    return tensors, notes


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    try:
        parts = deserialize(path.read_bytes())
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is truncated or not a safetensors file ({reason}); fetch it again") from error
    tensors = {}
    while parts:  # one is let go before the next is made float32
        name, part = parts.pop()
        dtype = SAFETENSORS_DTYPES.get(part["dtype"])
        if dtype is None:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise ValueError(
                f"{path}: tensor {shown(name)} is of {part['dtype']}, not of {known}; save it as one of these"
            )
        array = np.frombuffer(part["data"], np.dtype(DTYPES[dtype]))
        tensors[name] = array.reshape(part["shape"]).astype(np.float32)
    return tensors


def _read_member(path: pathlib.Path, member: str) -> bytes:
    """Returns the first file in a `.tar.gz` whose name ends so."""
    for content in read_archive(path, lambda name: name.endswith(member)).values():
        return content
    raise ValueError(f"{path} must hold a file {member}, but does not; fetch it again")


def _arrays_by_path(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (keys joined by "/", array); a dict met twice is an error, since it may hold itself."""
    pending, seen = [("", tree)], set()
    while pending:
        path, node = pending.pop()
        if len(path) > MAX_PATH:
            raise ValueError(f"its keys {path[:50]!r}... are longer than {MAX_PATH} letters")
        if is_array(node):
            yield path, array_of(node)
            continue
        if type(node) is not dict or id(node) in seen:
            raise ValueError(f"{path!r} is a {kind_of(node)}, or a dict that is also elsewhere")
        seen.add(id(node))
        for key, value in node.items():
            if type(key) is not str:
                raise ValueError(f"a key is a {kind_of(key.value)}")
            pending.append((f"{path}/{key}" if path else key, value))


def _torch(path: pathlib.Path):
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file, which needs PyTorch: pip install torch; or give a .safetensors file"
        ) from error
    return torch
