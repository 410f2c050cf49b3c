"""Captions in training: from the data set's fields, by a frozen encoder in each step or before, or by a trained one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from dit_jax.cli.main import main
from dit_jax.cli.train import diffusion_task, resolve_images, resolve_latents, with_text_encoder
from dit_jax.config import ConditionsConfig, LatentsConfig, TextConfig, TokenTransformerConfig
from dit_jax.data.latent_cache import open_latents, read_manifest
from dit_jax.evaluation.loaded import load
from dit_jax.files import SUM_KEY, sealed
from dit_jax.metrics.history import read_metrics
from dit_jax.models.build import abstract_params
from dit_jax.models.conditioners import batch_conditions
from dit_jax.parallel.mesh import make_mesh, put_batch
from dit_jax.training.diffusion_step import make_diffusion_loss
from tests.cli.test_main import fail, write_config
from tests.tiny import autoencoder_config, dit_config, make_image_folder, write_captions, write_text_encoder

LENGTH = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images with captions, a frozen encoder, and a DiT's config that reads them."""
    root = tmp_path_factory.mktemp("captions")
    folder = write_captions(make_image_folder(root / "images"))
    return root, with_text(dit_config(folder, num_train_steps=2), path=str(write_text_encoder(root / "encoder")))


@pytest.fixture(scope="module")
def cache(made):
    """The cache of an autoencoder's latents and of the states of captions."""
    root, config = made
    path = write_config(root / "autoencoder.py", autoencoder_config(root / "images", num_train_steps=1))
    main(["train", f"--config={path}", f"--workdir={root / 'autoencoder'}"])
    path, where = write_config(root / "dit.py", config), [f"--autoencoder={root / 'autoencoder'}"]
    main(["encode", f"--config={path}", *where, f"--output={root / 'cache'}"])
    return root / "cache"


def with_text(config, **text):
    text = TextConfig(max_length=LENGTH, vocab_size=9, frozen_width=12, **text)
    dit = dataclasses.replace(config.dit, depth=1, conditioning=("adaln_zero", "cross_attention"))
    return dataclasses.replace(config, dit=dit, conditions=ConditionsConfig(text))


def with_latents(config, cache):
    return dataclasses.replace(config, latents=LatentsConfig(shape=(4, 4, 2), path=str(cache)))


def test_states_of_the_cache_are_those_of_encoding_in_each_step(made, cache, tmp_path):
    _, config = made
    manifest = read_manifest(cache)
    assert manifest.extra_fields == ("caption",) and manifest.text.max_length == LENGTH
    assert {len(example["text"]["states"]) for example in open_latents(cache, "train")} == {3, 4, 5}  # without padding
    mesh, found = make_mesh(config.mesh), []
    shutil.copytree(cache / "autoencoder", tmp_path / "autoencoder")
    for run in (
        resolve_images(with_text_encoder(config)),
        resolve_latents(with_text_encoder(with_latents(config, cache))),
    ):
        task = diffusion_task(run, mesh, tmp_path)
        encode = jax.jit(lambda batch, frozen, run=run: batch_conditions(run, batch, frozen))
        found.append(encode(put_batch(next(iter(task.train_batches(1))), mesh, 8), task.constants))
    online, cached = found
    assert online.keys() == cached.keys() == {"label", "text"} and task.constants is None
    np.testing.assert_array_equal(online["text"]["mask"], cached["text"]["mask"])
    for name in ("states", "pooled"):
        np.testing.assert_allclose(online["text"][name], cached["text"][name], atol=4e-3)  # float16, of up to 4
        assert np.asarray(online["text"][name]).std() > 0.3
    assert not np.asarray(cached["text"]["states"])[~np.asarray(cached["text"]["mask"])].any()


def test_a_run_on_the_cache_needs_neither_cache_nor_encoder_afterwards(made, cache, tmp_path):
    root, config = made
    shutil.copytree(cache, tmp_path / "cache")
    path = write_config(tmp_path / "dit.py", with_latents(with_text(config, path="nowhere"), tmp_path / "cache"))
    main(["train", f"--config={path}", f"--workdir={tmp_path / 'dit'}"])
    assert np.isfinite(read_metrics(tmp_path / "dit")[-1]["loss"])
    shutil.rmtree(tmp_path / "cache")
    model = load(tmp_path / "dit")
    assert model.config.conditions.text.encoder is not None
    text = model.captions.condition(["a red flag", "", "star"])
    assert text["mask"].sum(axis=1).tolist() == [5, 0, 3]
    output = model.denoise(np.zeros((3, 4, 4, 2)), [9, 9, 9], {"label": np.zeros(3, np.int32), "text": text})
    assert output.shape == (3, 4, 4, 4) and np.isfinite(output).all()
    flags = [f"--text_encoder={root / 'encoder'}", f"--cache={tmp_path / 'cache'}", "--metrics=retrieval", "--steps=1"]
    main(["evaluate", f"--workdir={tmp_path / 'dit'}", *flags])
    result = json.loads((tmp_path / "dit" / "evaluation" / "retrieval.json").read_text())
    assert result["captions"] == 3 and result["chance"] == {"median_rank": 0.5, "top_tenth": 1 / 3}
    assert all(0 <= result[of][name] <= 1 for of in ("drawn", "real") for name in ("median_rank", "top_tenth"))
    assert (tmp_path / "dit" / "evaluation" / "retrieval.png").is_file()


def test_an_encoder_trained_with_the_denoiser_reads_captions_of_images(made, tmp_path):
    root, config = made
    text = dataclasses.replace(config.conditions.text, transformer=TokenTransformerConfig(16, 1, 2, head_dim=8))
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(root / "encoder" / "tokenizer.json", tmp_path / "tokenizer")
    text = dataclasses.replace(text, path=str(tmp_path / "tokenizer"))
    config = resolve_images(with_text_encoder(dataclasses.replace(config, conditions=ConditionsConfig(text))))
    mesh = make_mesh(config.mesh)
    task = diffusion_task(config, mesh, tmp_path)
    assert task.constants is None
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), abstract_params(config))
    loss_fn, batch = make_diffusion_loss(config), put_batch(next(iter(task.train_batches(0))), mesh, 8)
    gradients = jax.jit(jax.grad(lambda params: loss_fn(params, batch, jax.random.key(0), None)["loss"].mean()))(params)
    moved = np.abs(gradients["text"]["encoder"]["token_table"]).sum(axis=1) > 0
    assert moved.tolist() == [False, False, *[True] * 7]  # all but padding and unknown words: the captions' own


def test_what_does_not_fit_is_one_line(made, cache, tmp_path, capsys):
    root, config = made
    path = write_config(tmp_path / "dit.py", config)
    command = ["train", f"--config={path}", f"--workdir={tmp_path / 'dit'}"]
    key = "--config.conditions.text"
    assert "holds no text encoder" in fail(capsys, *command, f"{key}.path={root}")
    assert "frozen_width=13 must be 12, the width of its states" in fail(capsys, *command, f"{key}.frozen_width=13")
    assert "max_length=9 must be at most 8, the positions of" in fail(capsys, *command, f"{key}.max_length=9")
    assert "set its path" in fail(capsys, *command, f"{key}.encoder='abc'")
    assert "has no field 'title'" in fail(capsys, *command, f"{key}.caption_field=title")
    path = write_config(tmp_path / "cached.py", with_latents(config, cache))
    command = ["train", f"--config={path}", f"--workdir={tmp_path / 'dit'}"]
    assert "max_length=5 but the latent cache" in fail(capsys, *command, f"{key}.max_length=5")
    shutil.copytree(cache, tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    manifest = sealed({key: value for key, value in manifest.items() if key not in ("text", SUM_KEY)})
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    said = fail(capsys, *command, f"--config.latents.path={tmp_path / 'cache'}")
    assert "must hold the captions 'caption', as `dit-jax encode` writes them" in said
