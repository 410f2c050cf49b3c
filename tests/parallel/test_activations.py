"""Activations on the mesh: what a block exchanges between devices, and that one device does nothing for it."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.config import MeshConfig
from dit_jax.models.dit import Condition, DiTBlock
from dit_jax.nn.constraints import BATCH, axis_size, constrain
from dit_jax.nn.resnet import AttentionBlock, ConditionedResBlock, ResBlock, halved
from dit_jax.nn.spatial_attention import SpatialAttention, SpatialTransformer
from dit_jax.parallel.mesh import make_mesh, replicated, traced_on
from dit_jax.parallel.rules import tree_shardings

BATCH_SIZE, TOKENS, WIDTH = 4, 64, 256
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def block_and_inputs():
    """Returns a function of (params, x, c) and abstract arguments; every kernel is large enough to be split."""
    block = DiTBlock(num_heads=4, mlp_ratio=4.0, modulation="adaln_zero", cross_attention=False, dtype=jnp.float32)

    def apply(params, x, c):
        return block.apply({"params": params}, x, Condition(c, None))

    x, c = (jax.ShapeDtypeStruct((BATCH_SIZE, *shape, WIDTH), jnp.float32) for shape in ((TOKENS,), ()))
    init = lambda x, c: block.init(jax.random.key(0), x, Condition(c, None))["params"]  # noqa: E731
    return apply, jax.eval_shape(init, x, c), x, c


def collectives(config, num_devices):
    """Returns how often one block's forward pass exchanges what: {(collective, shape): times}."""
    mesh = make_mesh(config, jax.devices()[:num_devices])
    apply, params, x, c = block_and_inputs()
    tokens = NamedSharding(mesh, PartitionSpec(BATCH, "sequence"))
    vector = NamedSharding(mesh, PartitionSpec(BATCH))
    shardings = tree_shardings(params, mesh), tokens, vector
    step = jax.jit(traced_on(mesh, apply), in_shardings=shardings, out_shardings=tokens)
    program = step.lower(params, x, c).compile().as_text()
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* ({'|'.join(COLLECTIVES)})\(", program)
    shapes = [(kind, tuple(size for size in map(int, shape.split(",")) if size > 1)) for shape, kind in found]
    return collections.Counter(shapes)


def test_tensor_exchanges_the_sums_of_two_row_wise_kernels_and_the_modulation():
    assert collectives(MeshConfig(data=1, tensor=2), 2) == {
        ("all-reduce", (BATCH_SIZE, TOKENS, WIDTH)): 2,
        ("all-gather", (BATCH_SIZE, 6 * WIDTH)): 1,
    }


def test_sequence_exchanges_keys_and_values_alone():
    assert collectives(MeshConfig(data=1, sequence=4), 4) == {("all-gather", (BATCH_SIZE, TOKENS, 4, WIDTH // 4)): 2}


def test_fsdp_gathers_kernels_and_no_activation():
    found = collectives(MeshConfig(data=1, fsdp=4), 4)
    assert {kind for kind, _ in found} == {"all-gather"}
    sizes = sorted(int(np.prod(shape)) // WIDTH**2 for _, shape in found.elements())
    assert sizes == [1, 3, 4, 4, 6]  # proj, qkv, fc1, fc2, modulation


def test_one_device_and_no_mesh_run_the_same_program():
    apply, *args = block_and_inputs()
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    programs = [str(jax.make_jaxpr(function)(*args)) for function in (apply, traced_on(one, apply))]
    assert programs[0] == programs[1] and "sharding_constraint" not in programs[0]
    split = make_mesh(MeshConfig(data=4, tensor=2))
    assert "sharding_constraint" in str(jax.make_jaxpr(traced_on(split, apply))(*args))


def test_what_the_axes_do_not_divide_is_left_whole():
    mesh, specs = make_mesh(MeshConfig(data=2, sequence=4)), {}
    for shape in ((4, 8), (4, 6), (3, 8), (3, 6)):
        program = jax.make_jaxpr(traced_on(mesh, lambda x: constrain(x, (BATCH, "sequence"))))(jnp.zeros(shape))
        specs[shape] = program.eqns[0].params["sharding"].spec
    assert specs == {
        (4, 8): PartitionSpec("data", "sequence"),
        (4, 6): PartitionSpec("data", None),
        (3, 8): PartitionSpec(None, "sequence"),
        (3, 6): PartitionSpec(None, None),
    }
    assert traced_on(mesh, axis_size)("data", "sequence", "tensor") == 8 and axis_size("data") == 1


@pytest.mark.parametrize(
    "config", [MeshConfig(data=1, sequence=8), MeshConfig(data=2, tensor=4), MeshConfig(data=2, tensor=2, sequence=2)]
)
@pytest.mark.parametrize(
    ("module", "shapes"),  # of what it reads beside the image
    [
        (ResBlock(64, 8), ()),
        (AttentionBlock(8), ()),
        (ConditionedResBlock(64, 8), ((2, 16),)),
        (ConditionedResBlock(64, 8, scale_shift=True, resize=halved), ((2, 16),)),
        (SpatialAttention(4, 8), ()),
        (SpatialTransformer(1, 4, 8), ((2, 3, 16),)),
    ],
    ids=["res", "attention", "conditioned-res", "halving-res", "spatial-attention", "transformer"],
)
def test_a_convolutional_block_of_split_rows_and_channels_is_that_of_one_device(module, shapes, config):
    rng = np.random.default_rng(0)
    x, *others = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 16, 8, 64), *shapes))
    leaves, tree = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), x, *others))
    variables = tree.unflatten([0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    loss = lambda variables: (module.apply(variables, x, *others) ** 2).mean()  # noqa: E731
    mesh = make_mesh(config)
    expected, expected_gradients = jax.jit(jax.value_and_grad(loss))(variables)
    on_mesh = jax.device_put(variables, replicated(mesh))  # else the program would be of one device, and split nothing
    found, gradients = jax.jit(traced_on(mesh, jax.value_and_grad(loss)))(on_mesh)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, expected_gradients)
