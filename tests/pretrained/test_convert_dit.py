"""Converted weights: forward passes equal PyTorch's, there and back is bit-exact, and bad files give one line."""

import argparse
import json
import os
import pickle

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.cli.main import main
from dit_jax.config import config_to_dict
from dit_jax.diffusion.guidance import guidance_scales, guided
from dit_jax.diffusion.process import make_process
from dit_jax.evaluation.converted import read_diffusers
from tests.pretrained.torch_dit import random_dit
from tests.tiny import dit_config, make_image_folder

SMALL = {"depth": 2, "width": 64, "num_heads": 4, "patch_size": 2, "num_classes": 10, "height": 8}
SHAPES = {
    "S/2": {"depth": 12, "width": 384, "num_heads": 6, "patch_size": 2, "num_classes": 1000},
    "B/4 wide": {"depth": 3, "width": 768, "num_heads": 12, "patch_size": 4, "num_classes": 1000},
    "XL/2 wide": {"depth": 2, "width": 1152, "num_heads": 16, "patch_size": 2, "num_classes": 1000},
}
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "stage": "diffusion",
        "data": {"name": "images", "image_size": 64, "num_classes": 10},
        "latents": {"shape": (8, 8, 4)},
        "dit": {"depth": 2, "width": 64, "num_heads": 4, "patch_size": 2},
        "training": {"num_train_steps": 1},
    })
"""


def convert(source, output, *flags):
    main(["convert", "--kind=dit", f"--input={source}", f"--output={output}", *flags])
    return output


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small DiT in PyTorch, its released file, and the flag for the config of its width."""
    folder = tmp_path_factory.mktemp("released")
    model = random_dit(**SMALL)
    torch.save(model.state_dict(), folder / "small.pt")
    (folder / "config.py").write_text(CONFIG)
    return model, folder / "small.pt", f"--config={folder / 'config.py'}"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def torch_forward(model, x, t, labels):
    """Calls a PyTorch model with our arrays, channels last."""
    output = model(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(labels))
    return output.permute(0, 2, 3, 1).numpy()


def fail(capsys, *argv):
    """Runs the conversion, which must fail with one line; returns the line."""
    with pytest.raises(SystemExit) as exit_info:
        convert(*argv)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and len(error.strip().splitlines()) == 1
    return error


# Forward


@pytest.mark.parametrize("name", SHAPES)
def test_forward_equals_pytorchs_on_the_same_weights(name, tmp_path):
    shape = SHAPES[name]
    theirs = random_dit(**shape)
    torch.save({"ema": theirs.state_dict(), "model": {}, "args": argparse.Namespace(seed=0)}, tmp_path / "dit.pt")
    ours = dit_jax.load(convert(tmp_path / "dit.pt", tmp_path / "run"))
    x, t, labels = noise(3, 32, 32, 4), [0, 500, 999], [0, 999, 1000]  # 1000: the null class
    expected = torch_forward(theirs, x, t, labels)
    assert expected.std() > 0.1
    np.testing.assert_allclose(ours.denoise(x, t, labels), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("cfg_channels", [3, 4])
def test_guided_output_equals_that_of_two_pytorch_passes(small, tmp_path, cfg_channels):
    theirs, path, config = small
    ours = dit_jax.load(convert(path, tmp_path / "run", config))
    x, t, labels = noise(2, 8, 8, 4), [3, 700], [1, 9]
    conditional, null = torch_forward(theirs, x, t, labels), torch_forward(theirs, x, t, [10, 10])
    expected = conditional.copy()
    expected[..., :cfg_channels] = (null + 4.0 * (conditional - null))[..., :cfg_channels]
    scales = guidance_scales(make_process(ours.config.diffusion), 4.0, None)
    to_null = lambda labels: jnp.full_like(labels, 10)  # noqa: E731
    output = guided(ours.denoise, to_null, scales, cfg_channels)(jnp.asarray(x), jnp.array(t), jnp.array(labels))
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-5)


def test_converted_weights_are_sampled_as_latents_and_trained_on(small, tmp_path):
    _, path, _ = small
    folder = make_image_folder(tmp_path / "images")
    model = random_dit(**SMALL | {"num_classes": 3, "channels": 1})
    torch.save(model.state_dict(), tmp_path / "pixels.pt")
    values = config_to_dict(dit_config(folder)) | {"dit": {"depth": 2, "width": 64, "num_heads": 4, "patch_size": 2}}
    (tmp_path / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    config = f"--config={tmp_path / 'config.py'}"
    run = convert(tmp_path / "pixels.pt", tmp_path / "run", config)
    converted = dit_jax.load(run)
    assert converted.sample([0, 1], num_steps=2).shape == (2, 8, 8, 3)
    main(["train", config, f"--workdir={run}"])
    assert "resuming from the checkpoint of step 0" in (run / "log.txt").read_text()
    trained = dit_jax.load(run)
    assert trained.step == 4
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), trained.params, converted.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.02  # four steps of 1e-3 from the converted weights, not from new ones
    latents = dit_jax.load(convert(path, tmp_path / "latents", small[2])).sample([0, 1], num_steps=2, cfg_scale=2.0)
    assert latents.shape == (2, 8, 8, 4) and latents.dtype == np.float32


# There and back


@pytest.mark.parametrize("nest", [None, "ema", "model"])
def test_released_form_there_and_back_has_the_same_bits(small, tmp_path, nest):
    model, _, config = small
    state = model.state_dict()
    torch.save({nest: state} if nest else state, tmp_path / "in.pt")
    convert(convert(tmp_path / "in.pt", tmp_path / "run", config), tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=True)
    assert sorted(back) == sorted(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_diffusers_folder_there_and_back_has_the_same_bits(small, tmp_path):
    _, path, config = small
    run = convert(path, tmp_path / "run", config)
    folder = convert(run, tmp_path / "diffusers")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "DiTTransformer2DModel"
    again = convert(convert(folder, tmp_path / "run_2", config), tmp_path / "again")
    back = load_file(again / "diffusion_pytorch_model.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
    convert(tmp_path / "run_2", tmp_path / "released.safetensors")
    released = load_file(tmp_path / "released.safetensors")
    for name, tensor in torch.load(path, weights_only=True).items():
        np.testing.assert_array_equal(released[name], tensor)


def test_diffusers_loads_the_folder_and_computes_the_same(small, tmp_path):
    _, path, config = small
    run = convert(path, tmp_path / "run", config)
    theirs, loading = diffusers.DiTTransformer2DModel.from_pretrained(
        convert(run, tmp_path / "diffusers"), output_loading_info=True
    )
    assert not any(loading.values()), loading
    x, t, labels = noise(2, 8, 8, 4), [0, 500], [1, 10]
    for block in theirs.transformer_blocks:
        # The released models' sinusoids have frequencies 10000^(-i / 128); diffusers' port has i / 127.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    with torch.no_grad():
        output = theirs.eval()(torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(labels)).sample
    ours = dit_jax.load(run).denoise(x, t, labels)
    np.testing.assert_allclose(ours, output.permute(0, 2, 3, 1).numpy(), rtol=0, atol=2e-5)


# What is refused


class Bomb:
    """A pickle of it would make a file when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_pickle_that_would_run_code_is_refused_and_nothing_runs(small, tmp_path, capsys, form):
    content = {"model": Bomb(tmp_path / "ran")}
    if form == "torch":
        torch.save(content, tmp_path / "bomb.pt")
    else:
        (tmp_path / "bomb.pt").write_bytes(pickle.dumps(content))
    error = fail(capsys, tmp_path / "bomb.pt", tmp_path / "run")
    assert "nothing of it was run" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.pt"]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_file_is_one_line_and_leaves_nothing_behind(small, tmp_path, capsys, suffix, share):
    model, path, config = small
    whole = path
    if suffix == "safetensors":
        whole = tmp_path / "whole.safetensors"
        save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, whole)
    content = whole.read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(content[: int(share * len(content))])
    before = sorted(tmp_path.iterdir())
    error = fail(capsys, tmp_path / f"cut.{suffix}", tmp_path / "run", config)
    assert "truncated" in error or "damaged" in error
    assert sorted(tmp_path.iterdir()) == before


def drop(state):
    del state["blocks.1.mlp.fc2.bias"]


def add(state):
    state["blocks.1.extra"] = torch.zeros(3)


def reshape(state):
    state["blocks.0.attn.proj.weight"] = torch.zeros(64, 65)


def deepen(state):
    state |= {name.replace("blocks.1", "blocks.2"): x for name, x in state.items() if name.startswith("blocks.1")}


def move_position_table(state):
    state["pos_embed"] = state["pos_embed"] + 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, "tensor 'blocks.1.mlp.fc2.bias' is missing"),
        (add, "tensor 'blocks.1.extra' is not expected"),
        (reshape, "tensor 'blocks.0.attn.proj.weight' must have shape (64, 64), but has (64, 65)"),
        (deepen, "depth 2 (weights: 3)"),
        (move_position_table, "tensor 'pos_embed' must be DiT's sine-cosine table"),
    ],
)
def test_tensor_that_does_not_fit_is_named(small, tmp_path, capsys, edit, message):
    model, _, config = small
    state = dict(model.state_dict())
    edit(state)
    torch.save(state, tmp_path / "in.pt")
    assert message in fail(capsys, tmp_path / "in.pt", tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [None, True])
@pytest.mark.parametrize("name", ["in_channels", "num_layers", "sample_size", "patch_size", "num_embeds_ada_norm"])
def test_a_size_in_a_folders_config_that_is_no_number_is_one_line(tmp_path, name, value):
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}
    sizes |= {"num_embeds_ada_norm": 10, "sample_size": 8, "in_channels": 4, "out_channels": 8}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {name: value}))
    with pytest.raises(ValueError, match="must be whole numbers"):
        read_diffusers("dit", tmp_path)


def test_existing_output_is_not_overwritten(small, tmp_path, capsys):
    _, path, config = small
    (tmp_path / "run").mkdir()
    assert "exists" in fail(capsys, path, tmp_path / "run", config)
