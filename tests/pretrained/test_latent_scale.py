"""The scale and shift of latents go with the weights: to diffusers' folders and back, and with a run's autoencoder."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.checkpoint import Checkpoints, params_digest, read_config, write_config
from dit_jax.cli.main import main
from dit_jax.config import LatentsConfig, config_from_dict, config_to_dict
from dit_jax.evaluation.latent_scale import LatentScale, read_scale, resolve_scale, scale_of_workdir
from dit_jax.models.autoencoder import scaled
from dit_jax.models.build import abstract_params
from dit_jax.training.diffusion_step import diffusion_input
from tests.tiny import autoencoder_config, dit_config

SCALE, SHIFT = 0.4158882, -0.25


def write_run(path, config):
    """Writes a workdir of random weights."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), abstract_params(config))
    path.mkdir(parents=True)
    write_config(path, config)
    with Checkpoints(path) as checkpoints:
        checkpoints.save(0, {"params": params}, config)
    return path


def convert(kind, source, output, *flags):
    main(["convert", f"--kind={kind}", f"--input={source}", f"--output={output}", *flags])
    return output


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_dit_config(folder, **latents):
    """Returns the tiny DiT as a released one, of the tiny autoencoder's latents."""
    values = config_to_dict(dit_config(folder)) | {"latents": {"shape": (4, 4, 2), **latents}}
    return config_from_dict(values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A workdir of an autoencoder, and one of a DiT of its latents."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "ae", autoencoder_config(root / "images"))
    write_run(root / "dit", make_dit_config(root / "images", scale=SCALE, shift=SHIFT))
    shutil.copytree(root / "ae", root / "dit" / "autoencoder")
    return root


@pytest.fixture(scope="module")
def pipeline(runs, tmp_path_factory):
    """Both exported to diffusers."""
    folder = tmp_path_factory.mktemp("pipeline")
    convert("autoencoder", runs / "dit" / "autoencoder", folder / "vae")
    convert("dit", runs / "dit", folder / "transformer")
    return folder


def test_a_runs_autoencoder_is_exported_with_the_scale_of_its_latents(pipeline):
    theirs = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae").config
    assert (theirs.scaling_factor, theirs.shift_factor) == (SCALE, SHIFT)
    _, info = diffusers.DiTTransformer2DModel.from_pretrained(pipeline / "transformer", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("source", ["plain", "run's", "converted", "pipeline's"])
def test_a_dit_there_and_back_is_of_the_same_latents(runs, pipeline, source, tmp_path):
    """With the run's autoencoder, a plain one's, one converted from the pipeline, or what the pipeline says."""
    transformer = shutil.copytree(pipeline / "transformer", tmp_path / "weights")
    autoencoder = {"plain": runs / "ae", "run's": runs / "dit" / "autoencoder"}.get(source)
    if source == "converted":
        autoencoder = convert("autoencoder", pipeline / "vae", tmp_path / "converted")
    if source != "plain":  # a plain one knows no scale: the folder of the DiT tells it
        edit(transformer / "config.json", _latents=None)
    if source == "pipeline's":
        shutil.copytree(pipeline, tmp_path / "pipeline")
        edit(tmp_path / "pipeline" / "transformer" / "config.json", _latents=None)
        transformer, autoencoder = tmp_path / "pipeline", runs / "ae"
    back = convert("dit", transformer, tmp_path / "back", f"--autoencoder={autoencoder}")
    before, after = dit_jax.load(runs / "dit"), dit_jax.load(back)
    assert (after.config.latents.scale, after.config.latents.shift) == (SCALE, SHIFT)
    assert (after.config.data.image_size, after.config.data.channels) == (8, 1)
    assert (after.codec.scale, after.codec.shift) == (SCALE, SHIFT)
    for one, other in zip(*((model.params, model.codec.params) for model in (before, after)), strict=True):
        assert params_digest(one) == params_digest(other)


def test_a_file_converted_with_a_config_has_a_scale(runs, tmp_path, capsys):
    """Its autoencoder's; without one, the released models', and that is said."""
    file = convert("dit", runs / "dit", tmp_path / "dit.safetensors")
    assert f"latents: scale {SCALE}, shift {SHIFT}" in capsys.readouterr().out
    values = config_to_dict(make_dit_config(runs / "images"))
    (tmp_path / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    flags = [f"--config={tmp_path / 'config.py'}", f"--autoencoder={runs / 'dit' / 'autoencoder'}"]
    latents = read_config(convert("dit", file, tmp_path / "with", *flags)).latents
    assert (latents.scale, latents.shift) == (SCALE, SHIFT)
    capsys.readouterr()
    latents = read_config(convert("dit", file, tmp_path / "without", flags[0])).latents
    assert (latents.scale, latents.shift) == (0.18215, 0.0)
    assert "latents: scale 0.18215, the released models', since nothing here says another" in capsys.readouterr().out


def test_a_workdir_that_an_older_version_converted_without_a_scale_says_what_to_do(runs, tmp_path, capsys):
    run = write_run(tmp_path / "old", make_dit_config(runs / "images"))
    shutil.copytree(runs / "ae", run / "autoencoder")
    with pytest.raises(SystemExit):
        main(["sample", f"--workdir={run}", f"--output={tmp_path / 'out'}"])
    assert "no config.latents.scale to decode latents with" in capsys.readouterr().err


def test_an_autoencoder_tells_the_scale_of_the_run_or_the_cache_that_it_is_in(runs, tmp_path, monkeypatch):
    assert scale_of_workdir(runs / "dit" / "autoencoder") == (SCALE, SHIFT)
    assert scale_of_workdir(runs / "ae") is None
    shutil.copytree(runs / "ae", tmp_path / "cache" / "autoencoder")
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    monkeypatch.setattr("dit_jax.evaluation.latent_scale.read_manifest", lambda cache: SimpleNamespace(scale=0.7))
    assert scale_of_workdir(tmp_path / "cache" / "autoencoder") == (0.7, 0.0)


def test_who_says_the_scale_is_said_and_a_contradiction_refused():
    told = [("a", LatentScale(0.5)), ("b", LatentScale(0.5 + 1e-9))]
    assert resolve_scale(LatentsConfig((1, 1, 1)), told, 1.0) == ((0.5, 0.0), "latents: scale 0.5, of a")
    with pytest.raises(ValueError, match="must have one scale: a has scale 0.5, c has scale 0.7"):
        resolve_scale(LatentsConfig((1, 1, 1)), [*told, ("c", LatentScale(0.7))], 1.0)
    scale, note = resolve_scale(LatentsConfig((1, 1, 1), scale=0.3), told[:1], 1.0)
    assert scale == (0.3, 0.0) and note == "latents: scale 0.3, as the config has it; a has scale 0.5"


@pytest.mark.parametrize("value", ["0.5", True, 0, -1.0, float("nan"), float("inf"), [0.5], 10**400])
def test_a_scale_that_is_none_is_named(value):
    with pytest.raises(ValueError, match="config.json: scaling_factor=.* must be a positive number"):
        read_scale((value, "config.json: scaling_factor"))
    with pytest.raises(ValueError, match="shift=.* must be a finite number"):
        read_scale((1.0, "scale"), (float("inf"), "shift"))


def test_ldms_checkpoints_tell_the_scale_of_their_first_batch(runs, tmp_path):
    tensors = load_file(convert("autoencoder", runs / "ae", tmp_path / "ae.safetensors"))
    ldm = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(ldm | {"scale_factor": np.array(0.625, np.float32)}, tmp_path / "ldm.safetensors")
    values = config_to_dict(autoencoder_config(runs / "images"))
    (tmp_path / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    flag = f"--config={tmp_path / 'config.py'}"
    run = convert("autoencoder", tmp_path / "ldm.safetensors", tmp_path / "run", flag)
    assert scale_of_workdir(run) == (0.625, 0.0)
    folder = convert("autoencoder", run, tmp_path / "vae")
    assert json.loads((folder / "config.json").read_text())["scaling_factor"] == 0.625


def test_the_shift_is_taken_off_before_the_scale_and_put_back(runs):
    z = np.linspace(-2, 2, 32, dtype=np.float32).reshape(1, 4, 4, 2)
    config = make_dit_config(runs / "images", scale=SCALE, shift=SHIFT)
    x_0 = diffusion_input(config, z, jax.random.key(0))
    np.testing.assert_allclose(x_0, SCALE * (z + 0.25), rtol=1e-6)
    np.testing.assert_array_equal(scaled(z, SCALE), SCALE * z)
    codec = dit_jax.load(runs / "dit").codec
    plain = dataclasses.replace(codec, scale=1.0, shift=0.0)
    np.testing.assert_allclose(codec.decode(x_0), plain.decode(z), rtol=0, atol=1e-5)
