"""References in each form, and the names of figures: FID and sFID are Inception's alone."""

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax.config import DataConfig, MeshConfig
from dit_jax.evaluation.evaluator import Evaluator
from dit_jax.evaluation.measure import count_suffix, figure_name
from dit_jax.evaluation.networks import NamedNetwork
from dit_jax.evaluation.reference import load_reference, open_reference, reference_data
from dit_jax.metrics.adm_files import read_statistics
from dit_jax.metrics.feature_network import FeatureNetwork
from dit_jax.parallel.mesh import make_mesh
from tests.tiny import store_tfds

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), np.uint8)
DATA = DataConfig("unused", image_size=6)


def network(key):
    """Returns a network with Inception's outputs, in small."""

    def apply(params, images):
        x = images.reshape(len(images), -1) / 255.0
        return {"pool": x @ params["pool"], "spatial": x @ params["spatial"], "logits": x @ params["logits"]}

    rng = np.random.default_rng(1)
    params = {
        name: rng.standard_normal((108, n), np.float32) for name, n in (("pool", 5), ("spatial", 4), ("logits", 3))
    }
    facts = {"name": "small", "distance": "FID" if key == "inception" else "FD-small", "sha256": "of the weights"}
    return NamedNetwork(key, FeatureNetwork("small", facts["distance"], params, apply), tuple(params), facts)


@pytest.fixture
def folder(tmp_path):
    """A folder of the images, in sub-folders, and an `.npz` file of them."""
    for i, image in enumerate(IMAGES):
        path = tmp_path / "images" / str(i // 20) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    return tmp_path


def evaluator(key, reference, cache):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return Evaluator(network(key), load_reference(str(reference), DATA, network(key), mesh, cache), mesh)


def test_a_folder_a_file_and_the_kept_statistics_are_one_reference(folder):
    values = {}
    for name in ("images", "images.npz"):
        found = evaluator("inception", folder / name, folder / "cache")
        assert found.reference.identity["num_images"] == 40
        values[name] = found.evaluate([IMAGES[:30]], None, ["fd", "sfid"]).values
    (kept,) = [p for p in (folder / "cache").iterdir() if read_statistics(p).count == 40][:1]
    found = evaluator("inception", kept, folder / "cache")  # ADM's form: statistics without images
    values["kept"] = found.evaluate([IMAGES[:30]], None, ["fd", "sfid"]).values
    assert values["images"] == values["images.npz"] == values["kept"]
    assert set(values["images"]) == {"fid_30", "sfid_30"} and values["images"]["fid_30"] > 0
    with pytest.raises(ValueError, match="precision cannot be measured: the reference has statistics alone"):
        found.choose(["precision"], 30, has_labels=False)
    with pytest.raises(ValueError, match="has no images, and its statistics are of Inception's features"):
        evaluator("small", kept, folder / "cache")


def test_a_reference_is_computed_once_and_anew_where_its_content_changed(folder):
    cache = folder / "cache"
    evaluator("small", folder / "images", cache)
    (kept,) = cache.iterdir()
    written = kept.stat().st_mtime_ns
    evaluator("small", folder / "images", cache)
    assert [kept] == list(cache.iterdir()) and kept.stat().st_mtime_ns == written
    Image.fromarray(IMAGES[1]).save(folder / "images" / "0" / "000.png")
    evaluator("small", folder / "images", cache)
    assert len(list(cache.iterdir())) == 2


def test_parts_of_any_size_give_the_same_figures_and_hash(folder):
    found = evaluator("small", folder / "images.npz", folder / "cache")
    metrics = ["fd", "is", "precision", "recall"]
    at_once = found.evaluate([IMAGES[:33]], None, metrics)
    assert at_once == found.evaluate(np.split(IMAGES[:33], [1, 20]), None, metrics)
    assert at_once.values.keys() == {f"{name}_small_33" for name in ("fd", "is", "is_std", "precision", "recall")}
    with pytest.raises(ValueError, match="fid is of Inception's features alone"):
        found.choose(["fid"], 33, has_labels=False)


def test_figures_are_named_after_the_network_and_the_number_of_images():
    assert figure_name("fd", "inception", 50_000) == "fid"
    assert figure_name("sfid", "inception", 10_000) == "sfid_10k"
    assert figure_name("fd", "dinov2", 2_500) == "fd_dinov2_2500"
    assert figure_name("recognised", "classifier", 10) == "recognised"
    assert [count_suffix(n) for n in (999, 1000, 49_999, 50_000)] == ["_999", "_1k", "_49999", ""]


def test_images_of_another_size_are_an_error(folder):
    np.savez(folder / "large.npz", arr_0=np.zeros((2, 7, 7, 3), np.uint8))
    with pytest.raises(ValueError, match="has images of 7 x 7 pixels, but the samples have 6 a side"):
        evaluator("small", folder / "large.npz", folder / "cache")


def test_another_tfds_data_set_is_a_reference_by_its_own_classes_in_the_size_and_channels_of_the_run(tmp_path):
    name = store_tfds(tmp_path)
    run = DataConfig(
        "another", image_size=4, channels=1, num_classes=7, data_dir=str(tmp_path), extra_fields=("caption",)
    )
    for reference, split, count in (
        (name, "train", 12),
        (f"{name}:test", "test", 5),
        (f"{name}:1.0.0:test", "test", 5),
    ):
        found = open_reference(reference, run)
        assert (found.identity["split"], found.num_images) == (split, count)
        (images,) = found.batches()
        assert images.shape == (count, 4, 4, 3) and (images == images[..., :1]).all()  # grey, as the run's
    with pytest.raises(ValueError, match="'val' is not a split of tiny_objects; its splits are"):
        open_reference(f"{name}:val", run)
    with pytest.raises(ValueError, match="--reference=fashon_mnist: .*; did you mean .fashion_mnist.\\?"):
        open_reference("fashon_mnist", run)


@pytest.mark.parametrize(
    ("own", "reference", "split"),
    [
        ("fashion_mnist", "fashion_mnist", "train[:9]"),
        ("fashion_mnist", "fashion_mnist:test[:10%]", "test[:10%]"),
        ("fashion_mnist:3.0.1", "fashion_mnist:3.0.1", "train[:9]"),
        ("imagenet_resized/8x8:0.1.0", "imagenet_resized/8x8:0.1.0:validation", "validation"),
        ("data/emoji", "data/emoji:test", "test"),
        ("/data/a:b", "/data/a:b:test", "test"),
        ("/data/a:b", "/data/a:b", "train[:9]"),
    ],
)
def test_the_runs_own_data_set_is_a_reference_with_all_its_settings(own, reference, split):
    data = DataConfig(own, 8, num_classes=7, train_split="train[:9]", raw_dir="raw")
    assert reference_data(reference, data) == (data, split)
