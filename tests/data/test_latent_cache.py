"""What is written is read, whoever wrote it and however often it was killed; a cache that is not whole is an error."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import resource

import ml_dtypes
import numpy as np
import pytest

from dit_jax import files
from dit_jax.data import latent_cache
from dit_jax.files import SUM_KEY, file_lock, sealed

TRAIN, EVAL = "train[:90%]", "test+extra/x"  # names that are no file names
SIZES = {TRAIN: 23, EVAL: 5}
BATCH_SIZE = 3
PLAN = latent_cache.Plan(
    data={"name": "shapes", "image_size": 16, "num_classes": 10, "splits": SIZES},
    train_split=TRAIN,
    autoencoder="sha256:abc",
    latent_shape=(8, 6, 3),
    stochastic=True,
    num_flips=2,
    dtype="float16",
    extra_fields=("caption", "score"),
    shard_size=8,
    batch_size=BATCH_SIZE,
    num_devices=1,
    device="cpu",
    jax="0",
)
DETERMINISTIC = dataclasses.replace(PLAN, stochastic=False, num_flips=1, extra_fields=(), dtype="bfloat16")


def examples(plan, split):
    """All moments, labels and extra fields of a split."""
    rng = np.random.default_rng(len(split))
    height, width, channels = plan.latent_shape
    moments = rng.standard_normal((SIZES[split], plan.num_flips, height, width, channels * (1 + plan.stochastic)))
    moments[..., :channels] = moments[..., :channels] * [1, 2, 0.5] + [0, 3, -1]  # each channel its scale and offset
    moments[..., channels:] -= [1, 0, 6][: moments.shape[-1] - channels]  # log-variances
    fields = [{"caption": f"ein Schuh ✓ {i}", "score": i / 3} for i in range(SIZES[split])]
    fields = [{name: row[name] for name in plan.extra_fields} for row in fields]
    return moments.astype(np.float32), rng.integers(0, 10, SIZES[split]), fields


def batches(plan, shard):
    """The batches of a shard."""
    whole = examples(plan, shard.split)
    for start in range(shard.start, shard.start + shard.count, BATCH_SIZE):
        stop = min(start + BATCH_SIZE, shard.start + shard.count)
        yield tuple(part[start:stop] for part in whole)


def encode(path, plan=PLAN):
    """Fills a cache as `dit-jax encode` does; returns the names of the shards that this call wrote."""
    writer = latent_cache.LatentCacheWriter(path, plan)
    writer.write_folder("autoencoder", lambda folder: (folder / "weights").write_text("1, 2, 3"))
    damaged = [shard for shard in writer.shards if not writer.is_intact(shard)] if writer.was_complete else []
    if damaged:
        writer.discard(damaged)
    written = []
    for shard in writer.missing_shards():
        writer.write_shard(shard, batches(plan, shard))
        written.append(shard.name)
    writer.finish()
    return written


def write_sealed(path, values):
    """Writes a record with the right sum."""
    values.pop(SUM_KEY, None)
    path.write_text(files.to_json(sealed(values)))


def without_sums(path):
    """Makes of a cache's records what format 2 had."""
    for file in path.glob("*.json"):
        values = json.loads(file.read_text())
        values = {key: value for key, value in values.items() if key not in (SUM_KEY, "plan")}
        file.write_text(files.to_json(values | ({"version": 2} if "version" in values else {})))


def content(path):
    return {file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def cache(tmp_path):
    encode(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def no_fsync(monkeypatch):
    monkeypatch.setattr(files, "flush", lambda path: None)  # which takes most of a tiny cache's time


@pytest.mark.parametrize("plan", [PLAN, DETERMINISTIC, dataclasses.replace(PLAN, dtype="bfloat16", shard_size=100)])
@pytest.mark.parametrize("split", [TRAIN, EVAL])
def test_round_trip_is_exact_to_the_dtype(tmp_path, plan, split):
    encode(tmp_path, plan)
    moments, labels, fields = examples(plan, split)
    source = latent_cache.open_latents(tmp_path, split)
    assert len(source) == SIZES[split]
    read = source.__getitems__(list(range(len(source))))
    assert read[0]["moments"].dtype == np.float32 and type(read[0]["label"]) is int
    stored = moments.astype(np.float16 if plan.dtype == "float16" else ml_dtypes.bfloat16)
    np.testing.assert_array_equal([e["moments"] for e in read], stored.astype(np.float32))
    np.testing.assert_array_equal([e["label"] for e in read], labels)
    assert [{name: e[name] for name in e if name not in ("moments", "label")} for e in read] == fields
    np.testing.assert_array_equal(source[-1]["moments"], read[-1]["moments"])


def test_a_cache_without_names_of_classes_gets_them_when_it_is_checked(cache, no_fsync):
    """Older releases wrote none."""
    without_sums(cache)
    names = [str(i) for i in range(10)]
    shards = {path: data for path, data in content(cache).items() if path.suffix == ".arrayrecord"}
    assert encode(cache, dataclasses.replace(PLAN, data=PLAN.data | {"class_names": names})) == []
    assert latent_cache.read_manifest(cache).data["class_names"] == names
    assert shards.items() <= content(cache).items()
    manifest = files.check_seal(json.loads((cache / "manifest.json").read_text()))
    manifest["data"]["class_names"] = names[:9]
    (cache / "manifest.json").write_text(json.dumps(files.sealed(manifest)))
    with pytest.raises(ValueError, match="data.class_names: these cannot be"):
        latent_cache.read_manifest(cache)


TEXT = latent_cache.CachedText(field="caption", encoder="sha256:def", max_length=5, width=6, pooled_width=3)
LENGTHS = [0, 5, 2]  # of the captions, in turn: the first is empty


def with_text(shard, change=lambda states: states):
    """The batches of a shard with the states of captions."""
    for number, (moments, labels, fields) in enumerate(batches(PLAN, shard)):
        rng = np.random.default_rng(number)
        texts = [{"states": change(rng.normal(size=(n, 6))), "pooled": rng.normal(size=3)} for n in LENGTHS]
        yield moments, labels, [row | {"text": text} for row, text in zip(fields, texts, strict=False)]


def test_states_of_captions_are_kept_without_their_padding(tmp_path):
    writer = latent_cache.LatentCacheWriter(tmp_path, dataclasses.replace(PLAN, text=TEXT))
    for shard in writer.missing_shards():
        writer.write_shard(shard, with_text(shard))
    assert writer.finish().text == TEXT == latent_cache.read_manifest(tmp_path).text
    source = latent_cache.open_latents(tmp_path, TRAIN)
    fields = [row for shard in writer.shards for *_, rows in with_text(shard) for row in rows]
    for read, written in zip(source.__getitems__(list(range(len(source)))), fields, strict=False):
        assert read["caption"] == written["caption"]
        for name, array in written["text"].items():
            np.testing.assert_array_equal(read["text"][name], array.astype(np.float16).astype(np.float32))


def test_a_cache_without_captions_is_as_before_there_were_any(cache):
    assert "text" not in json.loads((cache / "manifest.json").read_text())
    without_sums(cache)
    plan = json.loads((cache / "encoding.json").read_text())
    assert plan.pop("text") is None
    (cache / "encoding.json").write_text(json.dumps(plan))  # as an older dit_jax wrote it
    assert encode(cache) == [] and latent_cache.read_manifest(cache).text is None


@pytest.mark.parametrize("change", [lambda states: states * 1e6, lambda states: states * np.nan])
def test_states_that_the_dtype_cannot_hold_are_an_error(tmp_path, change):
    writer = latent_cache.LatentCacheWriter(tmp_path, dataclasses.replace(PLAN, text=TEXT))
    with pytest.raises(ValueError, match="the text encoder's states must be finite in float16"):
        writer.write_shard(writer.shards[0], with_text(writer.shards[0], change))


@pytest.mark.parametrize("text", [{"max_length": 4}, {"width": 5}, {"pooled_width": 4}, {"width": 0}, {"encoder": 1}])
def test_states_of_another_size_than_the_manifest_says_are_damaged(tmp_path, text):
    writer = latent_cache.LatentCacheWriter(tmp_path, dataclasses.replace(PLAN, text=TEXT))
    for shard in writer.missing_shards():
        writer.write_shard(shard, with_text(shard))
    writer.finish()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["text"] |= text
    write_sealed(tmp_path / "manifest.json", manifest)
    with pytest.raises(ValueError, match="damaged"):
        latent_cache.open_latents(tmp_path, TRAIN).__getitems__([0, 1, 2])


def test_manifest_says_what_was_written(cache):
    manifest = latent_cache.read_manifest(cache)
    assert (manifest.data, manifest.autoencoder, manifest.splits) == (PLAN.data, "sha256:abc", SIZES)
    assert (manifest.latent_shape, manifest.num_flips, manifest.dtype) == ((8, 6, 3), 2, "float16")
    assert (manifest.stochastic, manifest.extra_fields) == (True, ("caption", "score"))
    assert [shard.count for shard in manifest.shards[TRAIN]] == [8, 8, 7]
    assert manifest.shards[EVAL][0].file == "latents-test%2Bextra%2Fx-00000-of-00001.arrayrecord"
    for shards in manifest.shards.values():
        assert all((cache / shard.file).stat().st_size == shard.bytes for shard in shards)


def test_statistics_are_those_of_sampled_latents_of_the_training_split(cache):
    manifest = latent_cache.read_manifest(cache)
    moments = examples(PLAN, TRAIN)[0].astype(np.float16).astype(np.float64)
    mean, std = moments[..., :3], np.exp(moments[..., 3:] / 2)
    np.testing.assert_allclose(manifest.mean, mean.mean((0, 1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, np.sqrt(mean.var((0, 1, 2, 3)) + (std**2).mean((0, 1, 2, 3))), rtol=1e-12)
    # Drawing the latents is the definition; 100 draws of 6,624 values leave about 0.3 %.
    samples = mean + std * np.random.default_rng(0).standard_normal((100, *mean.shape))
    np.testing.assert_allclose(manifest.std, samples.std((0, 1, 2, 3, 4)), rtol=0.01)
    assert manifest.scale * samples.std() == pytest.approx(1, rel=0.01)


def test_statistics_of_latents_that_are_not_drawn_are_their_own(tmp_path):
    encode(tmp_path, DETERMINISTIC)
    manifest = latent_cache.read_manifest(tmp_path)
    latents = examples(DETERMINISTIC, TRAIN)[0].astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_allclose(manifest.mean, latents.mean((0, 1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, latents.std((0, 1, 2, 3)), rtol=1e-12)
    assert manifest.scale == pytest.approx(1 / latents.std(), rel=1e-12)


# Several processes, kills and damage


class Kill(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_kill_before_or_after_any_file_operation_costs_nothing(tmp_path, monkeypatch):
    encode(tmp_path / "whole")
    whole = content(tmp_path / "whole")

    def count_down(operation):
        def tick():
            nonlocal left
            left -= 1
            if left == 0:
                raise Kill

        def counted(*args, **kwargs):
            tick()
            result = operation(*args, **kwargs)
            tick()
            return result

        return counted

    monkeypatch.setattr(files, "flush", count_down(lambda path: None))
    monkeypatch.setattr(os, "replace", count_down(os.replace))
    for name in ("write_text", "unlink", "mkdir"):
        monkeypatch.setattr(pathlib.Path, name, count_down(getattr(pathlib.Path, name)))

    def encode_with_a_kill(path, moment):
        """Returns whether the encoding was still running at that moment."""
        nonlocal left
        left = moment
        try:
            encode(path)
        except Kill:
            if not (path / "manifest.json").exists():
                with pytest.raises(ValueError, match="unfinished|no latent cache"):
                    latent_cache.open_latents(path, TRAIN)
            left = 0
            encode(path)
        else:
            return False
        finally:
            left = 0  # never again
        assert content(path) == whole, moment
        return True

    moment = 1
    while encode_with_a_kill(tmp_path / f"{moment}", moment):
        moment += 1
    assert moment > 50
    # The same for a repair.
    damaged, moment = tmp_path / "whole", 1
    while True:
        left = 0
        flip_a_bit(sorted(damaged.glob("*train*.arrayrecord"))[1])
        if not encode_with_a_kill(damaged, moment):
            break
        moment += 1
    assert moment > 15 and content(damaged) == whole


def flip_a_bit(file):
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)


def test_processes_at_once_write_each_shard_once(tmp_path, no_fsync):
    plan = dataclasses.replace(PLAN, shard_size=1)
    encode(tmp_path / "one", plan)
    with concurrent.futures.ThreadPoolExecutor(
        4
    ) as threads:  # a lock is of an open file, so threads are like processes
        written = sum(threads.map(lambda _: encode(tmp_path / "four", plan), range(4)), [])
    assert sorted(written) == sorted(set(written)) and len(written) == sum(SIZES.values())
    assert content(tmp_path / "four") == content(tmp_path / "one")


def test_shard_of_a_process_that_died_is_waited_for_and_written(tmp_path):
    writer = latent_cache.LatentCacheWriter(tmp_path, PLAN)
    other = file_lock(tmp_path / latent_cache.LOCKS_DIR / writer.shards[0].name)
    other.__enter__()
    waited, written = [], []

    def on_wait(shard):
        waited.append(shard)
        other.__exit__(None, None, None)

    for shard in writer.missing_shards(on_wait):
        writer.write_shard(shard, batches(PLAN, shard))
        written.append(shard)
    assert waited == [writer.shards[0]]
    assert written == [*writer.shards[1:], writer.shards[0]]


def test_damaged_missing_and_halved_shards_are_written_again_and_nothing_else(cache):
    whole = content(cache)
    assert encode(cache) == []
    first, second, third = sorted(cache.glob("*train*.arrayrecord"))
    flip_a_bit(first)
    second.unlink()
    os.truncate(third, 1000)
    assert encode(cache) == [first.stem, second.stem, third.stem]
    assert content(cache) == whole
    (cache / "manifest.json").write_bytes(b"\xff{")
    next(cache.glob("*test*.json")).write_text("[]")
    assert encode(cache) == [next(cache.glob("*test*.arrayrecord")).stem]
    assert content(cache) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype='float16', but this command has 'bfloat16'"),
        ({"data": PLAN.data | {"image_size": 32}}, r"data.image_size=16, but .* 32;"),
        ({"shard_size": 4}, "shard_size=8, but"),
        ({"batch_size": 4, "jax": "1"}, r"batch_size=3, but .* 4 \(and 1 more\); give the same, or choose another"),
    ],
)
def test_another_plan_is_refused(tmp_path, change, message):
    latent_cache.LatentCacheWriter(tmp_path, PLAN)
    with pytest.raises(ValueError, match=message) as error:
        latent_cache.LatentCacheWriter(tmp_path, dataclasses.replace(PLAN, **change))
    assert "\n" not in str(error.value)


def test_a_whole_cache_is_checked_on_another_machine_but_not_mended_there(cache):
    elsewhere = dataclasses.replace(PLAN, device="gpu", num_devices=8, batch_size=256)
    assert encode(cache, elsewhere) == []
    whole = content(cache)
    flip_a_bit(next(cache.glob("*test*.arrayrecord")))
    changed = content(cache)
    with pytest.raises(ValueError, match="batch_size=3, but this command has 256"):
        encode(cache, elsewhere)
    assert content(cache) == changed != whole


def test_a_cache_of_an_older_format_is_left_alone(tmp_path):
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="older dit_jax wrote it; delete it or choose another --output"):
        latent_cache.LatentCacheWriter(tmp_path, PLAN)
    with pytest.raises(ValueError, match="has format 1, but this dit_jax reads 3; delete .* and run"):
        latent_cache.read_manifest(tmp_path)


def test_output_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder to write to"):
        latent_cache.LatentCacheWriter(tmp_path / "file", PLAN)


def test_full_disk_is_a_one_line_error(tmp_path):
    writer = latent_cache.LatentCacheWriter(tmp_path, PLAN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # an ArrayRecord file has 2^17 bytes at least
    try:
        with pytest.raises(ValueError, match="cannot be written .*File too large.*; make room") as error:
            writer.write_shard(writer.shards[0], batches(PLAN, writer.shards[0]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and not writer.is_written(writer.shards[0])


# Reading what is not whole


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def replace_content(file):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is truncated or damaged .65536 bytes instead of 131072."),
        (os.remove, "is missing"),
        (replace_content, "is damaged"),
    ],
)
def test_shard_that_is_not_whole_is_a_one_line_error(cache, damage, message):
    file = sorted(cache.glob("*train*.arrayrecord"))[1]
    damage(file)
    with pytest.raises(ValueError, match=f"{file.name} .*{message}.*; run `dit-jax encode --output=.*` again") as error:
        latent_cache.open_latents(cache, TRAIN)
    assert "\n" not in str(error.value)
    assert len(latent_cache.open_latents(cache, EVAL)) == SIZES[EVAL]


def test_shard_with_fewer_records_than_the_manifest_is_an_error(cache):
    shards = sorted(cache.glob("*train*.arrayrecord"))
    os.replace(shards[2], shards[1])  # 7 records for 8, in as many bytes
    shards[2].write_bytes(shards[1].read_bytes())
    with pytest.raises(ValueError, match="7 records instead of 8"):
        latent_cache.open_latents(cache, TRAIN)


def test_damaged_record_is_an_error_when_it_is_read(cache):
    file = sorted(cache.glob("*train*.arrayrecord"))[1]
    changed = bytearray(file.read_bytes())
    position = changed.index(b"ein Schuh")
    changed[position] ^= 255
    file.write_bytes(changed)
    source = latent_cache.open_latents(cache, TRAIN)
    with pytest.raises(ValueError, match="is damaged.*run `dit-jax encode") as error:
        source.__getitems__(list(range(len(source))))
    assert "\n" not in str(error.value)


def test_unknown_split_names_the_known_ones(cache):
    with pytest.raises(ValueError, match="has no split 'train', only .*train"):
        latent_cache.open_latents(cache, "train")


def test_missing_and_unfinished_caches_say_how_to_write_one(tmp_path):
    with pytest.raises(ValueError, match="no latent cache at .*dit-jax encode --output="):
        latent_cache.read_manifest(tmp_path / "none")
    writer = latent_cache.LatentCacheWriter(tmp_path / "cache", PLAN)
    shard = next(iter(writer.missing_shards()))
    writer.write_shard(shard, batches(PLAN, shard))
    with pytest.raises(ValueError, match="unfinished.*dit-jax encode --output="):
        latent_cache.open_latents(tmp_path / "cache", TRAIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 4}, "format 4, but this dit_jax reads 3; upgrade"),
        ({"scale": None}, "manifest.scale is missing"),
        ({"extra": 1}, "manifest.extra is not a config key"),
    ],
)
def test_manifest_is_read_strictly(cache, change, message):
    values = json.loads((cache / "manifest.json").read_text()) | change
    write_sealed(cache / "manifest.json", {k: v for k, v in values.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        latent_cache.read_manifest(cache)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": "x"}', '{"version": null}'])
def test_manifest_that_is_damaged_is_an_error(cache, text):
    (cache / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        latent_cache.read_manifest(cache)


@pytest.mark.parametrize(("dtype", "value"), [("float16", np.nan), ("float16", 1e6), ("bfloat16", np.inf)])
def test_moments_that_the_dtype_cannot_hold_are_an_error_that_names_the_image(tmp_path, dtype, value):
    plan = dataclasses.replace(PLAN, dtype=dtype)
    writer = latent_cache.LatentCacheWriter(tmp_path, plan)
    shard = writer.shards[1]
    spoilt = list(batches(plan, shard))
    spoilt[1][0][1, 0, 0, 0, 0] = value
    message = f"must be finite in {dtype}, but are not for image {shard.start + BATCH_SIZE + 1} of split"
    with pytest.raises(ValueError, match=message):
        writer.write_shard(shard, spoilt)


def test_latents_that_are_all_alike_have_no_scale(tmp_path):
    writer = latent_cache.LatentCacheWriter(tmp_path, DETERMINISTIC)
    for shard in writer.missing_shards():
        zeros = [(np.zeros_like(moments), *rest) for moments, *rest in batches(DETERMINISTIC, shard)]
        writer.write_shard(shard, zeros)
    with pytest.raises(ValueError, match="must differ, but all are 0; train the autoencoder further"):
        writer.finish()


def test_a_flipped_bit_is_never_read_as_other_latents(cache):
    """Wherever it is: what is read is what was written, or an error; most flips are of bytes that nothing reads."""
    file = sorted(cache.glob("*train*.arrayrecord"))[1]
    whole = file.read_bytes()
    written = latent_cache.open_latents(cache, TRAIN).__getitems__(list(range(SIZES[TRAIN])))
    rng, num_errors = np.random.default_rng(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.integers(70_000 if rng.random() < 0.7 else len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            read = latent_cache.open_latents(cache, TRAIN).__getitems__(list(range(SIZES[TRAIN])))
        except ValueError:
            num_errors += 1
            continue
        for one, other in zip(read, written, strict=True):
            np.testing.assert_array_equal(one.pop("moments"), other["moments"])
            assert one == {name: value for name, value in other.items() if name != "moments"}
    assert num_errors > 0


# Sums of the records


def flips(text, number, seed=0):
    """Returns texts with one bit flipped: in bytes all over it, and in those of the version and of the sum's key."""
    rng = np.random.default_rng(seed)
    places = set(rng.choice(len(text), min(number, len(text)), replace=False).tolist())
    for part in (b'"version": 3', SUM_KEY.encode()):
        places |= set(range(text.index(part), text.index(part) + len(part))) if part in text else set()
    for place in sorted(places):
        for bit in range(8):
            changed = bytearray(text)
            changed[place] ^= 1 << bit
            yield bytes(changed)


def test_a_flipped_bit_in_a_manifest_is_never_read_as_another_manifest(cache):
    file = cache / "manifest.json"
    whole, found, refused = file.read_bytes(), latent_cache.read_manifest(cache), 0
    for changed in flips(whole, 150):
        file.write_bytes(changed)
        try:
            assert latent_cache.read_manifest(cache) == found
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 1000
    file.write_bytes(whole.replace(b'"version": 3', b'"version": 2'))
    with pytest.raises(ValueError, match="manifest.json is damaged .*run `dit-jax encode"):
        latent_cache.read_manifest(cache)
    assert encode(cache) == [] and file.read_bytes() == whole


def test_a_damaged_sidecar_has_its_shard_written_again_and_leaves_the_manifest_as_it_was(cache):
    whole, sidecar = content(cache), sorted(cache.glob("latents-train*.json"))[0]
    for changed in list(flips(sidecar.read_bytes(), 6))[::7]:
        sidecar.write_bytes(changed)
        if encode(cache) == [sidecar.stem]:  # and not a bit that changes no value, such as of 1e5 to 1E5
            assert content(cache) == whole
        sidecar.write_bytes(whole[sidecar.relative_to(cache)])
        assert content(cache) == whole


def test_a_damaged_plan_is_written_again_by_the_command_that_it_is_of_and_refused_to_others(cache):
    whole, file = content(cache), cache / "encoding.json"
    damaged = file.read_bytes().replace(b'"dtype": "float16"', b'"dtype": "float17"')
    file.write_bytes(damaged)
    for other in (dataclasses.replace(PLAN, batch_size=5), dataclasses.replace(PLAN, dtype="bfloat16")):
        with pytest.raises(ValueError, match="encoding.json is damaged"):
            latent_cache.LatentCacheWriter(cache, other)
    assert file.read_bytes() == damaged
    for _ in range(2):
        writer = latent_cache.LatentCacheWriter(cache, PLAN)
        assert writer.mended == ["encoding.json"] and content(cache) == whole
        file.unlink()  # and where it is missing


def test_a_cache_of_a_format_without_sums_is_read_and_gets_them(cache, no_fsync):
    whole = content(cache)
    without_sums(cache)
    assert latent_cache.read_manifest(cache).version == 2
    assert len(latent_cache.open_latents(cache, TRAIN)) == SIZES[TRAIN]
    assert encode(cache) == [] and content(cache) == whole
    without_sums(cache)
    (shard,) = cache.glob("*test*.arrayrecord")
    flip_a_bit(shard)
    assert encode(cache) == [shard.stem] and content(cache) == whole


def test_records_without_sums_that_contradict_one_another_are_refused(cache):
    without_sums(cache)
    file = cache / "manifest.json"
    changed = file.read_text().replace('"scale": 0.', '"scale": 1.')
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(ValueError, match="manifest.json contradicts the files of its shards.*delete .* again"):
        encode(cache)
    assert file.read_text() == changed


def test_a_folder_of_a_cache_that_is_not_intact_is_written_again(cache):
    writer, folder = latent_cache.LatentCacheWriter(cache, PLAN), cache / "autoencoder"
    whole = content(cache)
    (folder / "weights").write_text("1, 2, 4")
    good = [lambda folder: (folder / "weights").write_text("1, 2, 3"), lambda f: "3" in (f / "weights").read_text()]
    for _ in range(2):
        writer.write_folder("autoencoder", *good)
    assert content(cache) == whole and writer.mended == ["autoencoder/"]


def test_the_place_of_the_data_is_no_part_of_a_plan_with_its_content(tmp_path):
    known = {"version": "content-1", "names": "names-1"}
    here, there = (dataclasses.replace(PLAN, data=PLAN.data | known | {"name": name}) for name in ("here", "there"))
    encode(tmp_path, here)
    whole = content(tmp_path)
    assert encode(tmp_path, there) == [] and content(tmp_path) == whole
    flip_a_bit(next(tmp_path.glob("*test*.arrayrecord")))
    assert len(encode(tmp_path, there)) == 1 and content(tmp_path) == whole
    other = dataclasses.replace(there, data=there.data | {"version": "content-2"})
    with pytest.raises(ValueError, match="data.version='content-1', but this command has 'content-2'"):
        latent_cache.LatentCacheWriter(tmp_path, other)
