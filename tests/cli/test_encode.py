"""`dit-jax encode`, through a small untrained autoencoder: the same cache however many processes, kills and repairs."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax.checkpoint import Checkpoints, params_digest
from dit_jax.cli.encode import DTYPES
from dit_jax.cli.main import main
from dit_jax.cli.train import resolve_latents
from dit_jax.config import LatentsConfig, config_to_dict
from dit_jax.data import latent_cache
from dit_jax.data.latent_cache import LOCKS_DIR, open_latents, read_manifest
from dit_jax.data.pipeline import image_transform
from dit_jax.data.sources import open_source
from dit_jax.evaluation.loaded import AUTOENCODER_DIR, load, stored_digest
from dit_jax.files import SUM_KEY, sealed
from dit_jax.models.autoencoder import Codec
from dit_jax.models.build import init_params
from tests.tiny import NUM_CLASSES, autoencoder_config, dit_config, make_image_folder

ROOT = pathlib.Path(__file__).parents[2]
NUM_ROUNDS = int(os.environ.get("DIT_JAX_TEST_KILL_ROUNDS", "2"))  # of two processes that are killed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A config of captioned images and an autoencoder for them."""
    root = tmp_path_factory.mktemp("encode")
    folder = make_image_folder(root / "images")
    rows = [{"file_name": str(p.relative_to(folder)), "caption": f"bar {p.stem}"} for p in sorted(folder.glob("*/*"))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = autoencoder_config(folder)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, extra_fields=("caption",)))
    values = f"ConfigDict({config_to_dict(config)!r})"
    (root / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return {values}\n"
    )
    with Checkpoints(root / "autoencoder", max_to_keep=1) as checkpoints:
        checkpoints.save(0, {"params": jax.jit(lambda: init_params(config, jax.random.key(0)))()}, config)
    return root, config


def arguments(root, output, *more):
    config, autoencoder = f"--config={root / 'config.py'}", f"--autoencoder={root / 'autoencoder'}"
    return ["encode", config, autoencoder, f"--output={output}", "--batch_size=8", *more]


def encode(root, capsys, output, *more):
    """Encodes in this process; returns the figures."""
    capsys.readouterr()
    main(arguments(root, output, "--json", *more))
    return json.loads(capsys.readouterr().out)


def content(path):
    """The files of a cache but for the autoencoder, whose checkpoint has the time of its writing."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    named = {file.relative_to(path): file.read_bytes() for file in files}
    return {name: value for name, value in named.items() if name.parts[0] not in (AUTOENCODER_DIR, LOCKS_DIR)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cache_holds_what_the_autoencoder_makes_of_each_image_and_its_mirror_image(root, tmp_path, capsys, dtype):
    root, config = root
    figures = encode(root, capsys, tmp_path, f"--dtype={dtype}", "--shard_size=12")
    assert (figures["images"], figures["encoded"], figures["damaged"]) == (60, 60, [])
    assert figures["images_per_second"] == pytest.approx(60 / figures["seconds"])
    manifest = read_manifest(tmp_path)
    assert (manifest.stochastic, manifest.latent_shape, manifest.dtype) == (True, (4, 4, 2), dtype)
    assert manifest.data["crop"] == "adm_center"
    codec = load(tmp_path / AUTOENCODER_DIR).codec
    for split in ("train", "test"):
        images, latents = open_source(config.data, split), open_latents(tmp_path, split)
        assert len(images) == len(latents)
        to_image = image_transform(config.data, train=False)
        pixels = np.stack([to_image(image, None)["image"] for image in images])
        for flip, flipped in enumerate((pixels, pixels[:, :, ::-1])):
            expected, stored = jax.jit(Codec.moments)(codec, flipped), np.stack([e["moments"][flip] for e in latents])
            tolerance = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
            np.testing.assert_allclose(stored, expected, rtol=tolerance, atol=1e-4)  # another batch size, and flips
        assert [e["label"] for e in latents] == [e["label"] for e in images]
        assert [e["caption"] for e in latents] == [e["caption"] for e in images]
        assert set(latents[0]) == {"label", "caption", "moments"}


def test_the_flag_names_the_dtypes_of_the_cache():
    assert tuple(latent_cache.DTYPES) == DTYPES


def test_shard_size_does_not_change_the_records(root, tmp_path, capsys):
    root, _ = root
    for size in (5, 100):
        encode(root, capsys, tmp_path / str(size), f"--shard_size={size}")
    for one, other in zip(open_latents(tmp_path / "5", "train"), open_latents(tmp_path / "100", "train"), strict=True):
        np.testing.assert_array_equal(one["moments"], other["moments"])
        assert one["caption"] == other["caption"]
    # The sums are added up in another order.
    np.testing.assert_allclose(read_manifest(tmp_path / "5").std, read_manifest(tmp_path / "100").std, rtol=1e-12)


def test_a_second_run_checks_and_mends_and_says_so(root, tmp_path, capsys):
    root, _ = root
    encode(root, capsys, tmp_path, "--shard_size=16")
    whole = content(tmp_path)
    assert encode(root, capsys, tmp_path, "--shard_size=16")["encoded"] == 0
    damaged = sorted(tmp_path.glob("*train*.arrayrecord"))[1]
    changed = bytearray(damaged.read_bytes())
    changed[1000] ^= 1
    damaged.write_bytes(changed)
    main(arguments(root, tmp_path, "--shard_size=16"))
    said = capsys.readouterr().out
    assert f"damaged or missing, and encoded again: {damaged.name}\n" in said and "encoded 16 images in" in said
    main(arguments(root, tmp_path, "--shard_size=16"))
    assert "already holds these latents, checked: 60 images" in capsys.readouterr().out
    assert content(tmp_path) == whole
    digest = stored_digest(tmp_path / AUTOENCODER_DIR)
    files = (tmp_path / AUTOENCODER_DIR / "checkpoints").rglob("*")
    largest = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
    changed = bytearray(largest.read_bytes())
    changed[len(changed) // 2] ^= 4
    largest.write_bytes(changed)
    figures = encode(root, capsys, tmp_path, "--shard_size=16")
    assert (figures["encoded"], figures["damaged"]) == (0, [f"{AUTOENCODER_DIR}/"])
    assert stored_digest(tmp_path / AUTOENCODER_DIR) == digest and content(tmp_path) == whole


def test_images_edited_under_their_names_are_neither_checked_nor_trained_on(root, tmp_path, capsys):
    root, config = root
    folder, cache = shutil.copytree(config.data.name, tmp_path / "images"), tmp_path / "cache"
    encode(root, capsys, cache, f"--config.data.name={folder}")
    whole = content(cache)

    def resolved(name):
        dit = dit_config(pathlib.Path(name))
        return resolve_latents(dataclasses.replace(dit, latents=LatentsConfig(shape=(4, 4, 2), path=str(cache))))

    moved = shutil.move(folder, tmp_path / "moved")
    assert resolved(moved).data.version == resolved(config.data.name).data.version  # where they were copied from
    assert encode(root, capsys, cache, f"--config.data.name={moved}")["encoded"] == 0
    path = moved / "class_0" / "000.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    with pytest.raises(ValueError, match="it is of other images; give these, or encode again to another folder"):
        resolved(moved)
    with pytest.raises(SystemExit):
        main(arguments(root, cache, f"--config.data.name={moved}"))
    assert "data.version='content-" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ValueError, match="config.data.name is '.*gone', but the latent cache"):
        resolved(tmp_path / "gone")  # no images to compare: the names must be the same
    assert content(cache) == whole


def test_a_cache_of_an_older_version_is_read_checked_and_given_sums_and_never_called_compared(root, tmp_path, capsys):
    """Its format had no sums, and of its images it has the names."""
    root, config = root
    encode(root, capsys, tmp_path)
    names = read_manifest(tmp_path).data["names"]
    for file in tmp_path.glob("*.json"):
        values = {key: value for key, value in json.loads(file.read_text()).items() if key not in (SUM_KEY, "plan")}
        if "data" in values:
            newer = ("names", "fields", "class_names", "background")
            data = {key: value for key, value in values["data"].items() if key not in newer}
            values |= {"version": 2, "data": data | {"version": names}}
        file.write_text(json.dumps(values, indent=2) + "\n")
    dit = dit_config(pathlib.Path(config.data.name))
    dit = dataclasses.replace(dit, latents=LatentsConfig(shape=(4, 4, 2), path=str(tmp_path)))
    before = resolve_latents(dit)
    assert before.data.version == f"{names} (train 54, test 6)"  # what a run of that version has recorded
    said = capsys.readouterr().out
    assert "lacks the content of its images, whose names it has, and sums of its records, which `dit-jax enc" in said
    main(arguments(root, tmp_path))
    said = capsys.readouterr().out
    assert "already holds these latents" in said and "their content is unknown" in said
    assert (read_manifest(tmp_path).version, read_manifest(tmp_path).data["version"]) == (3, names)
    after = resolve_latents(before)
    assert before.data.class_names is None and after.data.class_names == ("class_0", "class_1", "class_2")
    assert after == dataclasses.replace(before, data=after.data)
    assert after.data == dataclasses.replace(before.data, class_names=after.data.class_names)
    main(arguments(root, tmp_path))
    assert "their content is unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype=bfloat16"], "dtype='float16', but this command has 'bfloat16'; give the same, or choose another"),
        (["--shard_size=0"], "--shard_size=0 must be positive"),
        (["--config.data.extra_fields=('title',)"], "has no field 'title'"),
        (["--config.data.extra_fields=()"], "extra_fields=['caption'], but this command has []"),
        (["--config.data.horizontal_flip=False"], "data.horizontal_flip=True, but this command has False (and 1 more)"),
    ],
)
def test_another_command_for_the_same_output_is_one_line(root, capsys, more, message):
    root, _ = root
    output = root / "refused"
    if not output.exists():
        encode(root, capsys, output)
    with pytest.raises(SystemExit):
        main(arguments(root, output, *more))
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error and error.startswith("dit-jax encode: error:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"data": {"name": "elsewhere"}}, None),  # the images are compared, wherever they were
        (
            {"data": {"version": "content-0"}},
            "the version of .*images is 'content-[0-9a-f]*', but the latent cache .* of",
        ),
        (
            {"data": {"version": "names-0"}},
            "the version of .*images is 'names-[0-9a-f]*', but the latent cache .* of oth",
        ),
        ({"data": {"splits": {"train": 54, "test": 5}}, "splits": {"train": 54, "test": 5}}, "is damaged"),
        ({"data": {"image_size": 16}}, "config.data.image_size=8 but the latent cache .* has 16; change the config or"),
        ({"data": {"channels": 3}}, "config.data.channels=1 but"),
        ({"data": {"horizontal_flip": False}}, "config.data.horizontal_flip=True but"),
        ({"data": {"crop": "random"}}, "^crop='adm_center' but the latent cache .* has 'random'"),
        ({"latent_shape": [8, 8, 2]}, r"config.latents.shape=.4, 4, 2. but"),
        ({"autoencoder": "0"}, "config.latents.autoencoder='[0-9a-f]*' but the latent cache .* has '0'"),
    ],
)
def test_a_cache_of_something_else_is_not_trained_on(root, tmp_path, capsys, change, message):
    root, config = root
    cache = root / "resolved"
    if not cache.exists():
        encode(root, capsys, cache)
    resolved = dit_config(pathlib.Path(config.data.name))
    resolved = dataclasses.replace(resolved, latents=LatentsConfig(shape=(4, 4, 2), path=str(cache)))
    resolved = resolve_latents(resolved)  # now it knows the version, the autoencoder and the scale
    values = json.loads((cache / "manifest.json").read_text())
    values |= change | {"data": values["data"] | change.get("data", {})}
    del values[SUM_KEY]
    (tmp_path / "manifest.json").write_text(json.dumps(sealed(values)))
    other = dataclasses.replace(resolved, latents=dataclasses.replace(resolved.latents, path=str(tmp_path)))
    if message is None:
        assert resolve_latents(other) == other
        return
    with pytest.raises(ValueError, match=message) as error:
        resolve_latents(other)
    assert "\n" not in str(error.value)


def test_processes_that_are_killed_at_random_moments_make_the_cache_that_one_makes(root, tmp_path, capsys):
    root, _ = root
    options = ("--shard_size=1", "--config.data.horizontal_flip=False")
    encode(root, capsys, tmp_path / "one", *options)
    output, rng, num_shards = tmp_path / "many", random.Random(0), 20 * NUM_CLASSES

    def start():
        command = [sys.executable, "-m", "dit_jax", *arguments(root, output, *options)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def num_written():
        return len(list(output.glob("latents-*.json")))

    left = []
    for number in range(NUM_ROUNDS):
        processes = [start() for _ in range(2)]
        # Each round kills after some more shards; the first, perhaps, before there is one.
        most = (num_shards - num_written()) // (NUM_ROUNDS - number)
        enough = num_written() + rng.randint(min(number, 1), max(1, most))
        while not output.exists() or num_written() < enough:
            failed = [process for process in processes if process.poll()]
            assert not failed, failed[0].communicate()
            time.sleep(0.001)
        for process in processes:
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.communicate()
        left.append(num_shards - num_written())
    print("shards left after each round", left)
    assert left[0] > 0, "no kill was in time; give the test more images"
    processes = [start() for _ in range(2)]
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 0, said
    assert content(output) == content(tmp_path / "one")
    weights, others = (load(path / AUTOENCODER_DIR).params for path in (output, tmp_path / "one"))
    assert params_digest(weights) == params_digest(others)
