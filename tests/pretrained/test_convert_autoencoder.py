"""Converted autoencoders: encodings and decodings equal diffusers', there and back is bit-exact."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.cli.main import main
from dit_jax.models.autoencoder import split_moments


def convert(source, output, *flags):
    main(["convert", "--kind=autoencoder", f"--input={source}", f"--output={output}", *flags])
    return output


def images(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def channels_first(array):
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=["attention in the middle", "attention at a level"])
def theirs(request, tmp_path_factory):
    """A small autoencoder of diffusers with random weights, and its folder."""
    levels = {"attention in the middle": ("Down", "Up"), "attention at a level": ("AttnDown", "AttnUp")}[request.param]
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D", f"{levels[0]}EncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", f"{levels[1]}DecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=32,
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("diffusers") / "model"
    model.save_pretrained(folder)
    return model, folder


def test_encoding_and_decoding_equal_diffusers(theirs, tmp_path):
    model, folder = theirs
    ours = dit_jax.load(convert(folder, tmp_path / "run"))
    x = images(2, 32, 48, 3)
    with torch.no_grad():
        posterior = model.encode(channels_first(x)).latent_dist
        decoded = model.decode(posterior.mean).sample
    mean, log_variance = split_moments(ours.codec.moments(x))
    for one, other in ((mean, posterior.mean), (log_variance, posterior.logvar), (ours.decode(mean), decoded)):
        np.testing.assert_allclose(one, other.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)
    assert decoded.std() > 0.1


def test_every_form_there_and_back_has_the_same_bits(theirs, tmp_path):
    model, folder = theirs
    run = convert(folder, tmp_path / "run")
    back = load_file(convert(run, tmp_path / "folder") / "diffusion_pytorch_model.safetensors")
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor.numpy())
    released = load_file(convert(run, tmp_path / "released.safetensors"))
    width = 64
    for name, shape in {
        "encoder.down.0.block.0.norm1.weight": (32,),
        "encoder.down.1.block.0.nin_shortcut.weight": (width, 32, 1, 1),
        "encoder.down.0.downsample.conv.weight": (32, 32, 3, 3),
        "encoder.mid.attn_1.q.weight": (width, width, 1, 1),
        "decoder.up.2.upsample.conv.bias": (width,),
        "decoder.up.0.block.1.conv2.weight": (32, 32, 3, 3),
        "quant_conv.weight": (6, 6, 1, 1),
        "post_quant_conv.bias": (3,),
    }.items():
        assert released[name].shape == shape, name
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in released.items()}
    prefixed |= {"first_stage_model.loss.logvar": np.zeros(1, np.float32), "model.x": np.zeros(1, np.float32)}
    save_file(prefixed, tmp_path / "ldm.safetensors")
    again = convert(convert(tmp_path / "ldm.safetensors", tmp_path / "run_2"), tmp_path / "again.pt")
    state = torch.load(again, weights_only=True)
    assert state.keys() == released.keys()
    for name, tensor in released.items():
        np.testing.assert_array_equal(state[name].numpy(), tensor)


def test_what_is_left_out_of_a_checkpoint_is_said(theirs, tmp_path, capsys):
    released = load_file(convert(convert(theirs[1], tmp_path / "run"), tmp_path / "released.safetensors"))
    save_file(released | {"loss.discriminator": np.zeros(1, np.float32)}, tmp_path / "with_loss.safetensors")
    convert(tmp_path / "with_loss.safetensors", tmp_path / "run_2")
    assert "left out, not the autoencoder's: 1 tensors such as 'loss.discriminator'" in capsys.readouterr().out


def test_older_names_of_attention_are_read(theirs, tmp_path):
    _, folder = theirs
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new_name, old_name in old.items():
        tensors = {name.replace(f".{new_name}.", f".{old_name}."): tensor for name, tensor in tensors.items()}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    new, older = (convert(source, tmp_path / f"run_{source.name}") for source in (folder, tmp_path / "old"))
    x = images(1, 32, 32, 3)
    np.testing.assert_array_equal(dit_jax.load(new).encode(x), dit_jax.load(older).encode(x))
