"""Where parameters live: what is large is split, what is small is not, and what is unknown is an error."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dit_jax.config import MeshConfig, config_from_dict
from dit_jax.models.build import abstract_params
from dit_jax.models.dit_sizes import dit_size
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.rules import MIN_SIZE, describe_shardings, param_sharding, tree_shardings
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.state import abstract_state

REPLICATED = PartitionSpec()


def run_config(**sections):
    return config_from_dict(
        {"data": {"name": "images", "image_size": 32}, "training": {"num_train_steps": 10}} | sections
    )


DIT = run_config(stage="diffusion", dit={"depth": 2, "width": 128, "num_heads": 4, "patch_size": 2})
CONFIGS = {
    "dit": DIT,
    "dit XL/4": run_config(stage="diffusion", dit=dit_size("XL/4"), latents={"shape": (32, 32, 4)}),
    "dit XL/8": run_config(stage="diffusion", dit=dit_size("XL/8"), latents={"shape": (32, 32, 4)}),
    "kl-f8": run_config(stage="autoencoder"),
    "kl-f16": run_config(
        stage="autoencoder",
        autoencoder={"channel_multipliers": (1, 1, 2, 2, 4), "attention_levels": (4,), "latent_channels": 16},
    ),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=8))


@pytest.fixture(scope="module")
def tensor_mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_large_parameter_is_split_over_fsdp_and_every_small_one_replicated(name, mesh):
    params = abstract_params(CONFIGS[name])
    shardings, shapes = by_path(tree_shardings(params, mesh)), by_path(params)
    assert set(shardings) == set(shapes)
    num_split = 0
    for path, leaf in shapes.items():
        shard = shardings[path].shard_shape(leaf.shape)
        is_large = math.prod(leaf.shape) >= MIN_SIZE
        assert math.prod(shard) * (8 if is_large else 1) == math.prod(leaf.shape), path
        assert is_large or shardings[path].spec == REPLICATED, path
        num_split += is_large
    assert num_split >= 10


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("blocks_0/attn/qkv/kernel", (128, 3, 128), PartitionSpec("fsdp", None, None)),
        ("blocks_0/adaLN_modulation/linear/kernel", (128, 768), PartitionSpec("fsdp", None)),
        ("x_embedder/kernel", (256, 384), PartitionSpec(None, "fsdp")),
        ("blocks_0/cross_attn/q/kernel", (384, 384), PartitionSpec("fsdp", None)),
        ("y_embedder/embedding_table", (1001, 128), PartitionSpec(None, "fsdp")),  # 1001 rows divide by nothing
        ("encoder/down_0_block_0/conv1/kernel", (3, 3, 128, 128), PartitionSpec(None, None, "fsdp", None)),
        ("encoder/mid/attn_1/q/kernel", (1, 1, 512, 512), PartitionSpec(None, None, "fsdp", None)),
        ("encoder/mid/attn_1/proj_out/kernel", (1, 1, 512, 512), PartitionSpec(None, None, None, "fsdp")),
    ],
)
def test_rule_of_a_parameter_holds_wherever_its_path_starts(path, shape, spec, mesh):
    for prefix in ("", "ema_params/", "opt_state/0/mu/"):
        assert param_sharding(prefix + path, shape, mesh) == NamedSharding(mesh, spec)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        # By outputs, then by inputs: between the two a device needs nothing of another's heads or hidden units.
        ("blocks_0/attn/qkv/kernel", (128, 3, 128), ("fsdp", None, "tensor")),
        ("blocks_0/attn/proj/kernel", (256, 128), ("tensor", "fsdp")),
        ("blocks_0/cross_attn/q/kernel", (256, 256), ("fsdp", "tensor")),
        ("blocks_0/cross_attn/kv/kernel", (128, 2, 128), ("fsdp", None, "tensor")),
        ("blocks_0/cross_attn/proj/kernel", (256, 256), ("tensor", "fsdp")),
        ("blocks_0/mlp/fc1/kernel", (128, 512), ("fsdp", "tensor")),
        ("blocks_0/mlp/fc2/kernel", (512, 128), ("tensor", "fsdp")),
        ("t_embedder/mlp_0/kernel", (256, 128), ("fsdp", "tensor")),
        ("t_embedder/mlp_2/kernel", (256, 256), ("tensor", "fsdp")),
        ("blocks_0/adaLN_modulation/linear/kernel", (128, 768), ("fsdp", "tensor")),
        ("final_layer/adaLN_modulation/linear/kernel", (128, 256), ("fsdp", "tensor")),
        ("final_layer/linear/kernel", (1152, 32), ("fsdp", None)),
        ("x_embedder/kernel", (768, 64), (None, "fsdp")),
        ("y_embedder/embedding_table", (1001, 128), (None, "fsdp")),
        ("decoder/up_0_block_0/conv1/kernel", (3, 3, 128, 64), (None, None, "fsdp", "tensor")),
        ("decoder/up_0_block_0/conv2/kernel", (3, 3, 64, 64), (None, None, "tensor", "fsdp")),
        ("decoder/conv_in/kernel", (3, 3, 16, 512), (None, None, None, "fsdp")),
        ("encoder/conv_out/kernel", (3, 3, 512, 8), (None, None, "fsdp", None)),
        ("encoder/mid/attn_1/k/kernel", (1, 1, 256, 256), (None, None, "fsdp", None)),
        ("encoder/mid/attn_1/v/kernel", (1, 1, 256, 256), (None, None, "fsdp", "tensor")),
        ("encoder/mid/attn_1/proj_out/kernel", (1, 1, 256, 256), (None, None, "tensor", "fsdp")),
    ],
)
def test_tensor_has_one_side_of_a_kernel_and_fsdp_the_other(path, shape, spec, tensor_mesh):
    for prefix in ("", "ema_params/", "opt_state/0/mu/"):
        assert param_sharding(prefix + path, shape, tensor_mesh).spec == PartitionSpec(*spec)


def test_a_config_adds_rules_and_its_own_come_first(tensor_mesh):
    rules = (("my_layer/kernel", ("tensor", None)), (r"fc\d/kernel", (None, "fsdp")))
    mesh = MeshConfig(rules=rules)
    assert param_sharding("my_layer/kernel", (256, 128), tensor_mesh, mesh.rules).spec == PartitionSpec("tensor", None)
    assert param_sharding("mlp/fc1/kernel", (256, 128), tensor_mesh, mesh.rules).spec == PartitionSpec(None, "fsdp")
    others = param_sharding("attn/proj/kernel", (256, 128), tensor_mesh, mesh.rules)
    assert others.spec == PartitionSpec("tensor", "fsdp")
    config = dataclasses.replace(DIT, mesh=mesh)
    state = abstract_state(config, make_optimizer(config.optimizer, 10), tensor_mesh)
    kernels = [leaf for path, leaf in by_path(state).items() if path.endswith("blocks_1/mlp/fc1/kernel")]
    assert [kernel.sharding.spec for kernel in kernels] == [PartitionSpec(None, "fsdp")] * 4


def test_axes_are_those_of_the_last_dimensions(tensor_mesh):
    spec = param_sharding("blocks/mlp/fc1/kernel", (2, 128, 512), tensor_mesh).spec
    assert spec == PartitionSpec(None, "fsdp", "tensor")
    with pytest.raises(ValueError, match=r"fc1/kernel \(65536,\) has fewer dimensions than the axes .* of its rule"):
        param_sharding("blocks_0/mlp/fc1/kernel", (65536,), tensor_mesh)


@pytest.mark.parametrize(
    "path",
    ["blocks_0/attn/qkv/bias", "some_layer/kernel", "my_qkv/kernel", "qkv/kernel/extra", "embedding_table/scale"],
)
def test_large_parameter_that_no_rule_names_is_an_error(path, mesh):
    with pytest.raises(ValueError, match=re.escape(f"no sharding rule matches the parameter {path} (256, 128)")):
        param_sharding(path, (256, 128), mesh)


@pytest.mark.parametrize("shape", [(), (1,), (MIN_SIZE - 1,), (3, 5, 7)])
def test_small_parameter_is_replicated_whatever_its_name(shape, mesh):
    assert param_sharding("some_layer/anything", shape, mesh).spec == REPLICATED


def test_dimension_that_fsdp_does_not_divide_is_an_error(mesh):
    with pytest.raises(ValueError) as error:
        param_sharding("blocks_0/mlp/fc1/kernel", (1001, 64), mesh)
    assert str(error.value).startswith(
        "blocks_0/mlp/fc1/kernel (1001, 64): 1001 must be divisible by config.mesh.fsdp=8;"
    )
    param_sharding("blocks_0/mlp/fc1/kernel", (1000, 64), mesh)


def test_moments_and_averages_live_with_their_parameters(mesh):
    config = DIT
    state = abstract_state(config, make_optimizer(config.optimizer, config.training.num_train_steps), mesh)
    params = by_path(state.params)
    assert any(leaf.sharding.spec != REPLICATED for leaf in params.values())
    followers = {path: leaf for path, leaf in by_path(state).items() if not path.startswith("params/")}
    for path, parameter in params.items():
        copies = [leaf for name, leaf in followers.items() if name.endswith(f"/{path}")]
        assert len(copies) == 3, path  # two moments and the average
        for copy in copies:
            assert (copy.shape, copy.sharding) == (parameter.shape, parameter.sharding), path
    counters = {path: leaf for path, leaf in followers.items() if not leaf.shape}
    assert "step" in counters and len(followers) == 3 * len(params) + len(counters)
    assert all(leaf.sharding.spec == REPLICATED for leaf in counters.values())


def test_arrays_can_be_placed_by_the_rules(mesh):
    """Each device holds an eighth of a split kernel, and the parts make the whole."""
    shapes = abstract_params(DIT)["blocks_0"]
    params = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32), shapes)
    placed = jax.device_put(params, tree_shardings(params, mesh))
    kernel = placed["attn"]["qkv"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 3, 128)}
    jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_description_lists_what_is_split(mesh):
    params = abstract_params(DIT)
    description = describe_shardings(params, mesh)
    assert description["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    large = {path for path, leaf in by_path(params).items() if math.prod(leaf.shape) >= MIN_SIZE}
    assert set(description["split"]) == large
    assert description["split"]["blocks_1/mlp/fc1/kernel"] == "('fsdp', None)"
    assert description["split"]["blocks_1/mlp/fc2/kernel"] == "(None, 'fsdp')"


def test_one_device_holds_everything():
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    params = abstract_params(DIT)
    shapes = by_path(params)
    for path, sharding in by_path(tree_shardings(params, mesh)).items():
        assert sharding.shard_shape(shapes[path].shape) == shapes[path].shape
