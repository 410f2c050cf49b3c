"""Where images come from: folders, TFDS, and the fall-back of Fashion-MNIST."""

import dataclasses
import gzip
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_jax.config import DataConfig
from dit_jax.data import pipeline, sources


def folder_config(path, num_classes=2, **kwargs):
    return DataConfig(name=str(path), image_size=8, num_classes=num_classes, **kwargs)


def colours(source):
    """The (class, file) numbers in the pixels, and the labels."""
    examples = [source[i] for i in range(len(source))]
    return [tuple(e["image"][0, 0, :2]) for e in examples], [e["label"] for e in examples]


def read_idx(folder, name):
    content = gzip.decompress((pathlib.Path(folder) / f"{name}-ubyte.gz").read_bytes())
    num_dims = content[3]
    shape = np.frombuffer(content, ">u4", num_dims, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


# Image folders


def test_positional_splits_of_a_folder_are_disjoint_and_complete(make_folder):
    data = folder_config(make_folder({"cat": 25, "ant": 10}))
    train, labels = colours(sources.open_source(data, "train"))
    test, test_labels = colours(sources.open_source(data, "test"))
    everything = {(0, i) for i in range(25)} | {(1, i) for i in range(10)}
    assert set(train) | set(test) == everything and len(train) + len(test) == len(everything)
    assert set(test) == {(0, 9), (0, 19), (1, 9)}
    # Labels are by name: ant is 0, cat is 1.
    assert labels == [1 - c for c, _ in train] and test_labels == [1 - c for c, _ in test]
    assert labels == sorted(labels)


def test_split_folders_hold_the_splits(make_folder):
    root = make_folder({"a": 3, "b": 2}, "images/train").parent
    make_folder({"a": 1, "b": 4}, "images/test", ".JPEG")
    data = folder_config(root)
    assert colours(sources.open_source(data, "train"))[1] == [0, 0, 0, 1, 1]
    assert colours(sources.open_source(data, "test"))[1] == [0, 1, 1, 1, 1]
    assert sources.prepare(data) == f"5 + 5 images of 2 classes in {root}"


def test_every_mode_of_pillow_becomes_grey_or_rgb(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    (tmp_path / "a").mkdir()
    channels = {"1": 1, "L": 1, "LA": 1, "P": 3, "RGB": 3, "RGBA": 3}
    for i, mode in enumerate(channels):
        rgb.convert(mode).save(tmp_path / "a" / f"{i}.png")
    source = sources.open_source(folder_config(tmp_path, num_classes=1), "train")
    for example, count in zip(source, channels.values(), strict=True):
        assert example["image"].shape == (6, 8, count) and example["image"].dtype == np.uint8
    np.testing.assert_array_equal(source[5]["image"], np.asarray(rgb))


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated", "floats"])
def test_unreadable_image_is_named_when_it_is_read(make_folder, content):
    path = make_folder({"a": 3, "b": 3}) / "b" / "001.png"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:5000]
    if content == "floats":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path, format="TIFF")
    else:
        path.write_bytes(content)
    source = sources.open_source(folder_config(path.parent.parent), "train")
    with pytest.raises(ValueError, match=r"cannot read image .*/b/001\.png: .*; remove or replace it") as error:
        source[4]
    assert "\n" not in str(error.value)


def test_unreadable_image_stops_training_with_its_name(make_folder):
    path = make_folder({"a": 3, "b": 3}) / "b" / "001.png"
    path.write_bytes(b"")
    data = folder_config(path.parent.parent)
    batches = pipeline.train_batches(
        sources.open_source(data, "train"),
        pipeline.image_transform(data, train=True),
        seed=0,
        global_batch_size=2,
        rows=range(2),
        start_step=0,
        num_steps=3,
        num_threads=2,
    )
    with pytest.raises(ValueError, match=r"cannot read image .*/b/001\.png"):
        list(batches)


def test_decompression_bomb_is_refused_before_it_is_decoded(make_folder, monkeypatch):
    data = folder_config(make_folder({"a": 1, "b": 1}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # the images have 48; Pillow itself refuses from 80
    monkeypatch.setattr(Image.Image, "convert", lambda *args: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="8 x 6 pixels are more than 40"), pytest.warns(Image.DecompressionBombWarning):
        sources.open_source(data, "train")[0]


@pytest.mark.parametrize(
    ("sizes", "split", "num_classes", "message"),
    [
        (None, "train", 2, "no such folder; give an image folder or a TFDS name"),
        ({}, "train", 2, "one sub-folder a class"),
        ({"a": 1, "b": 1, "c": 1}, "train", 2, "config.data.num_classes=2 must be 3"),
        ({"a": 1, "b": 0}, "train", 2, "class folder .*/b must hold an image .* but has none; add some"),
        ({"a": 9, "b": 9}, "test", 2, "'test' .* has no images .* every 10th"),
        ({"a": 1, "b": 1}, "validation", 2, "no split 'validation', only train, test"),
        ({"train": 0, "x": 0}, "test", 2, "no split 'test', only train, x"),
        ({"train/a": 1, "train/b": 1, "test/a": 1, "test/c": 1}, "test", 2, "same class folders; they differ in 'b'"),
    ],
)
def test_folder_without_the_images_of_the_config_is_a_one_line_error(
    make_folder, tmp_path, sizes, split, num_classes, message
):
    (tmp_path / "images").mkdir() if sizes == {} else None
    root = tmp_path / "images" if not sizes else make_folder(sizes)
    with pytest.raises(ValueError, match=message) as error:
        sources.open_source(folder_config(root, num_classes), split)
    assert "\n" not in str(error.value)


def test_identity_of_a_folder_follows_its_files(make_folder):
    root = make_folder({"a": 11, "b": 11})
    data = folder_config(root)
    identity = sources.source_identity(data)
    assert json.loads(json.dumps(identity)) == identity
    assert identity["splits"] == {"train": 20, "test": 2}
    assert sources.source_identity(dataclasses.replace(data, num_threads=9)) == identity
    assert sources.source_identity(dataclasses.replace(data, image_size=16)) != identity
    (root / "a" / "000.png").rename(root / "a" / "xyz.png")
    assert sources.source_identity(data) != identity


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def test_extra_fields_come_from_the_nearest_metadata_file(make_folder):
    root = make_folder({"train/a": 2, "train/b": 1, "test/a": 1, "test/b": 1})
    write_metadata(root / "train" / "a", [{"file_name": "000.png", "caption": "nearest ✓", "score": 1.5}])
    write_metadata(
        root / "train", [{"file_name": f"a/{i:03}.png", "caption": f"split {i}", "score": i} for i in range(2)]
    )
    write_metadata(root, [{"file_name": f"./{s}/b/000.png", "caption": s, "score": 9} for s in ("train", "test")])
    data = folder_config(root, extra_fields=("caption", "score"))
    examples = list(sources.open_source(data, "train"))
    assert [(e["caption"], e["score"]) for e in examples] == [("nearest ✓", 1.5), ("split 1", 1), ("train", 9)]
    assert [e["label"] for e in examples] == [0, 0, 1]
    assert sources.open_source(folder_config(root), "train")[0].keys() == {"image", "label"}
    with pytest.raises(ValueError, match="test/a/000.png has no field 'caption'") as error:
        sources.open_source(data, "test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (None, ("caption",), "has no field 'caption' .* in metadata.jsonl; add it there, or take it out"),
        ('{"file_name": "000.png", "caption": null}', ("caption",), "has no field 'caption'"),
        ('{"file_name": "000.png", "caption": ["x"]}', ("caption",), "has no field 'caption'"),
        ('\n{"caption": "x"}', ("caption",), "metadata.jsonl line 2 must be a JSON object with a file_name"),
        ("[]", ("caption",), "metadata.jsonl line 1 must be a JSON object"),
        ("{", ("caption",), "metadata.jsonl line 1 must be a JSON object"),
        (None, ("label",), "config.data.extra_fields=.'label',. must name each field once, and none of"),
    ],
)
def test_extra_fields_that_are_not_there_are_a_one_line_error(make_folder, content, fields, message):
    root = make_folder({"a": 1, "b": 1})
    if content:
        (root / "a" / "metadata.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        sources.open_source(folder_config(root, extra_fields=fields), "train")
    assert "\n" not in str(error.value)


# TFDS, on the shipped part of Fashion-MNIST


@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_tfds_gives_the_pixels_and_labels_of_the_raw_files(shipped, split, prefix):
    folder = sources.SHIPPED_SUBSETS["fashion_mnist"]
    images, labels = read_idx(folder, f"{prefix}-images-idx3"), read_idx(folder, f"{prefix}-labels-idx1")
    source = sources.open_source(shipped, split)
    examples = source.__getitems__(list(range(len(source))))
    assert all(e["image"].shape == (28, 28, 1) and e["image"].dtype == np.uint8 for e in examples)
    read = sorted((e["image"].tobytes(), e["label"]) for e in examples)  # TFDS stores them in an order of its own
    assert read == sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_fall_back_to_the_shipped_subset_is_said_and_recorded(shipped):
    assert "the shipped subset of 5,000 images, because the download failed" in sources.prepare(shipped)
    identity = sources.source_identity(shipped)
    assert identity["shipped_subset"] is True and identity["splits"] == {"train": 4500, "test": 500}
    assert json.loads(json.dumps(identity)) == identity


def test_parts_of_a_split_are_disjoint(shipped):
    whole, first, rest = (sources.open_source(shipped, split) for split in ("test", "test[:90%]", "test[90%:]"))
    joined = [*first, *rest]
    assert len(rest) == 50
    assert all((a["image"] == b["image"]).all() for a, b in zip(whole, joined, strict=True))


def test_subset_is_never_mistaken_for_the_data_set(shipped, tmp_path):
    prepared = pathlib.Path(shipped.data_dir) / "shipped_subset" / "fashion_mnist"
    assert not (pathlib.Path(shipped.data_dir) / "fashion_mnist").exists()
    shutil.copytree(prepared, tmp_path / "fashion_mnist")  # stands for the whole data set
    shutil.copytree(prepared, tmp_path / "shipped_subset" / "fashion_mnist")
    data = dataclasses.replace(shipped, data_dir=str(tmp_path))
    assert sources.prepare(data) == f"fashion_mnist as prepared in {tmp_path}/fashion_mnist/3.0.1"
    assert sources.source_identity(data)["shipped_subset"] is False


def test_folder_of_half_a_preparation_is_ignored(shipped, tmp_path):
    # What a kill leaves: TFDS's temporary folder, and no folder of the version.
    incomplete = tmp_path / "shipped_subset" / "fashion_mnist" / "incomplete.ABCDEF_3.0.1"
    incomplete.mkdir(parents=True)
    (incomplete / "fashion_mnist-train.array_record-00000-of-00001").write_bytes(b"half")
    data = dataclasses.replace(shipped, data_dir=str(tmp_path))
    assert "shipped subset of 5,000" in sources.prepare(data)
    assert len(sources.open_source(data, "train")) == 4500


def test_data_set_prepared_as_tfrecord_is_an_error(shipped, tmp_path):
    shutil.copytree(pathlib.Path(shipped.data_dir) / "shipped_subset" / "fashion_mnist", tmp_path / "fashion_mnist")
    info = tmp_path / "fashion_mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="as tfrecord, but random access needs array_record; set config.data.data_dir"):
        sources.prepare(dataclasses.replace(shipped, data_dir=str(tmp_path)))


def test_damaged_record_file_is_an_error_when_it_is_read(shipped, tmp_path):
    shutil.copytree(pathlib.Path(shipped.data_dir) / "shipped_subset" / "fashion_mnist", tmp_path / "fashion_mnist")
    next((tmp_path / "fashion_mnist" / "3.0.1").glob("*test*")).write_bytes(b"half")
    source = sources.open_source(dataclasses.replace(shipped, data_dir=str(tmp_path)), "test")
    with pytest.raises(ValueError, match="cannot read fashion_mnist test: .*; delete .* to prepare it anew"):
        source[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "fashon_mnist"}, "not a TFDS data set or an existing folder; did you mean 'fashion_mnist'"),
        ({"name": "fashion_mnist:9.9.9"}, "cannot be loaded: .* at version 9.9.9"),
        ({"num_classes": 9}, "config.data.num_classes=9 must be 10, the number of classes of fashion_mnist"),
        ({"name": "wikipedia"}, "must have one Image feature, but has none"),
        ({"name": "cifar10"}, "could not be downloaded: .*no network in this test.*; set config.data.raw_dir"),
        ({"raw_dir": "/nowhere"}, "config.data.raw_dir='/nowhere': no such folder"),
        ({"raw_dir": "."}, "train-images-idx3-ubyte.gz is missing"),
    ],
)
def test_data_set_that_cannot_be_had_is_a_one_line_error(shipped, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        sources.prepare(dataclasses.replace(shipped, data_dir=str(tmp_path), **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["validation", "train[", "train[:0%]"])
def test_unknown_or_empty_split_is_a_one_line_error(shipped, split):
    with pytest.raises(ValueError, match="its splits are train, test|is empty") as error:
        sources.open_source(shipped, split)
    assert "\n" not in str(error.value)


def test_shipped_subset_is_balanced_and_chosen_as_its_readme_says():
    folder, debian = sources.SHIPPED_SUBSETS["fashion_mnist"], pathlib.Path("/usr/share/datasets/fashion-mnist")
    for prefix, n in (("train", 450), ("t10k", 50)):
        images, labels = read_idx(folder, f"{prefix}-images-idx3"), read_idx(folder, f"{prefix}-labels-idx1")
        assert np.bincount(labels).tolist() == [n] * 10 and images.shape == (10 * n, 28, 28)
        if debian.is_dir():
            all_labels = read_idx(debian, f"{prefix}-labels-idx1")
            chosen = [np.random.default_rng(c).permutation(np.flatnonzero(all_labels == c))[:n] for c in range(10)]
            chosen = np.sort(np.concatenate(chosen))
            np.testing.assert_array_equal(labels, all_labels[chosen])
            np.testing.assert_array_equal(images, read_idx(debian, f"{prefix}-images-idx3")[chosen])


def test_extra_fields_of_tfds_are_its_strings_and_numbers(shipped, tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(4, 4, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
        "caption": tfds.features.Text(),
        "height": tfds.features.Scalar(np.int64),
        "score": tfds.features.Scalar(np.float32),
        "words": tfds.features.Sequence(tfds.features.Text()),
    }

    def examples():
        for i in range(3):
            image = np.full((4, 4, 3), i, np.uint8)
            yield (
                i,
                {
                    "image": image,
                    "label": i % 2,
                    "caption": f"Schuh ✓ {i}",
                    "height": i - 1,
                    "score": i / 2,
                    "words": ["a"],
                },
            )

    tfds.dataset_builders.store_as_tfds_dataset(
        "captioned",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples()},
        data_dir=str(tmp_path),
        file_format="array_record",
        disable_shuffling=True,
    )
    data = DataConfig(
        name="captioned", image_size=4, num_classes=2, data_dir=str(tmp_path), extra_fields=("score", "caption")
    )
    read = sorted((e["score"], e["caption"], e["image"][0, 0, 0]) for e in sources.open_source(data, "train"))
    assert read == [(i / 2, f"Schuh ✓ {i}", i) for i in range(3)]
    heights = sources.open_source(dataclasses.replace(data, extra_fields=("height",)), "train")
    assert sorted(e["height"] for e in heights) == [-1, 0, 1]
    for name in ("words", "nothing"):
        with pytest.raises(ValueError, match=f"has no string or number '{name}', only .*caption.*; choose of") as error:
            sources.open_source(dataclasses.replace(data, extra_fields=(name,)), "train")
        assert "\n" not in str(error.value)


def test_map_of_an_image_is_read_beside_it(make_folder):
    root = make_folder({"a": 2})
    classes = np.random.default_rng(0).integers(0, 4, (6, 8)).astype(np.uint8)
    (root / "maps").mkdir()
    Image.fromarray(classes).save(root / "maps" / "grey.png")
    palette = Image.fromarray(classes, mode="P")
    palette.putpalette([255, 0, 0] * 4)  # the indices are the classes, whatever their colours
    palette.save(root / "maps" / "palette.png")
    write_metadata(
        root / "a", [{"file_name": f"{i:03}.png", "classes": f"../maps/{name}.png"} for i, name in enumerate("xy")]
    )
    data = folder_config(root, num_classes=2, map_field="classes")
    with pytest.raises(ValueError, match=r"the map '../maps/x.png' of image .* must lie below"):
        sources.open_source(data, "train")
    (root / "maps").rename(root / "a" / "maps")
    rows = [{"file_name": f"{i:03}.png", "classes": f"maps/{name}.png"} for i, name in enumerate(("grey", "palette"))]
    write_metadata(root / "a", rows)
    source = sources.open_source(dataclasses.replace(data, num_classes=1), "train")
    for example in source:
        np.testing.assert_array_equal(example["map"], classes)
    Image.fromarray(classes[:5]).save(root / "a" / "maps" / "grey.png")
    with pytest.raises(ValueError, match=r"map .*grey.png is 8 x 5, but its image 8 x 6; they must be of one size"):
        source[0]
    with pytest.raises(ValueError, match="map_field='classes' needs an image folder"):
        sources.open_source(DataConfig("fashion_mnist", 28, map_field="classes"), "train")
