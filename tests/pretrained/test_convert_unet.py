"""Converted U-Nets: outputs equal those of diffusers and of CompVis' form, there and back has the same bits, and files
that do not fit give one line.
"""

import functools
import json
import pathlib

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dit_jax
from dit_jax.cli.main import main
from dit_jax.config import load_config
from dit_jax.evaluation.converted_unet import released_config
from dit_jax.pretrained.unet import compvis_shape, from_compvis
from tests.pretrained.torch_unet import TorchUNet, randomized

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SMALL = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
CROSS = {"cross_attention_dim": 24, "attention_head_dim": 4}
# Classes and arguments of diffusers; the last two have a text's states as their context.
DIFFUSERS = {
    "adm": (
        diffusers.UNet2DModel,
        SMALL
        | {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "num_class_embeds": 4}
        | {"up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "attention_head_dim": 8}
        | {"downsample_type": "resnet", "upsample_type": "resnet"}
        | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8, "out_channels": 6},
    ),
    "unconditional": (
        diffusers.UNet2DModel,
        SMALL
        | {"block_out_channels": (32, 32, 64), "layers_per_block": 2, "attention_head_dim": 16}
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")}
        | {"up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
    ),
    "one head, sines first": (
        diffusers.UNet2DModel,
        SMALL
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        | {"attention_head_dim": None, "flip_sin_to_cos": False},
    ),
    "text": (
        diffusers.UNet2DConditionModel,
        SMALL
        | CROSS
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": (4, 4)}
        | {"layers_per_block": (1, 1), "transformer_layers_per_block": (1, 1), "only_cross_attention": (False, False)},
    ),
    "text, labels, deep": (
        diffusers.UNet2DConditionModel,
        SMALL
        | CROSS
        | {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
        | {"transformer_layers_per_block": 2, "use_linear_projection": True, "attention_head_dim": (2, 4)}
        | {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 4},
    ),
    "text in the middle alone": (
        diffusers.UNet2DConditionModel,
        SMALL
        | CROSS
        | {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}
        | {"resnet_time_scale_shift": "scale_shift"},
    ),
}
# Arguments of our own U-Net in CompVis' form; "ldm" has a token of the class as its context.
COMPVIS = {
    "adm": {"num_heads": lambda width: width // 16, "scale_shift": True, "updown": True, "classes": 4, "outputs": 6},
    "unconditional": {"num_heads": lambda width: width // 16, "blocks": 2},
    "ldm": {"num_heads": lambda width: 2, "context": 24},
}
CLASSES = 4
PREFIX, CLASS_TOKENS = "model.diffusion_model.", "cond_stage_model.embedding.weight"
# Activations are of order 1 after ten layers and more of float32 sums in another order: 1e-5 was seen.
TOLERANCE = 1e-4


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def torch_unet(form, **changes):
    arguments = {"channels": 3, "outputs": 3, "base": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,)}
    return randomized(TorchUNet(**arguments | COMPVIS[form] | changes))


def config_file(path, unet, conditions=None, outputs=3, num_classes=CLASSES):
    """Writes a config of 8 x 8 pixels; returns the flag."""
    values = {
        "stage": "diffusion",
        "data": {"name": "images", "image_size": 8, "num_classes": num_classes},
        "unet": unet,
        "conditions": conditions,
        "diffusion": {"variance": "learned_range" if outputs == 6 else "fixed_small"},
        "sampling": {"cfg_scale": 1.0},
        "training": {"num_train_steps": 1},
    }
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n")
    return f"--config={path}"


def compvis_config(path, form, **changes):
    unet = {"base_channels": 32, "channel_multipliers": (1, 2), "attention_levels": (1,), "num_res_blocks": 1}
    unet |= {
        "adm": {"head_channels": 16, "scale_shift_norm": True, "resblock_updown": True, "label": "vector"},
        "unconditional": {"head_channels": 16, "num_res_blocks": 2, "class_conditional": False},
        "ldm": {"num_heads": 2, "context_width": 24},
    }[form]
    label_dropout = 0.1 if form == "ldm" else 0.0
    return config_file(path, unet | {"label_dropout": label_dropout} | changes, outputs=6 if form == "adm" else 3)


def convert(source, output, *flags):
    main(["convert", "--kind=unet", f"--input={source}", f"--output={output}", *flags])
    return output


def fail(capsys, *argv):
    """Runs the conversion, which must fail with one line; returns the line."""
    with pytest.raises(SystemExit) as exit_info:
        convert(*argv)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and len(error.strip().splitlines()) == 1
    return error


def channels_last(tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


def assert_same_output(ours, theirs_forward, conditions, **theirs_conditions):
    x, t = noise(2, 8, 8, 3), [3, 977]
    expected = channels_last(
        theirs_forward(torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(t), **theirs_conditions)
    )
    assert expected.std() > 0.3
    np.testing.assert_allclose(ours.denoise(x, t, conditions), expected, rtol=0, atol=TOLERANCE)


@functools.cache
def diffusers_model(form):
    cls, arguments = DIFFUSERS[form]
    return randomized(cls(**{"in_channels": 3, "out_channels": 3} | arguments))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Returns a function of a form: its model and state, the file and the workdir of them, the flag for its config."""

    @functools.cache
    def make(form):
        folder, model = tmp_path_factory.mktemp(form), torch_unet(form)
        # ADM's file has no prefix; a class token's table is outside of it.
        state = {("" if form == "adm" else PREFIX) + name: tensor for name, tensor in model.state_dict().items()}
        if form == "ldm":
            state[CLASS_TOKENS] = torch.from_numpy(noise(CLASSES + 1, 24))
        torch.save({"state_dict": state}, folder / "model.ckpt")
        flag = compvis_config(folder / "config.py", form)
        return model, state, folder / "model.ckpt", convert(folder / "model.ckpt", folder / "run", flag), flag

    return make


@pytest.fixture
def adm(converted):
    return converted("adm")


# Output


@pytest.mark.parametrize("form", DIFFUSERS)
def test_output_equals_diffusers_on_the_same_weights(form, tmp_path):
    """Of diffusers 0.42."""
    theirs, flags, conditions, theirs_conditions = diffusers_model(form), [], {}, {}
    theirs.save_pretrained(tmp_path / "theirs")
    if "text" in form:
        states, labels = noise(2, 5, 24, seed=1), theirs.config.num_class_embeds
        multipliers, levels = (1, 2), {"text": (0,), "text, labels, deep": (0, 1), "text in the middle alone": ()}[form]
        unet = {"base_channels": 32, "channel_multipliers": multipliers, "attention_levels": levels, "num_groups": 8}
        unet |= {"num_res_blocks": 1, "context_width": 24, "label": "vector", "class_conditional": bool(labels)}
        unet |= {"head_channels": 16} if labels else {"num_heads": 4}
        unet |= {"transformer_depth": 2 if labels else 1, "label_dropout": 0.0}
        unet |= {"scale_shift_norm": form != "text", "resblock_updown": "middle" in form}
        text = {"max_length": 5, "frozen_width": 24, "dropout": 0.0}
        flags.append(config_file(tmp_path / "config.py", unet, {"text": text}))
        mask = np.ones((2, 5), bool)
        conditions["text"] = {"states": states, "pooled": states[:, 0], "mask": mask}
        theirs_conditions["encoder_hidden_states"] = torch.from_numpy(states)
    if theirs.config.num_class_embeds:
        conditions["label"], theirs_conditions["class_labels"] = np.array([1, 3]), torch.tensor([1, 3])
    if form == "adm":  # its table has no null class, which only a config can say
        flags.append(compvis_config(tmp_path / "config.py", "adm", head_channels=8, num_groups=8))
    ours = dit_jax.load(convert(tmp_path / "theirs", tmp_path / "run", *flags))
    forward = lambda *args, **kwargs: theirs(*args, **kwargs).sample  # noqa: E731
    assert_same_output(ours, forward, conditions, **theirs_conditions)


@pytest.mark.parametrize("form", COMPVIS)
def test_output_equals_that_of_compvis_form_on_the_same_weights(form, converted):
    theirs, state, _, run, _ = converted(form)
    labels = np.array([0, 4 if form == "ldm" else 3])  # 4 is the null class
    theirs_conditions = {
        "adm": lambda: {"labels": torch.from_numpy(labels)},
        "ldm": lambda: {"context": state[CLASS_TOKENS][labels][:, None]},
        "unconditional": lambda: {},
    }[form]()
    assert_same_output(dit_jax.load(run), theirs, {"label": labels}, **theirs_conditions)


def test_moving_averages_are_taken_where_a_checkpoint_has_them(tmp_path, capsys):
    model, average = torch_unet("unconditional"), torch_unet("unconditional")
    for parameter in average.parameters():
        parameter.mul_(0.5)
    state = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    state |= {"first_stage_model.decoder.bias": torch.zeros(3)}
    averages = {"diffusion_model" + name.replace(".", ""): tensor for name, tensor in average.state_dict().items()}
    averages |= {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(5)}
    state |= {f"model_ema.{name}": tensor for name, tensor in averages.items()}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    flag = compvis_config(tmp_path / "config.py", "unconditional")
    run = convert(tmp_path / "model.ckpt", tmp_path / "run", flag)
    printed = capsys.readouterr().out
    assert "the moving averages of the weights are taken" in printed and "first_stage_model.decoder.bias" in printed
    kernel = dit_jax.load(run).params["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel, average.input_blocks[0][0].weight.numpy().transpose(2, 3, 1, 0))
    del state["model_ema.diffusion_modelout2bias"]
    torch.save({"state_dict": state}, tmp_path / "some.ckpt")
    assert "have a moving average" in fail(capsys, tmp_path / "some.ckpt", tmp_path / "run_2", flag)


# There and back


@pytest.mark.parametrize("form", COMPVIS)
def test_compvis_form_there_and_back_has_the_same_bits(form, converted, tmp_path):
    _, state, _, run, _ = converted(form)
    back = load_file(convert(run, tmp_path / "out.safetensors"))
    expected = {PREFIX + name if form == "adm" else name: tensor for name, tensor in state.items()}
    assert sorted(back) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(back[name], tensor.numpy(), err_msg=name)


def test_diffusers_loads_the_folder_of_a_compvis_file_and_computes_the_same(adm, tmp_path):
    theirs, _, _, run, _ = adm
    loaded, loading = diffusers.UNet2DModel.from_pretrained(convert(run, tmp_path / "folder"), output_loading_info=True)
    assert not any(loading.values()), loading
    x, t, labels = torch.from_numpy(noise(2, 3, 8, 8)), torch.tensor([3, 977]), torch.tensor([1, 3])
    with torch.no_grad():
        output = loaded.eval()(x, t, class_labels=labels).sample
    np.testing.assert_allclose(output, theirs(x, t, labels), rtol=0, atol=TOLERANCE)


def test_diffusers_folder_there_and_back_has_the_same_bits_and_config(tmp_path):
    theirs = diffusers_model("unconditional")
    theirs.save_pretrained(tmp_path / "theirs")
    back = convert(convert(tmp_path / "theirs", tmp_path / "run"), tmp_path / "back")
    tensors, expected = load_file(back / "diffusion_pytorch_model.safetensors"), theirs.state_dict()
    assert sorted(tensors) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy(), err_msg=name)
    values, theirs_values = (json.loads((folder / "config.json").read_text()) for folder in (back, tmp_path / "theirs"))
    different = {name for name, value in values.items() if theirs_values[name] != value}
    assert different == {"attn_norm_num_groups"}  # whose None means norm_num_groups


def test_released_shape_needs_no_config():
    """What a file cannot tell of LDM's models and ADM's is known."""
    attention = {"blocks": 2, "num_heads": lambda width: 1}
    f4 = {"channels": 3, "outputs": 3, "base": 192, "multipliers": (1, 2, 3, 5), "attention_levels": (1, 2, 3)}
    adm = {"channels": 3, "outputs": 6, "base": 256, "multipliers": (1, 1, 2, 3, 4), "attention_levels": (2, 3, 4)}
    adm |= {"scale_shift": True, "updown": True, "classes": 1000}
    for name, arguments in (("unet_imagenet.py:f4", f4 | {"context": 512}), ("adm_imagenet.py:128", adm)):
        with torch.device("meta"):
            state = TorchUNet(**arguments | attention).state_dict()
        tensors = {key: np.broadcast_to(np.float32(0), tensor.shape) for key, tensor in state.items()}
        if "context" in arguments:
            tensors = {PREFIX + key: tensor for key, tensor in tensors.items()}
            tensors[CLASS_TOKENS] = np.broadcast_to(np.float32(0), (1001, 512))
        config, paper = released_config(compvis_shape(from_compvis(tensors)[0])), load_config(str(CONFIGS / name))
        for section in ("unet", "latents", "diffusion"):
            assert getattr(config, section) == getattr(paper, section)
        assert (config.data.num_classes, config.data.image_size) == (1000, paper.data.image_size)


# What is refused


def drop(state):
    del state["middle_block.1.qkv.bias"]


def add(state):
    state["middle_block.3.bias"] = torch.zeros(3)


def reshape(state):
    state["output_blocks.0.0.in_layers.2.weight"] = torch.zeros(64, 100, 3, 3)


def widen(state):
    state["input_blocks.1.0.out_layers.3.weight"] = torch.zeros(33, 33, 3, 3)


def relabel(state):
    state["label_emb.weight"] = torch.zeros(5, 128)


def of_an_autoencoder(state):
    state.clear()
    state["encoder.conv_in.weight"] = torch.zeros(3, 3, 3, 3)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, "tensor 'middle_block.1.qkv.bias' is missing"),
        (add, "tensor 'middle_block.3.bias' is not expected"),
        (
            reshape,
            "tensor 'output_blocks.0.0.in_layers.2.weight' must have shape (64, 128, 3, 3), but has (64, 100, 3, 3)",
        ),
        (widen, "the levels' channels [33, 64] must be multiples of the first convolution's 32"),
        (relabel, "label_rows 4 (weights: 5)"),
        (of_an_autoencoder, "tensor 'out.0.weight' is missing; these are not a U-Net's weights in this form"),
    ],
)
def test_tensor_that_does_not_fit_is_named(adm, tmp_path, capsys, edit, message):
    model, _, _, _, config = adm
    state = dict(model.state_dict())
    edit(state)
    save_file({name: tensor.numpy() for name, tensor in state.items()}, tmp_path / "in.safetensors")
    assert message in fail(capsys, tmp_path / "in.safetensors", tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-6}, "norm_eps=1e-06 must be 1e-05: a U-Net here has no other"),
        ({"freq_shift": 1}, "freq_shift=1 must be 0"),
        ({"downsample_padding": 0}, "downsample_padding=0 must be 1"),
        ({"act_fn": "gelu"}, "act_fn='gelu' must be 'silu'"),
        ({"mid_block_type": None}, "mid_block_type=None must be 'UNetMidBlock2D'"),
        (
            {"up_block_types": ["UpBlock2D"] * 3},
            "up_block_types=['UpBlock2D', 'UpBlock2D', 'UpBlock2D'] must be ['Attn",
        ),
        ({"_class_name": "UNet1DModel"}, "is not the config of a diffusers model of --kind=unet"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups=4 must be norm_num_groups=8: a U-Net here has one number"),
        ({"in_channels": 6}, "read 6 channels and predict 3: an image is read beside x_t"),
        ({"attention_head_dim": 24}, "must divide the 32 channels of level 1"),
    ],
)
def test_diffusers_config_that_no_unet_here_has_is_named(changes, message, tmp_path, capsys):
    diffusers_model("unconditional").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert message in fail(capsys, tmp_path / "theirs", tmp_path / "run")


def test_unet_of_unknown_heads_needs_a_config_and_its_own(adm, tmp_path, capsys):
    _, _, path, run, _ = adm
    assert "do not tell the number of heads of this U-Net; give --config=FILE" in fail(capsys, path, tmp_path / "run")
    other = compvis_config(tmp_path / "config.py", "adm", resblock_updown=False)
    assert "resblock_updown False (weights: True)" in fail(capsys, path, tmp_path / "run", other)
    with pytest.raises(SystemExit):
        main(["convert", "--kind=dit", f"--input={run}", f"--output={tmp_path / 'out.pt'}"])
    assert "is a run of stage 'diffusion' without a dit: not of --kind=dit" in capsys.readouterr().err
