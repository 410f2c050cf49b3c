"""Latents encoded in each step are those that a cache holds: the same images, flips and noise for a seed and a step."""

import dataclasses

import jax
import numpy as np
import pytest

from dit_jax.cli.main import main
from dit_jax.cli.train import diffusion_task, resolve_images, resolve_latents
from dit_jax.config import LatentsConfig, config_from_dict, config_to_dict
from dit_jax.evaluation.loaded import load
from dit_jax.metrics.history import read_metrics
from dit_jax.parallel.mesh import make_mesh, put_batch
from dit_jax.training.diffusion_step import diffusion_input, encoded
from tests.cli.test_main import fail, write_config
from tests.tiny import adversarial_config, autoencoder_config, dit_config, make_image_folder


@pytest.fixture(scope="module", params=["kl", "vq"])
def runs(request, tmp_path_factory):
    """An autoencoder of flipped images, a cache in each dtype, and what a DiT's config says of its latents."""
    root = tmp_path_factory.mktemp("online")
    folder = make_image_folder(root / "images")
    config = adversarial_config(folder, {"num_codes": 16}) if request.param == "vq" else autoencoder_config(folder)
    path = write_config(root / "autoencoder.py", config)
    main(["train", f"--config={path}", f"--workdir={root / 'autoencoder'}"])
    for dtype in ("float16", "bfloat16"):
        where = [f"--autoencoder={root / 'autoencoder'}", f"--output={root / dtype}"]
        main(["encode", f"--config={path}", *where, f"--dtype={dtype}"])
    return root, dit_config(folder)


def with_latents(config, **latents):
    return dataclasses.replace(config, latents=LatentsConfig(shape=(4, 4, 2), scale=2.0, **latents))


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_batches_equal_those_of_the_cache_within_its_rounding(runs, dtype, bits, tmp_path):
    root, config = runs
    mesh, noise = make_mesh(config.mesh), jax.random.normal(jax.random.key(1), (8, 4, 4, 2))
    online = resolve_images(with_latents(config, encode_with=str(root / "autoencoder")))
    cached = resolve_latents(with_latents(config, path=str(root / dtype)))
    assert online.latents.autoencoder == cached.latents.autoencoder and online.data.version == cached.data.version
    inputs = []
    for run in (online, cached):
        (tmp_path / "autoencoder").unlink(missing_ok=True)
        (tmp_path / "autoencoder").symlink_to(root / "autoencoder")
        task = diffusion_task(run, mesh, tmp_path)
        batches = task.train_batches(2)  # a resumed run's
        draw = jax.jit(lambda batch, codec, run=run: diffusion_input(run, encoded(batch, codec), noise))
        inputs.append(
            [(draw(put_batch(b, mesh, 8), task.constants), b["label"]) for b, _ in zip(batches, "xx", strict=False)]
        )
    largest = max(float(np.abs(x).max()) for x, _ in inputs[0])
    for (x, labels), (y, cached_labels) in zip(*inputs, strict=True):
        np.testing.assert_array_equal(labels, cached_labels)
        np.testing.assert_allclose(x, y, atol=4 * largest * 2.0**-bits)  # mean, and noise times a rounded deviation
    assert np.abs(inputs[0][0][0] - inputs[0][1][0]).max() > 0.01 * largest  # other images in another step


def test_training_on_images_encoded_in_each_step_makes_a_workdir_that_draws(runs, tmp_path, capsys):
    root, config = runs
    values = config_to_dict(with_latents(config, encode_with=str(root / "autoencoder")))
    path = write_config(tmp_path / "dit.py", config_from_dict(values))
    main(["train", f"--config={path}", f"--workdir={tmp_path / 'dit'}"])
    assert np.isfinite(read_metrics(tmp_path / "dit")[-1]["loss"])
    model = load(tmp_path / "dit")
    assert model.config.latents.autoencoder and model.sample([0, 1], num_steps=2).shape == (2, 8, 8, 3)
    command = ["train", f"--config={path}", f"--workdir={tmp_path / 'other'}"]
    assert "needs config.latents.scale" in fail(capsys, *command, "--config.latents.scale=None")
    assert "config.latents.shape=(4, 4, 3) but" in fail(capsys, *command, "--config.latents.shape=(4, 4, 3)")
    dit = f"--config.latents.encode_with={tmp_path / 'dit'}"
    assert "is a run of stage 'diffusion'; give an autoencoder's workdir" in fail(capsys, *command, dit)
