"""The image-text model learns pairs, generalises to held-out images, and is kept."""

import numpy as np

from dit_jax.config import DataConfig
from dit_jax.evaluation.trained_retrieval import RECIPE, trained_retrieval
from tests.tiny import data_section, make_image_folder, write_captions, write_text_encoder


def test_it_tells_the_captions_of_held_out_images(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPE, "batch_size", 18)  # more steps, of less
    folder = write_captions(make_image_folder(tmp_path / "images"), ["a", "red flag", "star"])
    data = DataConfig(**data_section(folder), extra_fields=("caption",))
    arguments = data, "caption", write_text_encoder(tmp_path / "encoder"), tmp_path / "cache"
    model = trained_retrieval(*arguments)
    assert model.captions == ("a", "red flag", "star") and model.labels.tolist() == [0, 1, 2]
    assert model.figures == {"median_rank": 0.0, "top_tenth": 1.0}  # of six held-out images
    assert model.measure(model.images) == model.figures
    swapped = model.measure(model.images[[1, 2, 0]])
    assert swapped["top_tenth"] == 0 and swapped["median_rank"] >= 0.5
    (kept,) = (tmp_path / "cache").glob("*.safetensors")
    before = kept.stat().st_mtime_ns
    again = trained_retrieval(*arguments)
    assert kept.stat().st_mtime_ns == before
    np.testing.assert_array_equal(
        again.similarity(model.images, model.captions), model.similarity(model.images, model.captions)
    )
