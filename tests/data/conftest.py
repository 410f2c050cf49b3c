"""The data sets that these tests read: the shipped part of Fashion-MNIST, and folders of a few tiny images."""

import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from dit_jax.config import DataConfig
from dit_jax.data import sources


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """A config whose data set was prepared, once for all tests, with no raw files at hand and no network."""

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    data_dir = str(tmp_path_factory.mktemp("tfds"))
    data = DataConfig(name="fashion_mnist", image_size=28, channels=1, num_classes=10, data_dir=data_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "DEBIAN_FOLDERS", {})
        patch.setattr(urllib.request, "urlopen", no_network)
        sources.prepare(data)
        yield data


@pytest.fixture
def make_folder(tmp_path):
    """Returns a function that writes an image folder and returns its path.

    Image i of class c is 8 x 6 pixels of the colour (c, i, 0), so that a pixel names its file.
    """

    def make(sizes, root="images", suffix=".png"):
        for c, (name, size) in enumerate(sizes.items()):
            folder = tmp_path / root / name
            folder.mkdir(parents=True)
            for i in range(size):
                Image.fromarray(np.full((6, 8, 3), (c, i, 0), np.uint8)).save(folder / f"{i:03}{suffix}")
        return tmp_path / root

    return make
