"""A batch is a function of (seed, step) alone."""

import numpy as np
import pytest

from dit_jax.config import DataConfig
from dit_jax.data import pipeline
from dit_jax.data.tokenizer import Tokenizer
from tests.tiny import write_tokenizer

NUM_EXAMPLES = 13  # shares no factor with the batch size, so that batches straddle epochs
SOURCE = [{"value": np.int32(i), "label": i} for i in range(NUM_EXAMPLES)]


def with_noise(example, rng):
    return {"value": example["value"], "noise": rng.random(dtype=np.float32)}


def train(*, source=SOURCE, transform=with_noise, seed=0, rows=range(4), start_step=0, num_steps=26, num_threads=3):
    return list(
        pipeline.train_batches(
            source,
            transform,
            seed=seed,
            global_batch_size=4,
            rows=rows,
            start_step=start_step,
            num_steps=num_steps,
            num_threads=num_threads,
        )
    )


def flat(batches, key="value"):
    return np.concatenate([batch[key] for batch in batches])


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [2], [0, 1]], [[0, 2], [1, 3]]])
def test_global_batch_does_not_depend_on_the_processes(split):
    whole = train()
    parts = [train(rows=rows) for rows in split]
    rows = np.argsort(np.concatenate(split))
    joined = [
        {key: np.concatenate([part[step][key] for part in parts])[rows] for key in whole[step]}
        for step in range(len(whole))
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("start_step", [1, 5, 25, 26])
def test_resumed_run_sees_the_batches_of_an_unresumed_one(start_step):
    assert_same(train(start_step=start_step), train()[start_step:])


def test_batches_do_not_depend_on_threads_or_batched_reads():
    class Batched(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    assert_same(train(num_threads=1), train(num_threads=8))
    assert_same(train(source=Batched(SOURCE)), train())


def test_each_epoch_visits_each_example_once_in_another_order():
    epochs = flat(train()).reshape(-1, NUM_EXAMPLES)  # 26 steps x 4 = 8 epochs of 13
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(NUM_EXAMPLES), (8, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_seeds_share_no_epoch():
    orders = [tuple(epoch) for seed in (0, 1, 2) for epoch in flat(train(seed=seed)).reshape(-1, NUM_EXAMPLES)]
    assert len(set(orders)) == len(orders)


def test_randomness_is_keyed_by_the_example_number_and_the_seed():
    noise = flat(train(), "noise")
    assert len(set(noise.tolist())) == noise.size  # no two examples, nor two visits of one, share a generator
    assert noise[7] == np.random.default_rng((0, pipeline.EXAMPLE_STREAM, 7)).random(dtype=np.float32)
    assert not np.intersect1d(noise, flat(train(seed=1), "noise")).size


def test_error_in_a_reading_thread_reaches_the_caller_as_it_is():
    def broken(example, rng):
        if example["label"] == 5:
            raise ValueError("cannot read image five.png")
        return with_noise(example, rng)

    with pytest.raises(ValueError, match="five") as error:
        train(transform=broken)
    assert type(error.value) is ValueError and str(error.value) == "cannot read image five.png"


@pytest.mark.parametrize("num_examples", [None, 8, 9, 1, 1000])
def test_evaluation_visits_each_example_once_in_order_and_masks_the_padding(num_examples):
    batches = list(
        pipeline.eval_batches(SOURCE, with_noise, batch_size=4, rows=range(4), num_examples=num_examples, num_threads=2)
    )
    count = min(num_examples or NUM_EXAMPLES, NUM_EXAMPLES)
    assert len(batches) == -(-count // 4)
    mask, index = flat(batches, "mask"), flat(batches, "index")
    assert mask.dtype == np.float32 and index.dtype == np.int32
    np.testing.assert_array_equal(mask, np.arange(mask.size) < count)
    np.testing.assert_array_equal(index[mask == 1], np.arange(count))
    np.testing.assert_array_equal(index[mask == 0], count - 1)
    np.testing.assert_array_equal(flat(batches), index)


@pytest.mark.parametrize(("start", "num_examples"), [(0, 5), (4, 5), (8, 100), (12, 1)])
def test_evaluation_of_a_part_is_that_part_of_the_whole(start, num_examples):
    batches = list(
        pipeline.eval_batches(
            SOURCE, with_noise, batch_size=4, rows=range(4), start=start, num_examples=num_examples, num_threads=2
        )
    )
    stop = min(start + num_examples, NUM_EXAMPLES)
    mask = flat(batches, "mask")
    np.testing.assert_array_equal(flat(batches)[mask == 1], np.arange(start, stop))
    np.testing.assert_array_equal(flat(batches, "index")[mask == 0], stop - 1)


def test_evaluation_rows_of_processes_join_to_the_batch():
    def batches(rows):
        return list(pipeline.eval_batches(SOURCE, with_noise, batch_size=4, rows=rows, num_threads=2))

    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a}
        for a, b in zip(batches([0, 1]), batches([2, 3]), strict=True)
    ]
    assert_same(joined, batches(range(4)))


def image_example():
    return {"image": np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3), "label": 2}


@pytest.mark.parametrize("channels", [1, 3])
def test_image_transform_makes_the_array_that_the_config_names(channels):
    data = DataConfig(name="x", image_size=8, channels=channels)
    result = pipeline.image_transform(data, train=False)(image_example(), np.random.default_rng(0))
    assert result["image"].shape == (8, 8, channels) and result["image"].dtype == np.float32
    assert result["image"].min() >= -1 and result["image"].max() <= 1
    assert result["label"] == 2 and result["label"].dtype == np.int32


def test_only_training_with_horizontal_flip_flips_half_of_the_images():
    def num_flipped(horizontal_flip, train):
        data = DataConfig(name="x", image_size=4, horizontal_flip=horizontal_flip)
        transform = pipeline.image_transform(data, train)
        images = [transform(image_example(), np.random.default_rng((0, g)))["image"] for g in range(200)]
        plain = pipeline.image_transform(data, train=False)(image_example(), np.random.default_rng(0))["image"]
        assert all((image == plain).all() or (image == plain[:, ::-1]).all() for image in images)
        return sum((image != plain).any() for image in images)

    assert 70 < num_flipped(True, True) < 130
    assert num_flipped(True, False) == num_flipped(False, True) == 0


def test_latent_transform_picks_a_flip_in_training_and_the_image_itself_in_evaluation():
    moments = np.stack([np.full((2, 2, 4), flip, np.float32) for flip in range(2)])
    example = {"moments": moments, "label": 3}

    def picked(train):
        transform = pipeline.latent_transform(train)
        results = [transform(example, np.random.default_rng((0, g))) for g in range(200)]
        assert all(result["moments"].shape == (2, 2, 4) and result["label"] == 3 for result in results)
        return np.array([result["moments"][0, 0, 0] for result in results])

    assert 70 < picked(True).sum() < 130
    assert not picked(False).any()


def test_training_from_a_cache_sees_the_flips_of_training_from_the_images():
    rng = np.random.default_rng(0)
    images = [{"image": rng.integers(0, 256, (4, 4, 3), np.uint8), "label": i} for i in range(NUM_EXAMPLES)]
    data = DataConfig(name="x", image_size=4)
    plain = pipeline.image_transform(data, train=False)

    def cached(example):  # the identity stands for the encoder, and an extra field rides along
        image = plain(example, rng)["image"]
        return {"moments": np.stack([image, image[:, ::-1]]), "label": example["label"], "caption": "a shoe"}

    from_images = train(source=images, transform=pipeline.image_transform(data, train=True), seed=3)
    from_latents = train(source=[cached(e) for e in images], transform=pipeline.latent_transform(train=True), seed=3)
    np.testing.assert_array_equal(flat(from_images, "image"), flat(from_latents, "moments"))
    np.testing.assert_array_equal(flat(from_images, "label"), flat(from_latents, "label"))
    assert from_latents[0].keys() == {"moments", "label"}


@pytest.mark.parametrize("train", [True, False])
def test_captions_come_with_images_and_with_latents(tmp_path, train):
    tokens = pipeline.caption_tokens(Tokenizer(write_tokenizer(tmp_path), 6), "caption")
    image, latent = ({"caption": "a red star", "label": 2}, {"moments": np.zeros((1, 2, 2, 4)), "label": 2})
    image |= {"image": image_example()["image"]}
    latent |= {"text": {"states": np.ones((3, 7), np.float32), "pooled": np.ones(7, np.float32)}}
    transforms = (
        pipeline.image_transform(DataConfig(name="x", image_size=8), train, tokens),
        pipeline.latent_transform(train, tokens),
        pipeline.latent_transform(train, pipeline.cached_text(6)),
    )
    examples = image, latent | {"caption": "a red star"}, latent
    for example, transform, names in zip(examples, transforms, ("ids", "ids", "states pooled"), strict=True):
        batches = pipeline.eval_batches([example] * 3, transform, batch_size=3, rows=range(3), num_threads=1)
        text = next(batches)["text"]
        assert set(text) == {"mask", *names.split()} and {len(rows) for rows in text.values()} == {3}
        assert text["mask"].sum() == 3 * (5 if names == "ids" else 3) and text["mask"].shape == (3, 6)
    assert text["states"].shape == (3, 6, 7) and text["states"].sum() == 3 * 3 * 7


def test_a_cache_without_mirror_images_gives_the_images():
    example = {"moments": np.zeros((1, 2, 2, 4), np.float32), "label": 3}
    for g in range(9):
        result = pipeline.latent_transform(train=True)(example, np.random.default_rng(g))
        assert result["moments"].shape == (2, 2, 4)
