"""The classifier of a data set: the same from the same images, kept, and told by its accuracy."""

import dataclasses

import jax
import numpy as np
from PIL import Image

from dit_jax.config import DataConfig
from dit_jax.data.sources import open_source
from dit_jax.evaluation.trained_classifier import train_classifier, trained_classifier
from dit_jax.metrics.classifier import Classifier
from tests.tiny import data_section, make_image_folder


def test_it_learns_is_deterministic_and_is_trained_once(tmp_path):
    data = DataConfig(**data_section(make_image_folder(tmp_path / "images", num_images=40)))
    first = trained_classifier(data, tmp_path / "cache")
    assert first.accuracy == 1.0  # bars of two directions, and noise
    again = train_classifier(Classifier(3, 1), data, open_source(data, "train"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first.params, again)))
    (kept,) = (tmp_path / "cache").glob("classifier-*.safetensors")
    written = kept.stat().st_mtime_ns
    second = trained_classifier(data, tmp_path / "cache")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first.params, second.params)))
    assert kept.stat().st_mtime_ns == written and second.accuracy == first.accuracy
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    data = dataclasses.replace(data, name=str(moved))
    assert trained_classifier(data, tmp_path / "cache").accuracy == first.accuracy
    assert [kept] == list((tmp_path / "cache").glob("classifier-*.safetensors"))
    path = moved / "class_0" / "000.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)  # another image of this name: another classifier
    trained_classifier(data, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("classifier-*.safetensors"))) == 2


def test_a_grey_image_is_seen_as_its_repeated_channel_and_a_large_one_is_scaled():
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 256, (2, 40, 40, 1), np.uint8), 3, axis=-1)
    for channels in (1, 3):
        module = Classifier(5, channels)
        outputs, variables = module.init_with_output(jax.random.key(0), images)
        assert outputs["pool"].shape == (2, 64) and outputs["logits"].shape == (2, 5)
        assert variables["params"]["conv1"]["kernel"].shape[2] == channels
        small = jax.image.resize(images.astype(np.float32), (2, 32, 32, 3), "bilinear", antialias=True)
        rounded = module.apply(variables, np.asarray(small).round().astype(np.uint8))
        np.testing.assert_allclose(rounded["logits"], outputs["logits"], atol=0.02)
