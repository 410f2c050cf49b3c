"""Linear, attention, MLP and modulation against explicit formulas in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu import splash_attention

from dit_jax.config import MeshConfig
from dit_jax.nn.attention import SelfAttention, attend
from dit_jax.nn.linear import Linear
from dit_jax.nn.mlp import Mlp
from dit_jax.nn.modulation import Modulation, modulated_norm
from dit_jax.parallel.mesh import make_mesh, replicated, traced_on

WIDTH = 16


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_variables(module, *args, scale=0.3):
    """Returns variables of a module, every one of them random, so that no term is hidden by a zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([scale * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_linear_is_x_kernel_plus_bias_over_the_last_axis(leading):
    x, module = normal(*leading, WIDTH), Linear(7)
    variables = random_variables(module, x)
    y = module.apply(variables, x)
    assert y.shape == (*leading, 7)
    np.testing.assert_allclose(y, linear(float64(variables["params"]), x.astype(np.float64)), atol=1e-5)


def test_linear_computes_in_its_dtype_from_float32_parameters():
    x, module = normal(4, WIDTH), Linear(7, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert module.apply(variables, x).dtype == jnp.bfloat16


def test_linear_starts_xavier_uniform_with_zero_bias():
    params = Linear(300).init(jax.random.key(0), normal(1, 200))["params"]
    bound = math.sqrt(6 / (200 + 300))
    assert 0.99 * bound < abs(params["kernel"]).max() <= bound
    np.testing.assert_allclose(params["kernel"].std(), bound / math.sqrt(3), rtol=0.02)  # of a uniform distribution
    assert not params["bias"].any()


def test_attention_is_softmax_of_scaled_products_head_by_head():
    heads, tokens = 4, 5
    x, module = normal(2, tokens, WIDTH), SelfAttention(heads)
    variables = random_variables(module, x)
    params, head_width = float64(variables["params"]), WIDTH // heads
    qkv = {"kernel": params["qkv"]["kernel"].reshape(WIDTH, -1), "bias": params["qkv"]["bias"].reshape(-1)}
    q, k, v = np.split(linear(qkv, x.astype(np.float64)), 3, axis=-1)
    attended = np.zeros((2, tokens, WIDTH))
    for head in range(heads):
        part = slice(head * head_width, (head + 1) * head_width)
        logits = q[..., part] @ k[..., part].swapaxes(1, 2) / math.sqrt(head_width)
        weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        attended[..., part] = weights @ v[..., part]
    np.testing.assert_allclose(module.apply(variables, x), linear(params["proj"], attended), atol=1e-5)


def test_attention_is_equivariant_to_permutations_of_tokens():
    x, module = normal(2, 6, WIDTH), SelfAttention(4)
    variables, order = random_variables(module, x), np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(
        module.apply(variables, x[:, order]), module.apply(variables, x)[:, order], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("queries", "keys", "masked", "mesh"),
    [(128, 128, False, None), (66, 130, True, None), (256, 256, False, MeshConfig(data=2, tensor=2, sequence=2))],
)
def test_flash_attention_equals_xlas(queries, keys, masked, mesh, monkeypatch):
    interpreted = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)  # there is no TPU
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", interpreted)
    mask = np.arange(keys) % 3 > np.arange(2)[:, None] if masked else None
    inputs = [normal(2, tokens, 2, 72, seed=i) for i, tokens in enumerate((queries, keys, keys))]
    weights = normal(2, queries, 2 * 72)

    def values_and_gradients(implementation):
        total = lambda *qkv: (attend(*qkv, mask, implementation) * weights).sum()  # noqa: E731
        function, arrays = jax.value_and_grad(total, argnums=(0, 1, 2)), inputs
        if mesh is not None:
            devices = make_mesh(mesh)
            function, arrays = traced_on(devices, function), jax.device_put(inputs, replicated(devices))
        return jax.jit(function)(*arrays)

    # Sums over up to 256 keys in another order: a few times float32's 1e-7 of values up to 5.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
        values_and_gradients("flash"),
        values_and_gradients("xla"),
    )


@pytest.mark.parametrize(("keys", "masked"), [(256, False), (258, True)])
def test_cudnn_attention_is_lowered_for_gpus(keys, masked, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)  # there is no GPU
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    qkv = [jax.ShapeDtypeStruct((4, tokens, 16, 72), jnp.bfloat16) for tokens in (256, keys, keys)]
    mask = jnp.ones((4, keys), bool) if masked else None
    total = lambda *qkv: attend(*qkv, mask, "cudnn").astype(jnp.float32).sum()  # noqa: E731
    program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()
    assert "fmhaSoftmaxBackward" in program or "__cudnn$fmha" in program


def test_mlp_is_linear_tanh_gelu_linear():
    x, module = normal(2, 3, WIDTH), Mlp(hidden=40)
    variables = random_variables(module, x)
    params = float64(variables["params"])
    hidden = linear(params["fc1"], x.astype(np.float64))
    hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    assert hidden.shape == (2, 3, 40)
    np.testing.assert_allclose(module.apply(variables, x), linear(params["fc2"], hidden), atol=1e-5)


def test_modulation_starts_at_zero():
    c, module = normal(2, WIDTH), Modulation(6)
    outputs = module.apply(module.init(jax.random.key(0), c), c)
    assert [output.shape for output in outputs] == [(2, 1, WIDTH)] * 6
    assert not np.asarray(outputs).any()


def test_modulation_is_linear_of_silu_split_in_order():
    c, module = normal(2, WIDTH), Modulation(3)
    variables = random_variables(module, c)
    expected = linear(float64(variables["params"])["linear"], silu(c.astype(np.float64)))
    for i, output in enumerate(module.apply(variables, c)):
        np.testing.assert_allclose(output[:, 0], expected[:, i * WIDTH : (i + 1) * WIDTH], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_without_modulation_has_mean_0_and_variance_1_in_float32(dtype):
    x = jnp.asarray(3 + 5 * normal(2, 4, 256), dtype)
    y = modulated_norm(x, jnp.zeros((2, 1, 256)), jnp.zeros((2, 1, 256)))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(axis=-1), 1, atol=1e-4)


def test_modulated_norm_scales_by_one_plus_scale_then_shifts():
    x, shift, scale = normal(2, 4, WIDTH), normal(2, 1, WIDTH, seed=1), normal(2, 1, WIDTH, seed=2)
    x = 1e-3 * x  # so small that the norm's epsilon counts
    x_64 = x.astype(np.float64)
    mean, variance = x_64.mean(axis=-1, keepdims=True), x_64.var(axis=-1, keepdims=True)
    expected = (x_64 - mean) / np.sqrt(variance + 1e-6) * (1 + scale) + shift
    np.testing.assert_allclose(modulated_norm(x, shift, scale), expected, atol=1e-5)
