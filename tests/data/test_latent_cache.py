"""What is written is read, and a cache that is not whole is an error."""

import json
import os

import numpy as np
import pytest

from dit_jax.data import latent_cache

SHAPE = (2, 8, 6, 6)  # flips, height, width, twice the channels
TRAIN, EVAL = "train[:90%]", "test+extra/x"  # names that are no file names
IDENTITY = {"name": "shapes", "splits": {TRAIN: 120, EVAL: 30}}


def make_examples(size, seed):
    rng = np.random.default_rng(seed)
    moments = rng.standard_normal((size, *SHAPE)).astype(np.float32)
    moments[..., :3] = moments[..., :3] * [1, 2, 0.5] + [0, 3, -1]  # means: channels of their own scale and offset
    moments[..., 3:] -= [1, 0, 6]  # log-variances
    return moments, rng.integers(0, 10, size)


@pytest.fixture
def cache(tmp_path):
    """A cache that was written in batches of 50."""
    writer = latent_cache.LatentCacheWriter(tmp_path / "cache")
    for split, size, seed in ((TRAIN, 120, 0), (EVAL, 30, 1)):
        moments, labels = make_examples(size, seed)
        for start in range(0, size, 50):
            writer.write(split, moments[start : start + 50], labels[start : start + 50])
    writer.finish(IDENTITY, "sha256:abc", train_split=TRAIN)
    return tmp_path / "cache"


@pytest.mark.parametrize(("split", "size", "seed"), [(TRAIN, 120, 0), (EVAL, 30, 1)])
def test_round_trip_is_exact_to_float16(cache, split, size, seed):
    moments, labels = make_examples(size, seed)
    source = latent_cache.open_latents(cache, split)
    assert len(source) == size
    examples = source.__getitems__(list(range(size)))
    assert examples[0]["moments"].dtype == np.float32 and type(examples[0]["label"]) is int
    np.testing.assert_array_equal([e["moments"] for e in examples], moments.astype(np.float16))
    np.testing.assert_array_equal([e["label"] for e in examples], labels)
    np.testing.assert_array_equal(source[7]["moments"], examples[7]["moments"])


def test_manifest_says_what_was_written(cache):
    manifest = latent_cache.read_manifest(cache)
    assert (manifest.data, manifest.autoencoder) == (IDENTITY, "sha256:abc")
    assert manifest.splits == {TRAIN: 120, EVAL: 30}
    assert (manifest.latent_shape, manifest.num_flips, manifest.dtype) == ((8, 6, 3), 2, "float16")


def test_statistics_are_those_of_sampled_latents_of_the_training_split(cache):
    manifest = latent_cache.read_manifest(cache)
    moments = make_examples(120, 0)[0].astype(np.float16).astype(np.float64)
    mean, std = moments[..., :3], np.exp(moments[..., 3:] / 2)
    np.testing.assert_allclose(manifest.mean, mean.mean((0, 1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, np.sqrt(mean.var((0, 1, 2, 3)) + (std**2).mean((0, 1, 2, 3))), rtol=1e-12)
    # Drawing the latents is the definition; 20 draws of 34,560 values leave about 0.3 %.
    samples = mean + std * np.random.default_rng(0).standard_normal((20, *mean.shape))
    np.testing.assert_allclose(manifest.std, samples.std((0, 1, 2, 3, 4)), rtol=0.01)
    assert manifest.scale * samples.std() == pytest.approx(1, rel=0.01)


def test_truncated_file_is_a_one_line_error(cache):
    file = next(cache.glob("*test*"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match="truncated or damaged.*run `dit-jax encode") as error:
        latent_cache.open_latents(cache, EVAL)
    assert "\n" not in str(error.value)


def test_file_with_fewer_examples_than_the_manifest_is_an_error(cache):
    train, test = next(cache.glob("*train*")), next(cache.glob("*test*"))
    os.replace(test, train)
    with pytest.raises(ValueError, match="30 records instead of 120"):
        latent_cache.open_latents(cache, TRAIN)
    with pytest.raises(ValueError, match="truncated or damaged"):
        latent_cache.open_latents(cache, EVAL)


def test_damaged_record_is_an_error_when_it_is_read(cache):
    file = next(cache.glob("*train*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    source = latent_cache.open_latents(cache, TRAIN)
    with pytest.raises(ValueError, match="truncated or damaged"):
        source.__getitems__(list(range(len(source))))


def test_unknown_split_names_the_known_ones(cache):
    with pytest.raises(ValueError, match="has no split 'train', only .*train"):
        latent_cache.open_latents(cache, "train")


def test_missing_and_incomplete_caches_say_how_to_write_one(tmp_path):
    with pytest.raises(ValueError, match="no latent cache at .*dit-jax encode --output="):
        latent_cache.read_manifest(tmp_path / "none")
    latent_cache.LatentCacheWriter(tmp_path / "cache").write("train", *make_examples(2, 0))
    with pytest.raises(ValueError, match="incomplete.*dit-jax encode --output="):
        latent_cache.open_latents(tmp_path / "cache", "train")


def test_complete_cache_is_not_overwritten_and_an_incomplete_one_is_started_anew(cache):
    with pytest.raises(ValueError, match="already holds a latent cache; delete it"):
        latent_cache.LatentCacheWriter(cache)
    (cache / "manifest.json").unlink()
    writer = latent_cache.LatentCacheWriter(cache)
    writer.write("train", *make_examples(3, 5))
    writer.finish(IDENTITY, "other", train_split="train")
    assert len(latent_cache.open_latents(cache, "train")) == 3
    assert len(list(cache.iterdir())) == 2  # one split and the manifest: nothing of the first run is left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format 2, but this dit_jax reads up to 1; upgrade"),
        ({"scale": None}, "missing or unknown keys scale"),
        ({"extra": 1}, "missing or unknown keys extra"),
    ],
)
def test_manifest_is_read_strictly(cache, change, message):
    values = json.loads((cache / "manifest.json").read_text()) | change
    (cache / "manifest.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        latent_cache.read_manifest(cache)


def test_manifest_that_is_no_json_is_an_error(cache):
    (cache / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        latent_cache.read_manifest(cache)


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_moments_that_float16_cannot_hold_are_an_error(tmp_path, value):
    moments, labels = make_examples(2, 0)
    moments[1, 0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="must be finite in float16"):
        latent_cache.LatentCacheWriter(tmp_path / "cache").write("train", moments, labels)
