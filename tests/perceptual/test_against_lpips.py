"""Distances with the published weights equal those of the PyTorch package `lpips` 0.1.4, within 1e-5 on images.

It needs weights/lpips_vgg16.safetensors and that package, which launch/test.sh fetches. Without them these tests are
skipped, or fail where DIT_JAX_REQUIRE_ALL_TESTS is set, as in .ci/run.
"""

import gzip
import os
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import torch
from torch import nn

from dit_jax.config import AutoencoderConfig
from dit_jax.perceptual.lpips import load_lpips, lpips
from dit_jax.pretrained.lpips import torchvision_vgg16_entries
from dit_jax.pretrained.name_map import to_tensors

ROOT = pathlib.Path(__file__).parents[2]
WEIGHTS = pathlib.Path(os.environ.get("DIT_JAX_LPIPS_WEIGHTS", ROOT / AutoencoderConfig().lpips_path))


def without(what):
    """Ends a test that lacks something."""
    reason = f"{what}; launch/test.sh fetches it where there is a network"
    (pytest.fail if os.environ.get("DIT_JAX_REQUIRE_ALL_TESTS") else pytest.skip)(reason)


def torch_vgg16(params):
    """Returns what `torchvision.models.vgg16` does, as far as the package uses it: it has no wheel for CPUs alone."""
    layers, channels = [], 3
    for width in (64, 64, "pool", 128, 128, "pool", *[256] * 3, "pool", *[512] * 3, "pool", *[512] * 3, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    model = nn.Module()
    model.features = nn.Sequential(*layers)
    tensors = to_tensors(list(torchvision_vgg16_entries(params["vgg16"])), params["vgg16"])
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    return model


@pytest.fixture(scope="module")
def params():
    if not WEIGHTS.is_file():
        without(f"{WEIGHTS} is missing")
    return load_lpips(WEIGHTS)


@pytest.fixture(scope="module")
def theirs(params):
    models = types.SimpleNamespace(vgg16=lambda pretrained: torch_vgg16(params))
    stand_in = types.ModuleType("torchvision")
    stand_in.models = models
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", stand_in)
        try:
            import lpips as package
        except ImportError as error:
            without(f"PyTorch's lpips is missing ({error})")
        model = package.LPIPS(net="vgg", version="0.1", verbose=False)  # with its own weights of channels
    return lambda *images: model(*(torch.from_numpy(x).permute(0, 3, 1, 2) for x in images)).detach().numpy().ravel()


def garments():
    """Returns 2 of Fashion-MNIST's images [2, 56, 56, 3] in [-1, 1], twice as large."""
    folder = ROOT / "dit_jax" / "data" / "fashion_mnist_subset"
    content = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28, 1)[:2]
    images = images.repeat(2, axis=1).repeat(2, axis=2).repeat(3, axis=3)
    return (images / 127.5 - 1).astype(np.float32)


def drawings():
    """Returns 2 coloured images [2, 65, 80, 3] in [-1, 1]: waves with a disc, so neither flat nor noise."""
    y, x = np.mgrid[:65, :80][:, None, :, :, None] / 16
    phase = np.random.default_rng(0).uniform(0, 2 * np.pi, (2, 1, 1, 3))
    waves = np.sin(x * [1, 2, 3] + phase) * np.cos(y * [3, 1, 2] + phase)
    disc = (x - 2.5) ** 2 + (y - 2) ** 2 < 1 + phase[..., :1] / 4
    return np.where(disc, -waves[..., ::-1], waves).astype(np.float32)


def changes(images):
    """Yields (name, changed images) as an autoencoder would change them, and more."""
    noise = np.random.default_rng(0).normal(0, 1, images.shape)
    yield "noise", np.clip(images + 0.02 * noise, -1, 1)
    yield "blur", (images + np.roll(images, 1, axis=1) + np.roll(images, 1, axis=2)) / 3
    yield "another image", images[::-1]
    yield "black", np.full_like(images, -1)
    yield "the same", images


@pytest.mark.parametrize("make", [garments, drawings])
def test_distances_of_images_equal_the_packages(make, params, theirs):
    images = make()
    distance = jax.jit(lpips)
    for name, changed in changes(images):
        changed = np.ascontiguousarray(changed, np.float32)
        expected = theirs(images, changed)
        assert name == "the same" or expected.mean() > 1e-3
        np.testing.assert_allclose(distance(params, images, changed), expected, rtol=0, atol=1e-5, err_msg=name)


def test_the_weights_are_those_of_the_published_vgg16(params):
    """The first numbers of torchvision's vgg16-397923af.pth, and what of LPIPS' own is non-negative."""
    first = params["vgg16"]["conv1_1"]
    np.testing.assert_allclose(first["kernel"][0, :, 0, 0], [-0.5537, 0.1427, 0.5290], atol=1e-4)
    np.testing.assert_allclose(first["bias"][:3], [0.4034, 0.3778, 0.4644], atol=1e-4)
    assert all(params[f"lin{i}"]["kernel"].min() >= 0 for i in range(5))
