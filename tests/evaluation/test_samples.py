"""Samples that were not drawn now: which folders are images to measure, and how those are read."""

import numpy as np
import pytest
from PIL import Image

from dit_jax.config import DataConfig
from dit_jax.evaluation import evaluator
from dit_jax.evaluation.evaluated import first_images
from dit_jax.evaluation.reference import open_reference
from dit_jax.evaluation.samples import open_samples

IMAGES = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Five pictures, two of them grey, in a folder and one below it."""
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for i, image in enumerate(IMAGES):
        path = tmp_path / "pictures" / ("more" if i > 2 else "") / f"{i}.png"
        Image.fromarray(image[..., 0] if i in (1, 4) else image).save(path)
    return tmp_path / "pictures"


def test_a_folder_of_pictures_is_read_in_order_as_rgb(folder):
    samples = open_samples(str(folder))
    expected = np.array(IMAGES)
    for i in (1, 4):
        expected[i] = IMAGES[i, ..., :1]
    assert samples.shape == (5, 8, 8, 3) and samples.labels is None
    assert np.array_equal(np.concatenate(list(samples.batches(2))), expected)
    assert [len(batch) for batch in first_images(samples.batches(2), 3)] == [2, 1]


def test_samples_of_several_sizes_or_that_are_not_square_are_an_error(folder):
    Image.new("RGB", (10, 8)).save(folder / "more" / "5.png")
    with pytest.raises(ValueError, match="one size, but 0.png is 8 x 8 and 5.png is 10 x 8"):
        list(open_samples(str(folder)).batches(8))
    for path in folder.rglob("*.png"):
        Image.new("RGB", (10, 8)).save(path)
    with pytest.raises(ValueError, match="images of 8 x 10; give square ones"):
        open_samples(str(folder))


OWN = {  # what a folder holds beside pictures, and what is said
    "run": (["config.json", "checkpoints/"], "is of a run, whose pictures show its progress"),
    "run's pictures": (["../config.json", "../checkpoints/"], "is of a run, whose pictures show its progress"),
    "latent cache": (["manifest.json", "encoding.json"], "is a latent cache and has no images"),
    "drawing": (["samples.npz"], "is a drawing, whose pictures show many images in one; give .*samples.npz"),
    "drawing below": (["more/samples.npz"], "more is a drawing"),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_run_a_cache_and_a_drawing_are_no_images_to_measure(kind, folder):
    names, message = OWN[kind]
    folder = folder.rename(folder.with_name("samples"))
    for name in names:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        open_samples(str(folder))
    with pytest.raises(ValueError, match=message):
        open_reference(str(folder), DataConfig("x", 8))


def test_the_pictures_of_a_drawing_are_images_to_measure_also_within_a_run(folder):
    run = folder.parent
    (run / "config.json").touch()
    (run / "checkpoints").mkdir()
    drawing = run / "samples" / "drawn"
    drawing.mkdir(parents=True)
    (drawing / "samples.npz").touch()
    assert len(open_samples(str(folder.rename(drawing / "png")))) == 5


def test_a_run_as_the_reference_is_refused_before_a_network_is_made(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluator, "named_network", lambda *_: pytest.fail("it was made"))
    (folder / "config.json").touch()
    (folder / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="is of a run"):
        evaluator.make_evaluator(str(folder), "classifier", DataConfig("x", 8), None, tmp_path)
