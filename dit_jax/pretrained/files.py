"""Files of named tensors: PyTorch's and safetensors', read without running any code in them, and written whole."""

import os
import pathlib

import numpy as np

from dit_jax.pretrained.name_map import Tensors

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
NESTS = ("ema", "model", "state_dict")  # where training programs keep the weights, best first


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors of a `.safetensors` file, or of a PyTorch one (its `ema`, else its `model`), by name.

    Half-precision tensors become float32.

    Raises:
      ValueError: where the file is damaged, or holds anything but tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise ValueError(f"{path} must end in .safetensors, {', '.join(TORCH_SUFFIXES)}")


def write_tensors(path: str | os.PathLike, tensors: Tensors) -> None:
    """Writes tensors float32 in the form that the path's suffix says; the file appears whole, or not at all."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(dict(tensors), temporary)
        elif path.suffix in TORCH_SUFFIXES:
            torch = _torch(path)
            torch.save({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}, temporary)
        else:
            raise ValueError(f"{path} must end in .safetensors, {', '.join(TORCH_SUFFIXES)}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file  # NumPy has no bfloat16 of its own

    try:
        return {name: np.asarray(array, np.float32) for name, array in load_file(path).items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch = _torch(path)
    import argparse
    import pickle

    try:
        # DiT's training program keeps its flags beside the weights, as a Namespace: plain attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} holds something other than tensors, or is damaged; nothing of it was run ({reason})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is truncated or not a PyTorch file ({error}); fetch it again") from error
    for nest in NESTS:
        if isinstance(content, dict) and isinstance(content.get(nest), dict):
            content = content[nest]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dict of tensors, not a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} must hold tensors by name; {name!r} is a {type(value).__name__}")
    return {name: value.detach().to(torch.float32).numpy() for name, value in content.items()}


def _torch(path: pathlib.Path):
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file, which needs PyTorch: pip install torch; or give a .safetensors file"
        ) from error
    return torch
