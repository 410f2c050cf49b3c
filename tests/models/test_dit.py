"""The transformer: the paper's sizes to the digit, its initialisation, and what its output depends on."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import config_from_dict
from dit_jax.models.build import build_dit, init_params
from dit_jax.models.cost import count_params, describe_cost
from dit_jax.models.dit import Condition, DiT, DiTBlock, FinalLayer
from dit_jax.models.dit_sizes import dit_size
from dit_jax.nn.attention import SelfAttention
from dit_jax.nn.mlp import Mlp
from dit_jax.nn.modulation import modulated_norm

# (model, image size): trainable parameters, and "Gflops" (multiply-adds, 10^9) as printed in the paper's table 4.
PAPER = {
    ("S/8", 256): (33_142_016, 0.36),
    ("S/4", 256): (32_920_448, 1.41),
    ("S/2", 256): (32_865_056, 6.06),
    ("B/8", 256): (130_869_248, 1.42),
    ("B/4", 256): (130_426_496, 5.56),
    ("B/2", 256): (130_315_808, 23.01),
    ("L/8", 256): (458_578_432, 5.01),
    ("L/4", 256): (457_988_224, 19.70),
    ("L/2", 256): (457_840_672, 80.71),
    ("XL/8", 256): (675_664_640, 7.39),
    ("XL/4", 256): (675_000_704, 29.05),
    ("XL/2", 256): (674_834_720, 118.64),
    ("S/8", 512): (None, 1.43),
    ("S/4", 512): (None, 6.07),
    ("S/2", 512): (None, 31.44),
    ("B/8", 512): (None, 5.59),
    ("B/4", 512): (None, 23.03),
    ("B/2", 512): (None, 106.38),
    ("L/8", 512): (None, 19.73),
    ("L/4", 512): (None, 80.74),
    ("L/2", 512): (None, 360.98),
    ("XL/8", 512): (None, 29.09),
    ("XL/4", 512): (None, 118.66),
    ("XL/2", 512): (None, 524.60),
}
# XL/2 at 256 pixels (figure 5 and table 4): parameters in millions, and Gflops.
PAPER_BLOCKS = {"in_context": (449, 119.37), "cross_attention": (598, 137.62), "adaln": (600, 118.56)}
BLOCKS = ("adaln_zero", *PAPER_BLOCKS)
WIDTH = 32
CLASSES = 5


def paper_config(name, image_size, conditioning=("adaln_zero",)):
    return config_from_dict(
        {
            "stage": "diffusion",
            "data": {"name": "imagenet2012", "image_size": image_size},
            "latents": {"shape": (image_size // 8, image_size // 8, 4)},
            "dit": dit_size(name) | {"conditioning": conditioning},
            "training": {"num_train_steps": 1},
        }
    )


def tiny_dit(**changes):
    fields = {"depth": 2, "width": WIDTH, "num_heads": 4, "patch_size": 2, "num_classes": CLASSES}
    return DiT(**fields | {"out_channels": 6} | changes)


def adaln_zero_block():
    return DiTBlock(num_heads=4, mlp_ratio=4.0, modulation="adaln_zero", cross_attention=False, dtype=jnp.float32)


def condition(vector):
    return Condition(vector=vector, tokens=vector[:, None])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(module, *args, scale=0.1):
    """Returns variables of a module, every one of them random: no zero-initialised layer hides what is behind it."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), *args))
    return tree.unflatten([scale * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def inputs(batch=2, height=8, width=8, channels=3):
    return normal(batch, height, width, channels), jnp.arange(batch) * 100, jnp.arange(batch) % CLASSES


@functools.cache
def jitted(model):
    return jax.jit(model.apply)


# Size


@pytest.mark.parametrize(("name", "image_size"), PAPER)
def test_size_has_the_papers_parameters_and_gflops(name, image_size):
    parameters, gflops = PAPER[name, image_size]
    cost = describe_cost(paper_config(name, image_size))
    assert cost["parameters"] == (parameters or PAPER[name, 256][0]) == sum(cost["modules"].values())
    assert sum(cost["module_macs"].values()) == cost["macs"] and cost["module_macs"].keys() == cost["modules"].keys()
    # The table is rounded to 0.01, which is more than 0.5 % of the smallest models.
    np.testing.assert_allclose(cost["macs"] / 1e9, gflops, rtol=0.005, atol=0.005)
    size = dit_size(name)
    depth, D, p = size["depth"], size["width"], size["patch_size"]
    T = (image_size // 8 // p) ** 2
    blocks = depth * (12 * T * D**2 + 2 * T**2 * D + 6 * D**2)
    assert cost["module_macs"]["blocks"] == blocks
    assert cost["macs"] == blocks + T * 4 * p**2 * D + T * D * 8 * p**2 + 2 * D**2 + 256 * D + D**2


@pytest.mark.parametrize("block", PAPER_BLOCKS)
def test_block_has_the_papers_parameters_and_gflops(block):
    millions, gflops = PAPER_BLOCKS[block]
    cost = describe_cost(paper_config("XL/2", 256, (block,)))
    assert abs(cost["parameters"] / 1e6 - millions) < 1
    np.testing.assert_allclose(cost["macs"] / 1e9, gflops, rtol=0.005)


# Initialisation


@pytest.fixture(scope="module")
def initialised():
    """A DiT with one block of width 128, as it starts: the module and its parameters."""
    config = config_from_dict(
        {
            "stage": "diffusion",
            "data": {"name": "images", "image_size": 8, "num_classes": CLASSES},
            "dit": {"depth": 1, "width": 128, "num_heads": 4, "patch_size": 2},
            "training": {"num_train_steps": 1},
        }
    )
    return build_dit(config), jax.jit(lambda key: init_params(config, key))(jax.random.key(0))


def test_model_starts_at_zero(initialised):
    model, params = initialised
    args = inputs()
    assert not np.asarray(jitted(model)({"params": params}, *args)).any()


def test_block_starts_as_the_identity(initialised):
    _, params = initialised
    x, c = normal(2, 6, 128), condition(normal(2, 128, seed=1))
    block = adaln_zero_block()
    np.testing.assert_array_equal(block.apply({"params": params["blocks_0"]}, x, c), x)
    assert (block.apply(random_variables(block, x, c), x, c) != x).any()


def test_kernels_start_xavier_uniform_and_qkv_as_one_fused_matrix(initialised):
    _, params = initialised
    bounds = {
        ("blocks_0", "attn", "qkv"): math.sqrt(6 / (128 + 3 * 128)),
        ("blocks_0", "attn", "proj"): math.sqrt(6 / (128 + 128)),
        ("blocks_0", "mlp", "fc1"): math.sqrt(6 / (128 + 512)),
        ("blocks_0", "mlp", "fc2"): math.sqrt(6 / (128 + 512)),
        ("x_embedder",): math.sqrt(6 / (2 * 2 * 3 + 128)),  # the patch projection on its flattened view
    }
    for path, bound in bounds.items():
        layer = functools.reduce(lambda tree, name: tree[name], path, params)
        assert 0.98 * bound < abs(layer["kernel"]).max() <= bound, path
        assert not layer["bias"].any()


# Structure


@pytest.mark.parametrize("chunk", range(6))
def test_block_modulates_by_shift_scale_gate_of_attention_then_of_the_mlp(chunk):
    """The gates are open, and one chunk of the modulation at a time is not zero."""
    x, c = normal(2, 6, WIDTH), condition(np.zeros((2, WIDTH), np.float32))  # c = 0: the modulation is its bias
    block = adaln_zero_block()
    variables = random_variables(block, x, c)
    chunks = [np.zeros((1, 1, WIDTH), np.float32) for _ in range(6)]
    chunks[2] = chunks[5] = np.ones((1, 1, WIDTH), np.float32)
    chunks[chunk] = normal(1, 1, WIDTH, seed=chunk)
    params = variables["params"]
    params["adaLN_modulation"]["linear"]["bias"] = np.concatenate(chunks, axis=-1).reshape(-1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks
    attention, mlp = {"params": params["attn"]}, {"params": params["mlp"]}
    y = x + gate_a * SelfAttention(4).apply(attention, modulated_norm(x, shift_a, scale_a))
    y = y + gate_m * Mlp(4 * WIDTH).apply(mlp, modulated_norm(y, shift_m, scale_m))
    np.testing.assert_allclose(block.apply(variables, x, c), y, atol=1e-5)


def test_final_layer_modulates_by_shift_then_scale():
    x, c = normal(2, 6, WIDTH), condition(np.zeros((2, WIDTH), np.float32))
    layer = FinalLayer(7, "adaln_zero")
    variables = random_variables(layer, x, c)
    params = variables["params"]
    shift, scale = normal(1, 1, WIDTH, seed=1), normal(1, 1, WIDTH, seed=2)
    params["adaLN_modulation"]["linear"]["bias"] = np.concatenate([shift, scale], axis=-1).reshape(-1)
    expected = modulated_norm(x, shift, scale) @ params["linear"]["kernel"] + params["linear"]["bias"]
    np.testing.assert_allclose(layer.apply(variables, x, c), expected, atol=1e-5)


def test_patches_meet_in_attention_alone_and_the_output_lands_on_its_patch():
    """With the attention's projection at zero a changed patch changes itself only; with it, every patch."""
    model = tiny_dit()
    x, t, labels = inputs(batch=1, height=8, width=12)
    variables = random_variables(model, x, t, labels)
    changed = x.copy()
    changed[:, 4:6, 8:10] += 1  # the patch in row 2, column 4

    def changed_pixels(variables):
        return (jitted(model)(variables, changed, t, labels) != jitted(model)(variables, x, t, labels)).any(axis=-1)[0]

    assert changed_pixels(variables).all()
    for i in range(model.depth):
        projection = variables["params"][f"blocks_{i}"]["attn"]["proj"]
        projection["kernel"] = np.zeros_like(projection["kernel"])
    expected = np.zeros((8, 12), bool)
    expected[4:6, 8:10] = True
    np.testing.assert_array_equal(changed_pixels(variables), expected)


def test_equal_patches_are_told_apart_by_row_and_column():
    """Without attention a patch's output is of its content and position alone, whatever the image's size."""
    model = tiny_dit()
    x, t, labels = inputs(batch=1, height=8, width=8)
    x = np.ones_like(x)
    variables = random_variables(model, x, t, labels)
    for i in range(model.depth):
        projection = variables["params"][f"blocks_{i}"]["attn"]["proj"]
        projection["kernel"] = np.zeros_like(projection["kernel"])
    y = np.asarray(jitted(model)(variables, x, t, labels))
    patches = y.reshape(4, 2, 4, 2, -1).swapaxes(1, 2).reshape(16, -1)
    assert len(np.unique(patches.round(5), axis=0)) == 16
    wide = np.asarray(jitted(model)(variables, x[:, :4], t, labels))
    np.testing.assert_allclose(wide, y[:, :4], atol=1e-5)


# Conditioning


def test_output_depends_on_t_and_on_the_label_of_its_own_image_alone():
    model = tiny_dit()
    x, t, labels = inputs()
    variables = random_variables(model, x, t, labels)
    y = jitted(model)(variables, x, t, labels)
    for other in ((x, t.at[0].add(1), labels), (x, t, labels.at[0].add(1))):
        difference = abs(jitted(model)(variables, *other) - y).max(axis=(1, 2, 3))
        assert difference[0] > 1e-4 and difference[1] == 0


def test_null_class_has_a_row_of_its_own():
    model = tiny_dit()
    x = np.repeat(normal(1, 8, 8, 3), CLASSES + 1, axis=0)
    t, labels = jnp.zeros(CLASSES + 1, jnp.int32), jnp.arange(CLASSES + 1)
    variables = random_variables(model, x, t, labels)
    assert variables["params"]["y_embedder"]["embedding_table"].shape == (CLASSES + 1, WIDTH)
    y = np.asarray(jitted(model)(variables, x, t, labels)).reshape(CLASSES + 1, -1)
    assert len(np.unique(y.round(5), axis=0)) == CLASSES + 1


# Shape and dtype


@pytest.mark.parametrize(
    ("height", "width", "channels", "patch_size"), [(8, 8, 3, 2), (4, 12, 4, 4), (12, 4, 1, 1), (7, 7, 4, 1)]
)
def test_output_has_the_shape_of_any_input_and_its_own_channels(height, width, channels, patch_size):
    model = tiny_dit(depth=1, patch_size=patch_size, out_channels=2 * channels)
    args = inputs(2, height, width, channels)
    shapes = jax.eval_shape(model.init_with_output, jax.random.key(0), *args)
    assert shapes[0].shape == (2, height, width, 2 * channels) and shapes[0].dtype == jnp.float32


def test_bfloat16_is_close_to_float32_with_finite_gradients():
    args = inputs()
    full, half = (tiny_dit(depth=1, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = random_variables(full, *args)
    shapes = jax.eval_shape(half.init, jax.random.key(0), *args)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))  # master weights
    expected, y = jitted(full)(variables, *args), jitted(half)(variables, *args)
    assert y.dtype == jnp.float32
    error = float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))
    assert 0 < error < 0.01  # bfloat16 rounds to 2^-9 = 0.2 %; 0 would mean that the dtype is not used
    trace = str(jax.make_jaxpr(half.apply)(variables, *args))
    assert len(re.findall(r"bf16\[[\d,]*\] = dot_general", trace)) >= 4 * half.depth  # qkv, proj, fc1, fc2
    grads = jax.jit(jax.grad(lambda v: (half.apply(v, *args) ** 2).mean()))(variables)
    for leaf in jax.tree.leaves(grads):
        assert leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all()
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


def test_mlp_ratio_sets_the_hidden_width():
    args = inputs()
    sizes = {
        ratio: count_params(jax.eval_shape(tiny_dit(mlp_ratio=ratio).init, jax.random.key(0), *args))
        for ratio in (2.0, 4.0)
    }
    assert sizes[4.0] - sizes[2.0] == 2 * (2 * WIDTH * (2 * WIDTH) + 2 * WIDTH)  # two blocks; kernels and fc1's bias


# Ways of conditioning


@pytest.mark.parametrize("conditioning", [*((block,) for block in BLOCKS), ("adaln_zero", "cross_attention")])
def test_every_way_of_conditioning_brings_timestep_and_label_to_every_pixel(conditioning):
    model = tiny_dit(conditioning=conditioning)
    x, t, labels = inputs()
    variables = random_variables(model, x, t, labels)
    y = jitted(model)(variables, x, t, labels)
    assert y.shape == x.shape[:-1] + (6,)
    for other in ((x, t.at[0].add(1), labels), (x, t, labels.at[0].add(1))):
        difference = abs(jitted(model)(variables, *other) - y)
        assert difference[0].min() > 0 and difference[1].max() == 0


@pytest.mark.parametrize("conditioning", BLOCKS)
def test_model_without_classes_has_no_label_table_and_reads_no_labels(conditioning):
    model = tiny_dit(conditioning=(conditioning,), num_classes=None)
    x, t, labels = inputs()
    variables = random_variables(model, x, t, labels)
    assert "y_embedder" not in variables["params"]
    y = jitted(model)(variables, x, t, labels)
    np.testing.assert_array_equal(y, jitted(model)(variables, x, t, labels + 1))
    assert (y != jitted(model)(variables, x, t + 1, labels)).any()


@pytest.mark.parametrize("cross_attention", [False, True])
def test_block_attends_to_tokens_within_the_mask_alone(cross_attention):
    """Tokens reach a block by cross-attention, or in context with the mask on the sequence itself."""
    block = DiTBlock(num_heads=4, mlp_ratio=4.0, modulation="none", cross_attention=cross_attention, dtype=jnp.float32)
    x, tokens, present = normal(1, 6, WIDTH), jnp.asarray(normal(1, 3, WIDTH, seed=1)), jnp.array([[True, False, True]])

    def run(variables, tokens):
        if cross_attention:
            return block.apply(variables, x, Condition(vector=x[:, 0], tokens=tokens, mask=present))
        mask = jnp.concatenate([jnp.ones((1, 6), bool), present], axis=1)
        both = jnp.concatenate([x, tokens], axis=1)
        return block.apply(variables, both, Condition(vector=x[:, 0], tokens=tokens), mask)[:, :6]

    variables = random_variables(block, x, Condition(vector=x[:, 0], tokens=tokens), scale=0.3)
    y = run(variables, tokens)
    change = normal(WIDTH, seed=2)
    np.testing.assert_allclose(run(variables, tokens.at[0, 1].add(change)), y, atol=1e-5)
    assert abs(run(variables, tokens.at[0, 2].add(change)) - y).max() > 1e-2


# How it is computed


@pytest.mark.parametrize("scan_blocks", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
@pytest.mark.parametrize("conditioning", [("adaln_zero",), ("cross_attention", "in_context")])
def test_scan_and_remat_change_neither_output_nor_gradients(conditioning, remat, scan_blocks):
    plain = tiny_dit(conditioning=conditioning)
    variables, arguments = random_variables(plain, *inputs()), inputs()
    results = []
    for model in (plain, tiny_dit(conditioning=conditioning, remat=remat, scan_blocks=scan_blocks)):
        loss = lambda v, model=model: (model.apply(v, *arguments) ** 2).sum()  # noqa: E731
        results.append(jax.jit(jax.value_and_grad(loss))(variables))
        assert jax.tree.structure(model.init(jax.random.key(0), *arguments)) == jax.tree.structure(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * abs(b).max()), *results)


def saved_bytes(model, variables, arguments):
    """Returns what the backward pass needs of the forward pass: the arrays that its closure holds."""
    function = jax.eval_shape(lambda v: jax.vjp(lambda v: model.apply(v, *arguments), v)[1], variables)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(function))


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_each_remat_policy_keeps_less_than_the_one_before(scan_blocks):
    arguments = inputs(batch=8, height=16, width=16)
    variables = random_variables(tiny_dit(depth=4), *arguments)
    none, dots, full = (
        saved_bytes(tiny_dit(depth=4, remat=remat, scan_blocks=scan_blocks), variables, arguments)
        for remat in ("none", "dots", "full")
    )
    tokens, kept = 8 * 64 * WIDTH * 4, 3 + 1 + 4 + 1  # qkv, proj, fc1, fc2
    assert dots < 0.6 * none
    assert full < dots - 4 * (kept - 1) * tokens


def test_scanned_blocks_are_traced_once():
    arguments = inputs()
    variables = random_variables(tiny_dit(depth=6), *arguments)

    def gelus(**changes):
        return str(jax.make_jaxpr(tiny_dit(depth=6, **changes).apply)(variables, *arguments)).count("tanh")

    assert gelus() == 6 * gelus(scan_blocks=True)
