"""DINOv2 equals a forward in PyTorch written from the released code's modules, with random weights at small width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file

from dit_jax.cli.main import main
from dit_jax.evaluation.feature_networks import load_network
from dit_jax.metrics.dinov2 import abstract_dinov2, dinov2_images, dinov2_network

WIDTH, DEPTH = 128, 2


@functools.lru_cache
def released():
    """Returns random arrays by the names of `dinov2_vit*14_pretrain.pth`."""
    rng = np.random.default_rng(0)
    shapes = {"cls_token": (1, 1, WIDTH), "mask_token": (1, WIDTH), "pos_embed": (1, 1 + 37 * 37, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        layers |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
        shapes |= {f"blocks.{i}.{scale}.gamma": (WIDTH,) for scale in ("ls1", "ls2")}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    arrays = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        if len(shape) > 1 and name.endswith("weight"):
            values /= np.sqrt(np.prod(shape[1:]), dtype=np.float32)
        arrays[name] = values
    return arrays


def huggingface():
    """Returns the arrays by transformers' names."""
    arrays = {}
    for name, array in released().items():
        for ours, theirs in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("blocks.", "encoder.layer."),
            ("attn.proj", "attention.output.dense"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("cls_token", "embeddings.cls_token"),
            ("mask_token", "embeddings.mask_token"),
        ):
            name = name.replace(ours, theirs)
        name = f"layer{name}" if name.startswith("norm.") else name
        if ".qkv." in name:
            for part, letter in zip(np.split(array, 3), ("query", "key", "value"), strict=True):
                arrays[name.replace("attn.qkv", f"attention.attention.{letter}")] = part.copy()
        else:
            arrays[name] = array
    return arrays


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    source, output = folder / "dinov2_vits14_pretrain.pth", folder / "dinov2.safetensors"
    torch.save({name: torch.from_numpy(array) for name, array in released().items()}, source)
    main(["convert", "--kind=dinov2", f"--input={source}", f"--output={output}"])
    return load_network(output)


def torch_dinov2(x):
    """Returns the class token's features of standardised images [B, 224, 224, 3]."""
    weight = {name: torch.from_numpy(array) for name, array in released().items()}
    linear = lambda x, name: F.linear(x, weight[f"{name}.weight"], weight[f"{name}.bias"])  # noqa: E731
    norm = lambda x, name: F.layer_norm(x, (WIDTH,), weight[f"{name}.weight"], weight[f"{name}.bias"], 1e-6)  # noqa: E731
    x = F.conv2d(x.permute(0, 3, 1, 2), weight["patch_embed.proj.weight"], weight["patch_embed.proj.bias"], stride=14)
    x = torch.cat([weight["cls_token"].expand(len(x), 1, WIDTH), x.flatten(2).transpose(1, 2)], dim=1)
    grid = weight["pos_embed"][:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((16 + 0.1) / 37,) * 2, mode="bicubic")
    assert grid.shape == (1, WIDTH, 16, 16)
    x = x + torch.cat([weight["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(len(x), -1, 3, WIDTH // 64, 64)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(x.shape)
        x = x + weight[f"{block}.ls1.gamma"] * linear(attended, f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + weight[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0].numpy()


@pytest.mark.parametrize("size", [(224, 224), (32, 48)])
def test_features_equal_pytorchs(size, network):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    images[1] = np.linspace(0, 255, size[1])[None, :, None]
    images = jnp.asarray(images)
    expected = torch_dinov2(torch.from_numpy(np.array(dinov2_images(images))))
    found = network.apply(network.params, images)["pool"]
    assert found.shape == (2, WIDTH) and np.abs(expected[0] - expected[1]).mean() > 0.03  # 1,500 times what is allowed
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_transformers_names_give_the_same_network(network, tmp_path):
    save_file(huggingface(), tmp_path / "model.safetensors")
    output = tmp_path / "dinov2.safetensors"
    main(["convert", "--kind=dinov2", f"--input={tmp_path / 'model.safetensors'}", f"--output={output}"])
    jax.tree.map(np.testing.assert_array_equal, load_network(output).params, network.params)


@pytest.mark.parametrize("size", [(32, 32), (256, 300), (518, 224)])
def test_images_are_resized_as_pillow_does(size):
    smooth = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(smooth).resize(size[::-1], Image.Resampling.BICUBIC)
    expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), np.float32) / 255
    found = dinov2_images(jnp.asarray(np.asarray(image))[None])[0]
    found = np.asarray(found) * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
    difference = np.abs(found - expected) * 255
    assert difference.max() < 1.01 and difference.mean() < 0.02  # Pillow's kernels have 22 bits


def test_the_distance_is_named_after_the_network(network):
    assert network.distance == "FD-DINOv2-ViT-128x2/14"
    named = lambda *shape: dinov2_network(jax.eval_shape(lambda: abstract_zeros(*shape)))  # noqa: E731
    abstract_zeros = lambda width, depth: jax.tree.map(lambda x: jnp.zeros(x.shape), abstract_dinov2(width, depth))  # noqa: E731
    assert (named(1024, 24).name, named(1024, 24).distance) == ("dinov2-vit-l14", "FD-DINOv2")
    assert named(768, 12).distance == "FD-DINOv2-ViT-B/14"
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_dinov2(1024, 24)))
    assert count == 304_368_640 - 1024  # as released, less the mask's token


def test_what_does_not_fit_is_named(tmp_path, capsys):
    source = tmp_path / "dinov2.pth"
    for change, message in (
        ({"blocks.0.mlp.w12.weight": np.zeros(3, np.float32)}, "'blocks.0.mlp.w12.weight' is not expected"),
        ({"pos_embed": np.zeros((1, 257, WIDTH), np.float32)}, "'pos_embed' must have shape (1, 1370, 128)"),
        ({"cls_token": None}, "not a DINOv2's"),
    ):
        arrays = {name: array for name, array in (released() | change).items() if array is not None}
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, source)
        with pytest.raises(SystemExit):
            main(["convert", "--kind=dinov2", f"--input={source}", f"--output={tmp_path / 'out.safetensors'}"])
        line = capsys.readouterr().err.strip()
        assert message in line and str(source) in line and "\n" not in line, line
    assert not (tmp_path / "out.safetensors").exists()
