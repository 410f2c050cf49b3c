"""Converted autoencoders: encodings and decodings equal diffusers' (0.35 and later), there and back is bit-exact."""

import dataclasses
import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.cli.main import main
from dit_jax.models.autoencoder import Codec, split_moments

WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = {  # widths, levels with attention, latent channels, codes
    "kl-f8": ((32, 64, 64, 64), (), 4, None),
    "kl-f4, attention at a level": ((32, 64, 64), (1,), 3, None),
    "vq-f4": ((32, 64, 64), (), 3, 48),
    "vq, attention at the lowest level": ((32, 64), (1,), 4, 20),
}
moments_of = jax.jit(Codec.moments)


def convert(source, output, *flags):
    main(["convert", "--kind=autoencoder", f"--input={source}", f"--output={output}", *flags])
    return output


def images(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def channels_first(array):
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)


def channels_last(tensor):
    return tensor.detach().permute(0, 2, 3, 1).numpy()


def make_theirs(kind, **settings):
    """Returns a small autoencoder of diffusers with random weights, and codes that are as far apart as latents are."""
    widths, attention_levels, latent_channels, num_codes = KINDS[kind]
    settings = {"layers_per_block": 1} | settings
    down = ["AttnDown" if level in attention_levels else "Down" for level in range(len(widths))]
    shape = {
        "block_out_channels": widths,
        "down_block_types": [f"{name}EncoderBlock2D" for name in down],
        "up_block_types": [f"{name.replace('Down', 'Up')}DecoderBlock2D" for name in reversed(down)],
        "latent_channels": latent_channels,
    }
    torch.manual_seed(0)
    if num_codes is None:
        model = diffusers.AutoencoderKL(**shape | settings).eval()
    else:
        model = diffusers.VQModel(num_vq_embeddings=num_codes, **shape | settings).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if num_codes is not None:
        model.quantize.embedding.weight.data.normal_()
    return model


@pytest.fixture(scope="module", params=KINDS)
def theirs(request, tmp_path_factory):
    """A model of diffusers, its folder, and the workdir converted from it."""
    model = make_theirs(request.param)
    root = tmp_path_factory.mktemp("autoencoder")
    model.save_pretrained(root / "folder")
    return model, root / "folder", convert(root / "folder", root / "run")


def encoded_and_decoded(model, x):
    """Returns what a model of diffusers makes of images: moments (VQ: latents), and the decoded latents or means."""
    with torch.no_grad():
        encoded = model.encode(channels_first(x))
        if isinstance(model, diffusers.VQModel):
            return channels_last(encoded.latents), channels_last(model.decode(encoded.latents).sample)
        posterior = encoded.latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
        return channels_last(moments), channels_last(model.decode(posterior.mean).sample)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=str)
def test_encoding_and_decoding_equal_diffusers(theirs, size):
    model, _, run = theirs
    ours, x = dit_jax.load(run), images(1, *size, 3)
    moments, decoded = encoded_and_decoded(model, x)
    latents = moments[..., : ours.config.autoencoder.latent_channels]
    np.testing.assert_allclose(moments_of(ours.codec, x), moments, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.decode(latents), decoded, rtol=0, atol=1e-4)  # of the same latents: the same codes
    assert decoded.std() > 0.1 and latents.std() > 0.1


def test_a_folder_there_and_back_has_the_same_bits_and_loads_in_diffusers(theirs, tmp_path):
    model, folder, run = theirs
    back = convert(run, tmp_path / "back")
    tensors = load_file(back / WEIGHTS)
    assert tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy())
    loaded, info = type(model).from_pretrained(back, output_loading_info=True)
    assert not any(info.values())
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    unlike = {key for key, value in after.items() if before.get(key) != value}
    assert unlike <= {"sample_size", "vq_embed_dim"}  # of the data; null there, which says the same
    x = images(1, 32, 32, 3)
    for one, other in zip(encoded_and_decoded(loaded, x), encoded_and_decoded(model, x), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_compvis_file_has_its_programs_names_and_there_and_back_the_same_bits(theirs, tmp_path):
    model, _, run = theirs
    latent, codes = model.config.latent_channels, model.config.get("num_vq_embeddings")
    moments = latent if codes else 2 * latent
    expected = {
        "encoder.down.0.block.0.norm1.weight": (32,),
        "encoder.down.1.block.0.nin_shortcut.weight": (64, 32, 1, 1),
        "encoder.down.0.downsample.conv.weight": (32, 32, 3, 3),
        "encoder.mid.attn_1.q.weight": (64, 64, 1, 1),
        "decoder.up.1.upsample.conv.bias": (64,),
        "decoder.up.0.block.1.conv2.weight": (32, 32, 3, 3),
        "quant_conv.weight": (moments, moments, 1, 1),
        "post_quant_conv.bias": (latent,),
    } | ({"quantize.embedding.weight": (codes, latent)} if codes else {})
    released = load_file(convert(run, tmp_path / "released.safetensors"))
    assert {name: released[name].shape for name in expected} == expected
    assert len(released) == len(model.state_dict())
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in released.items()}
    prefixed["model.x"] = np.zeros(1, np.float32)
    save_file(prefixed, tmp_path / "ldm.safetensors")
    run_2 = convert(tmp_path / "ldm.safetensors", tmp_path / "run_2")
    first, second = (dit_jax.load(path).config.autoencoder for path in (run, run_2))
    told = {"latents_scale": first.latents_scale, "latents_shift": first.latents_shift}  # a file has no place for them
    assert told["latents_scale"] == 0.18215 and first == dataclasses.replace(second, **told)
    state = torch.load(convert(run_2, tmp_path / "again.pt"), weights_only=True)
    assert state.keys() == released.keys()
    for name, tensor in released.items():
        np.testing.assert_array_equal(state[name].numpy(), tensor)


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    """A VQ autoencoder with attention at a level: its diffusers folder, its workdir and its CompVis tensors."""
    root = tmp_path_factory.mktemp("vq")
    make_theirs("vq, attention at the lowest level").save_pretrained(root / "folder")
    run = convert(root / "folder", root / "run")
    return root / "folder", run, load_file(convert(run, root / "released.safetensors"))


def same_parameters(*runs):
    for one, other in zip(*(jax.tree.leaves(dit_jax.load(run).params) for run in runs), strict=True):
        np.testing.assert_array_equal(one, other)


def test_attention_stored_as_linear_layers_is_the_same(vq, tmp_path):
    _, run, released = vq
    assert sum(".attn" in name and tensor.ndim == 4 for name, tensor in released.items()) == 20
    linear = {name: tensor.squeeze() if ".attn" in name else tensor for name, tensor in released.items()}
    save_file(linear, tmp_path / "linear.safetensors")
    same_parameters(run, convert(tmp_path / "linear.safetensors", tmp_path / "run_2"))


def test_what_is_left_out_of_a_checkpoint_is_said_by_group(vq, tmp_path, capsys):
    _, run, released = vq
    extra = {
        "loss.discriminator": "the training loss's (discriminator, LPIPS): 2 tensors such as 'loss.discriminator'",
        "loss.logvar": "",
        "model_ema.decay": "a moving average of the weights: 1 tensors such as 'model_ema.decay'",
        "quantize.embedding.cluster_size": "the codes' moving averages: 2 tensors such as "
        "'quantize.embedding.cluster_size'",
        "quantize.embedding.embed_avg": "",
    }
    save_file(released | dict.fromkeys(extra, np.zeros(1, np.float32)), tmp_path / "more.safetensors")
    same_parameters(run, convert(tmp_path / "more.safetensors", tmp_path / "run_2"))
    printed = capsys.readouterr().out
    assert printed.count("left out, ") == 3
    for note in filter(None, extra.values()):
        assert f"left out, {note}\n" in printed


@pytest.mark.parametrize("form", ["compvis", "diffusers"])
def test_codes_of_other_channels_than_the_networks_are_refused(form, tmp_path, capsys):
    model = make_theirs("vq, attention at the lowest level", vq_embed_dim=2)
    model.save_pretrained(tmp_path / "folder")
    source = tmp_path / "folder"
    if form == "compvis":
        names = {"encoder.conv_in.weight", "post_quant_conv.weight", "quantize.embedding.weight"}
        tensors = {name: tensor for name, tensor in load_file(source / WEIGHTS).items() if name in names}
        tensors["encoder.down.0.block.0.conv2.bias"] = np.zeros(32, np.float32)
        source = tmp_path / "released.safetensors"
        save_file(tensors, source)
    with pytest.raises(SystemExit):
        convert(source, tmp_path / "run")
    assert "embed_dim=2 (diffusers: vq_embed_dim) must equal z_channels=4 (latent_channels)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("_class_name", "AutoencoderTiny", "_class_name='AutoencoderTiny' must be AutoencoderKL or VQModel"),
        ("_class_name", "AutoencoderKL", "_class_name='AutoencoderKL', but the weights have the codes of a VQModel"),
        ("act_fn", "relu", "act_fn='relu' must be 'silu'"),
    ],
)
def test_folders_of_other_models_are_refused(name, value, error, vq, tmp_path, capsys):
    folder = shutil.copytree(vq[0], tmp_path / "folder")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(SystemExit):
        convert(folder, tmp_path / "run")
    assert error in capsys.readouterr().err


def test_an_autoencoder_without_the_convolutions_around_the_latent_gets_ones_that_change_nothing(tmp_path):
    model = make_theirs("kl-f8", use_quant_conv=False, use_post_quant_conv=False)  # as Stable Diffusion 3's
    model.save_pretrained(tmp_path / "folder")
    run = convert(tmp_path / "folder", tmp_path / "run")
    ours, x = dit_jax.load(run), images(1, 64, 64, 3)
    moments, decoded = encoded_and_decoded(model, x)
    np.testing.assert_allclose(moments_of(ours.codec, x), moments, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.decode(split_moments(moments)[0]), decoded, rtol=0, atol=1e-4)
    back = diffusers.AutoencoderKL.from_pretrained(convert(run, tmp_path / "back"))
    for one, other in zip(encoded_and_decoded(back, x), (moments, decoded), strict=True):
        np.testing.assert_array_equal(one, other)


def test_older_names_of_attention_are_read(vq, tmp_path):
    folder, run, _ = vq
    older = shutil.copytree(folder, tmp_path / "older")
    tensors = load_file(folder / WEIGHTS)
    for new_name, old_name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {name.replace(f".{new_name}.", f".{old_name}."): tensor for name, tensor in tensors.items()}
    assert sum(".proj_attn." in name for name in tensors) == 10
    save_file(tensors, older / WEIGHTS)
    same_parameters(run, convert(older, tmp_path / "run_2"))
