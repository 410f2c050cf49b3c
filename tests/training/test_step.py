"""The update: averages, meshes, randomness, compilation."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from dit_jax.config import MeshConfig, config_from_dict, config_to_dict, load_config
from dit_jax.models.build import init_params
from dit_jax.parallel.mesh import batch_sharding, make_mesh, put_batch, traced_on
from dit_jax.parallel.rules import MIN_SIZE
from dit_jax.training.autoencoder_step import make_autoencoder_gradients, make_observe
from dit_jax.training.classifier_step import make_classifier_loss
from dit_jax.training.diffusion_step import make_diffusion_eval, make_diffusion_loss
from dit_jax.training.optimizer import make_optimizer, make_schedule
from dit_jax.training.state import LossState, TrainState, create_state
from dit_jax.training.step import Loss, gradients_of, jit_train_step, make_eval_step, make_train_step
from tests.tiny import autoencoder_config, dit_config

ROOT = pathlib.Path(__file__).parents[2]
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2 x fsdp 2 x tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence 4 x data 2": MeshConfig(data=2, sequence=4),
}


QUADRATIC = Loss(
    lambda batch, key: None,
    lambda params, batch, draws, constants: {"loss": ((params["w"] - batch["target"]) ** 2).sum(axis=-1)},
)


def random_batches(num_steps: int, batch_size: int = 8, **shapes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    """Returns batches of labels and of uniform arrays, by default of images [8, 8, 1]."""
    rng, shapes = np.random.default_rng(0), shapes or {"image": (8, 8, 1)}
    return [
        {name: rng.uniform(-1, 1, (batch_size, *shape)).astype(np.float32) for name, shape in shapes.items()}
        | {"label": rng.integers(0, 3, batch_size).astype(np.int32)}
        for _ in range(num_steps)
    ]


def run(config, mesh, num_steps: int, **shapes: tuple[int, ...]) -> tuple[TrainState, list[float]]:
    optimizer = make_optimizer(config.optimizer, config.training.num_train_steps)
    state = create_state(config, optimizer, mesh)
    is_autoencoder = config.stage == "autoencoder"
    gradient_fn = make_autoencoder_gradients(config) if is_autoencoder else gradients_of(make_diffusion_loss(config))
    observe = make_observe(config) if is_autoencoder else None
    train_step = make_train_step(gradient_fn, optimizer, config.training.ema_decay, config.seed, observe=observe)
    step_fn = jit_train_step(train_step, state)
    losses = []
    for batch in random_batches(num_steps, **shapes):
        state, metrics = step_fn(state, put_batch(batch, mesh, 8))
        losses.append(float(metrics["loss"]))
    assert step_fn._cache_size() == 1  # compiled once a run
    return state, losses


@pytest.fixture(scope="module", params=["autoencoder", "diffusion"])
def unsharded(request, tmp_path_factory):
    """A config, wide enough that its largest kernels pass the size from which parameters are split, and its run."""
    make = {"autoencoder": autoencoder_config, "diffusion": dit_config}[request.param]
    config = make(tmp_path_factory.mktemp("unused"))
    if request.param == "diffusion":
        config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, width=128, num_heads=4))
    else:
        autoencoder = dataclasses.replace(config.autoencoder, base_channels=64)
        config = dataclasses.replace(config, autoencoder=autoencoder)
    one_device = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    return config, run(config, one_device, 20)


@pytest.mark.parametrize("mesh_name", MESHES)
def test_losses_do_not_depend_on_the_mesh(unsharded, mesh_name):
    config, (_, losses) = unsharded
    _, sharded_losses = run(config, make_mesh(MESHES[mesh_name]), 20)
    # The same arithmetic in another order of summation: measured 3e-7 (DiT) and 4e-7 (autoencoder), not growing.
    np.testing.assert_allclose(sharded_losses, losses, rtol=2e-6)


BOTH = MeshConfig(data=2, tensor=2, sequence=2)


@functools.cache
def quick_start_run(name: str, mesh: MeshConfig) -> tuple[TrainState, list[float]]:
    """Returns three steps of a quick start's config."""
    overrides = [("latents.scale", "1.0")] if name.endswith("dit") else []
    shapes = {"moments": (7, 7, 12)} if name.endswith("dit") else {"image": (28, 28, 1)}
    config = load_config(str(ROOT / "configs" / f"{name}.py"), overrides)
    return run(config, make_mesh(mesh, jax.devices()[:1] if mesh.data == 1 else None), 3, **shapes)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("fashion_mnist_autoencoder", MESHES["sequence 4 x data 2"]),
        ("fashion_mnist_autoencoder", MESHES["data 2 x fsdp 2 x tensor 2"]),
        ("fashion_mnist_autoencoder", BOTH),
        ("fashion_mnist_dit", BOTH),
    ],
)
def test_the_quick_start_trains_alike_on_axes_that_do_not_divide_it(name, mesh):
    """Its one head, 49 tokens, 14 and 7 rows are left whole by an axis that does not divide them."""
    state, losses = quick_start_run(name, MeshConfig(data=1))
    sharded_state, sharded_losses = quick_start_run(name, mesh)
    np.testing.assert_allclose(sharded_losses, losses, rtol=2e-6)
    # Adam's first moments are sums of the gradients. Of some the true value is zero: the bias of a channel that a norm
    # has for itself.
    gradients, sharded_gradients = (optax.tree.get(s.opt_state, "mu") for s in (state, sharded_state))
    smallest = 1e-6 * max(abs(x).max() for x in jax.tree.leaves(gradients))
    for found, expected in zip(*map(jax.tree.leaves, (sharded_gradients, gradients)), strict=True):
        np.testing.assert_allclose(found, expected, atol=max(1e-4 * abs(expected).max(), smallest))


@pytest.mark.parametrize("mesh_name", MESHES)
def test_noise_has_the_same_bits_on_any_mesh(mesh_name):
    mesh = make_mesh(MESHES[mesh_name])

    def draw(step):
        t_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
        return jax.random.randint(t_key, (8,), 0, 1000), jax.random.normal(noise_key, (8, 7, 7, 6))

    sharded = jax.jit(draw, out_shardings=batch_sharding(mesh))(3)
    for drawn, expected in zip(sharded, jax.jit(draw)(3), strict=True):
        assert np.asarray(drawn).tobytes() == np.asarray(expected).tobytes()


def test_with_fsdp_and_tensor_no_device_holds_a_large_parameter_and_heads_stay_whole(unsharded):
    config, _ = unsharded
    mesh = make_mesh(MESHES["data 2 x fsdp 2 x tensor 2"])
    state = create_state(config, make_optimizer(config.optimizer, 1), mesh)
    for array in jax.tree.leaves(state):
        assert array.size < MIN_SIZE or array.addressable_shards[0].data.size == array.size // 4
    if config.stage == "autoencoder":
        return
    kernel, head_width = state.params["blocks_0"]["attn"]["qkv"]["kernel"], 128 // 4
    for shard in kernel.addressable_shards:
        assert shard.data.shape == (64, 3, 2 * head_width)  # half of the rows; of q, k and v two of the four heads


def test_a_large_parameter_its_moments_and_its_average_are_split_over_fsdp(unsharded):
    config, _ = unsharded
    mesh = make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=8))
    state = create_state(config, make_optimizer(config.optimizer, 1), mesh)
    large = [x for x in jax.tree.leaves(state) if x.size >= 2**15]
    assert len(large) >= 4 * 4  # four kernels or more, with two moments and an average each
    for array in large:
        assert array.addressable_shards[0].data.size == array.size // 8


def test_ema_follows_updated_params():
    optimizer, decay = optax.sgd(0.1), 0.9
    params = {"w": jnp.zeros(2)}
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params)
    batch = {"target": jnp.ones((4, 2))}
    expected = np.zeros(2)
    step_fn = jax.jit(make_train_step(gradients_of(QUADRATIC), optimizer, decay, seed=0))
    for _ in range(5):
        state, _ = step_fn(state, batch)
        expected = decay * expected + (1 - decay) * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema_params["w"], expected, rtol=1e-6)


def test_randomness_differs_between_steps_and_is_a_function_of_seed_and_step():
    noise_loss = Loss(
        lambda batch, key: jax.random.normal(key, (4,)),
        lambda params, batch, noise, constants: {"loss": noise + 0.0 * params["w"].sum()},
    )
    optimizer, params = optax.sgd(0.0), {"w": jnp.zeros(2)}

    def losses(seed, start):
        state = TrainState(jnp.int32(start), params, optimizer.init(params), None)
        step_fn = jax.jit(make_train_step(gradients_of(noise_loss), optimizer, None, seed))
        values = []
        for _ in range(3):
            state, metrics = step_fn(state, {})
            values.append(float(metrics["loss"]))
        return values

    from_zero = losses(seed=1, start=0)
    assert len(set(from_zero)) == 3
    assert losses(seed=1, start=1)[:2] == from_zero[1:]
    assert losses(seed=2, start=0) != from_zero


def test_eval_step_leaves_padding_out():
    eval_step = make_eval_step(lambda params, batch, constants: {"value": batch["value"]})
    sums = eval_step({}, {"value": jnp.array([1.0, 2.0, jnp.nan]), "mask": jnp.array([1.0, 1.0, 0.0])})
    assert float(sums["value"]) == 3.0
    assert float(sums["count"]) == 2.0


def test_held_out_loss_does_not_depend_on_the_batch(tmp_path):
    config = dit_config(tmp_path)
    mesh = make_mesh(config.mesh)
    state = create_state(config, make_optimizer(config.optimizer, 1), mesh)
    batch = random_batches(1)[0] | {"index": np.arange(8, dtype=np.int32)}
    evaluate = jax.jit(lambda params, batch: make_diffusion_eval(config)(params, batch, None))
    whole = evaluate(state.params, batch)["loss"]
    halves = [
        evaluate(state.params, {name: x[part] for name, x in batch.items()})["loss"] for part in (slice(4), slice(4, 8))
    ]
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-5)  # other shapes, other order of sums


def test_cosine_schedule_warms_up_and_ends_at_zero(tmp_path):
    optimizer = dataclasses.replace(dit_config(tmp_path).optimizer, schedule="cosine", warmup_steps=10)
    schedule = make_schedule(optimizer, 100)
    assert float(schedule(0)) == 0.0
    assert float(schedule(10)) == pytest.approx(optimizer.learning_rate)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-12)


def test_gradients_of_parts_add_up_to_those_of_the_batch():
    optimizer, params = optax.sgd(0.1), {"w": jnp.zeros(2)}
    batch = {"target": jnp.arange(24.0).reshape(12, 2)}
    states = []
    for parts in (1, 4):
        state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None)
        step_fn = jax.jit(make_train_step(gradients_of(QUADRATIC, parts), optimizer, None, seed=0))
        states.append(step_fn(state, batch))
    (whole, metrics), (accumulated, accumulated_metrics) = states
    np.testing.assert_allclose(accumulated.params["w"], whole.params["w"], rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(accumulated_metrics[name], value, rtol=1e-6)


@pytest.mark.parametrize("mesh_name", [None, "data 8", "data 2 x fsdp 2 x tensor 2"])
def test_every_row_of_a_batch_has_the_same_noise_in_any_number_of_parts(mesh_name):
    noise_loss = Loss(
        lambda batch, key: {"noise": jax.random.normal(key, (16, 3))},
        lambda params, batch, draws, constants: {"loss": params["w"][batch["row"]] * draws["noise"].sum(axis=-1)},
    )

    def gradients(parts):
        state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(16)}, None, None)
        batch, fn = {"row": np.arange(16)}, gradients_of(noise_loss, parts)
        if mesh_name:
            mesh = make_mesh(MESHES[mesh_name])
            batch, fn = put_batch(batch, mesh, 16), traced_on(mesh, fn)
        return jax.jit(fn)(state, batch, jax.random.key(3), None).params["w"]

    whole = jax.random.normal(jax.random.key(3), (16, 3)).sum(axis=-1) / 16
    for parts in (1, 2, 4):
        np.testing.assert_allclose(gradients(parts), whole, rtol=1e-6)


def test_a_batch_and_its_noise_are_split_into_parts_where_they_lie():
    mesh = make_mesh(MESHES["data 2 x fsdp 2 x tensor 2"])
    loss = Loss(
        lambda batch, key: jax.random.normal(key, (16, 8)),
        lambda params, batch, noise, constants: {"loss": ((params["w"] * batch["x"] - noise) ** 2).mean(axis=1)},
    )
    batch = put_batch({"x": np.ones((16, 8), np.float32)}, mesh, 16)
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(())}, None, None)
    step_fn = jax.jit(traced_on(mesh, gradients_of(loss, 4)))
    program = step_fn.lower(state, batch, jax.random.key(0), None).compile().as_text()
    assert not re.search(r" (all-gather|all-to-all|collective-permute)\(", program)
    assert "f32[16,8]" not in program  # no device draws all of the noise


STAGES = ("label", "captions", "classifier", "latents", "unet", "autoencoder")


def staged(stage, folder):
    """Returns a config of a stage, and the arrays of its batches."""
    values = config_to_dict(autoencoder_config(folder) if stage == "autoencoder" else dit_config(folder))
    shapes = {"image": (8, 8, 1)}
    if stage == "classifier":
        values |= {"stage": stage, "sampling": None, "dit": values["dit"] | {"class_conditional": False}}
    if stage == "captions":
        transformer = {"width": 16, "depth": 1, "num_heads": 2, "head_dim": 8}
        values["conditions"] = {"text": {"max_length": 4, "vocab_size": 9, "transformer": transformer, "dropout": 0.5}}
    if stage in ("label", "latents", "unet"):
        values["dit"]["label_dropout"] = 0.5
    if stage == "latents":
        values["latents"], shapes = {"shape": (8, 8, 1), "scale": 2.0}, {"moments": (8, 8, 2)}
    if stage == "unet":
        unet = {"base_channels": 8, "channel_multipliers": (1, 1), "attention_levels": (), "num_res_blocks": 1}
        values["unet"] = unet | {"num_heads": 2, "num_groups": 4, "label": "vector", "label_dropout": 0.5}
        values["dit"] = None
    return config_from_dict(values), shapes


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_changes_no_loss_beyond_its_last_bits(stage, tmp_path):
    config, shapes = staged(stage, tmp_path)
    make = {"autoencoder": make_autoencoder_gradients, "classifier": make_classifier_loss}
    make_gradients = make.get(stage, make_diffusion_loss)
    batch = random_batches(1, **shapes)[0]
    if stage == "captions":
        rows = np.arange(8)[:, None]
        batch["text"] = {"ids": (rows + np.arange(4)) % 9, "mask": np.arange(4) <= rows % 4}
    params = jax.tree.map(lambda x: x + 0.05, init_params(config, jax.random.key(0)))
    state, found = TrainState(jnp.int32(1), params, None, None, loss_state=None), []
    for parts in (1, 4):
        training = dataclasses.replace(config.training, accumulation_steps=parts)
        split = dataclasses.replace(config, training=training)
        gradient_fn = make_gradients(split) if stage == "autoencoder" else gradients_of(make_gradients(split), parts)
        if stage == "autoencoder":
            state = state.replace(loss_state=LossState({}, None, {}))
        found.append(jax.jit(gradient_fn)(state, batch, jax.random.key(7), None))
    for name, value in found[0].metrics.items():
        np.testing.assert_allclose(found[1].metrics[name], value, rtol=2e-5)
    np.testing.assert_allclose(*(optax.tree.norm(gradients.params) for gradients in found), rtol=1e-4)


def test_bfloat16_losses_follow_the_float32_curve(tmp_path):
    config = dit_config(tmp_path)
    mesh = make_mesh(config.mesh)
    curves = []
    for dtype in ("float32", "bfloat16"):
        _, losses = run(dataclasses.replace(config, dit=dataclasses.replace(config.dit, dtype=dtype)), mesh, 40)
        curves.append(np.array(losses))
    full, half = curves
    assert full[-10:].mean() < 0.9 * full[:10].mean()
    # bfloat16 rounds to 2^-9 = 0.2 %; the updates differ by as much, and their sum stays below the batches' own noise.
    np.testing.assert_allclose(half, full, rtol=0.02)
    assert (half != full).any()
