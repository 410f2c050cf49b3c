"""Bad steps: skipped on the device, told, and left behind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.cli.train import diffusion_task, open_sources
from dit_jax.metrics.history import read_metrics
from dit_jax.parallel.mesh import make_mesh, put_batch
from dit_jax.training import loop
from dit_jax.training.autoencoder_step import make_autoencoder_gradients, make_observe
from dit_jax.training.bad_steps import FILE, BadSteps, read_bad_steps
from dit_jax.training.diffusion_step import make_diffusion_loss
from dit_jax.training.loop import build_update
from dit_jax.training.replay import replay
from dit_jax.training.state import SPIKE_WINDOW, LossState, TrainState, create_state
from dit_jax.training.step import Gradients, gradients_of, is_spike, jit_train_step, make_train_step
from tests.tiny import adversarial_config, dit_config, make_image_folder

AVERAGES = {"extra_ema_decays": (0.9,), "ema_lengths": (0.05,)}
CONFIGS = {
    "autoencoder": functools.partial(
        adversarial_config, codebook={"num_codes": 16, "update": "ema", "restart_usage": 0.5}, start_step=1, **AVERAGES
    ),
    "diffusion": functools.partial(dit_config, **AVERAGES),
}


def bits(state: TrainState) -> list[bytes]:
    """Returns the bytes of every leaf but the number of the step."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state.replace(step=None))]


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_batch_with_a_nan_changes_nothing_but_the_number_of_the_step(stage, tmp_path):
    config = CONFIGS[stage](tmp_path)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    is_autoencoder = config.stage == "autoencoder"
    gradient_fn = make_autoencoder_gradients(config) if is_autoencoder else gradients_of(make_diffusion_loss(config))
    optimizer, train_step = build_update(config, gradient_fn, make_observe(config) if is_autoencoder else None)
    state = create_state(config, optimizer, mesh)
    step_fn = jit_train_step(train_step, state)
    rng, skipped, states = np.random.default_rng(0), [], []
    for step in range(4):
        images = rng.uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)
        if step == 2:
            images[5, 3, 3] = np.nan
        batch = {"image": images, "label": np.zeros(8, np.int32)}
        state, metrics = step_fn(state, put_batch(batch, mesh, 8))
        skipped.append(float(metrics["skipped"]))
        states.append(bits(state))
    assert skipped == [0, 0, 1, 0] and int(state.step) == 4
    assert states[1] == states[2]
    assert states[2] != states[3]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("bad", ["loss", "params", "loss_params"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])  # the square of the last is infinite, as the norm is then
def test_a_loss_or_any_gradient_that_is_not_finite_skips_the_step(bad, value):
    def gradient_fn(state, batch, key, constants):
        values = {name: jnp.ones(()) for name in ("loss", "params", "loss_params")} | {bad: batch}
        gradients, loss_gradients = ({"w": values[name] * jnp.ones(2)} for name in ("params", "loss_params"))
        return Gradients(gradients, {"loss": values["loss"]}, loss_gradients)

    if bad == "loss" and np.isfinite(value):
        value = -np.inf
    optimizer = optax.adam(0.1)
    params = {"w": jnp.zeros(2)}
    loss_state = LossState(params, optimizer.init(params), {})
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), params, {}, loss_state)
    step_fn = jax.jit(make_train_step(gradient_fn, optimizer, 0.5, 0))
    after, metrics = step_fn(state, jnp.float32(value))
    assert float(metrics["skipped"]) == 1 and int(after.step) == 1 and bits(after) == bits(state)
    after, metrics = step_fn(state, jnp.float32(1.0))
    assert float(metrics["skipped"]) == 0 and bits(after) != bits(state)


def test_a_loss_far_above_the_recent_ones_is_a_spike_once_there_are_enough():
    rng = np.random.default_rng(0)
    recent = jnp.asarray(1 + 0.1 * rng.standard_normal(SPIKE_WINDOW), jnp.float32)
    assert not is_spike(1.4, recent, 6.0) and is_spike(1.8, recent, 6.0)
    assert not is_spike(-9.0, recent, 6.0)  # far below is no harm
    assert not is_spike(9.0, recent.at[0].set(jnp.nan), 6.0)
    with_outliers = recent.at[:30].set(100.0)  # by which a mean and its deviation would be carried away
    assert is_spike(3.0, with_outliers, 6.0)
    assert not is_spike(1.0, jnp.ones(SPIKE_WINDOW), 6.0) and is_spike(1.01, jnp.ones(SPIKE_WINDOW), 6.0)


def test_spikes_are_skipped_where_the_config_asks_for_it():
    def gradient_fn(state, batch, key, constants):
        return Gradients({"w": jnp.ones(())}, {"loss": batch})

    optimizer, params = optax.sgd(0.1), {"w": jnp.zeros(())}
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None)
    state = state.replace(recent={"loss": jnp.full(SPIKE_WINDOW, jnp.nan)})
    step_fn = jax.jit(make_train_step(gradient_fn, optimizer, None, 0, spike_zscore=10.0))
    skipped = []
    losses = [*np.linspace(2, 1, SPIKE_WINDOW + 4), 50.0, 1.0]
    for i, loss in enumerate(losses):
        before = bits(state)
        state, metrics = step_fn(state, jnp.float32(loss if i else 50.0))  # the first is no spike: of what?
        skipped.append(float(metrics["skipped"]))
        assert (bits(state) == before) is bool(skipped[-1])
    assert skipped == [0.0] * (SPIKE_WINDOW + 4) + [1.0, 0.0]


SKIPPED = {"skipped": 1.0, "loss": float("nan"), "grad_norm": 1.0}
LINES = (
    '{"step": 3, "batch": 2, "seed": 0, "reason": "loss is nan", "loss": NaN, "grad_norm": NaN, "examples": [1]}\n'
    '{"step": 4, "batch": 3, "seed": 0, "reason": "loss is nan", "loss": NaN, "grad_norm": NaN, "examples": [2]}\n'
)


def test_a_line_that_a_kill_has_cut_is_mended_and_its_step_comes_again(tmp_path):
    path = tmp_path / FILE
    for cut in range(len(LINES)):
        path.write_text(LINES + '{"step": 5, "reason": "loss is nan"}\n'[: cut % 30])
        BadSteps(tmp_path, 4, 0).add(5, SKIPPED)
        assert [row["step"] for row in read_bad_steps(tmp_path)] == [3, 4, 5]


def test_a_damaged_line_is_set_aside_with_a_word_and_blocks_no_start(tmp_path):
    path, told = tmp_path / FILE, []
    for place, byte in ((0, 0xFF), (10, ord("{")), (len(LINES) // 2 - 2, ord("x"))):
        content = bytearray(LINES.encode())
        content[place] = byte
        path.write_bytes(content)
        assert BadSteps(tmp_path, 4, 0, log=told.append).row == [4]
        assert [row["step"] for row in read_bad_steps(tmp_path)] == [4]
    assert len(told) == 3 and all("set aside in bad_steps.jsonl.damaged" in line for line in told)
    assert (tmp_path / f"{FILE}.damaged").read_bytes().count(b"\n") == 3


def test_a_full_disk_ends_no_run_and_its_bad_steps_are_recorded_when_there_is_room(tmp_path):
    path, told = tmp_path / FILE, []
    path.symlink_to("/dev/full")
    bad_steps = BadSteps(tmp_path, 0, 0, log=told.append)
    for step in (1, 2):
        assert bad_steps.add(step, SKIPPED) == "loss is nan"
    assert bad_steps.row == [1, 2] and len(told) == 1 and "No space left on device" in told[0] and str(path) in told[0]
    with pytest.raises(OSError, match="No space left on device"):
        bad_steps.add_rollback(0)  # without a record of it, the run would go back for ever
    bad_steps._unwritten.pop()
    path.unlink()
    bad_steps.write_left()
    assert [row["step"] for row in read_bad_steps(tmp_path)] == [1, 2]


NUM_STEPS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images") / "set")


def train(folder, workdir, bad_batches, until=None, **training):
    """Trains a DiT whose batches of these numbers hold a NaN; stops with an error before batch `until`."""
    settings = {"eval_every_steps": NUM_STEPS, "log_every_steps": 3, "max_bad_steps": 3} | training
    config = dit_config(folder, num_train_steps=NUM_STEPS, **settings)
    workdir.mkdir(exist_ok=True)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    whole = diffusion_task(config, mesh, workdir)

    def train_batches(start):
        for number, batch in enumerate(whole.train_batches(start), start=start):
            if number == until:
                raise InterruptedError
            if number in bad_batches:
                batch["image"][1, 0, 0, 0] = np.nan
            yield batch

    task = dataclasses.replace(
        whole,
        train_batches=train_batches,
        draw=lambda params: {},
        eval_fn=lambda params, batch, constants: {"loss": batch["mask"]},
    )
    return config, task, mesh, lambda: loop.train(config, workdir, task, mesh)


def test_a_bad_batch_is_told_with_its_examples_and_replayed(folder, tmp_path):
    config, task, mesh, run = train(folder, tmp_path, {6}, log_every_steps=1)
    state = run()
    assert int(state.step) == NUM_STEPS and all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    (row,) = read_bad_steps(tmp_path)
    assert (row["step"], row["batch"], row["seed"]) == (7, 6, 0) and np.isnan([row["loss"], row["grad_norm"]]).all()
    assert row["reason"] == "loss is nan, grad_norm is nan"
    source, _ = open_sources(config)
    labels = [source[i]["label"] for i in row["examples"]]
    assert labels == next(iter(task.train_batches(6)))["label"].tolist()
    rows = [row for row in read_metrics(tmp_path) if row["split"] == "train"]
    assert [row["step"] for row in rows if row["skipped"]] == [7] and len(rows) == NUM_STEPS
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert len(losses) == NUM_STEPS - 1 and np.isfinite(list(losses.values())).all()
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    lines = list(replay(config, tmp_path, task, mesh, 7))  # of the checkpoints only those of steps 10, 12, 14 are left
    assert lines[:3] == [
        "making steps 1 to 7 again, from the start",
        "step 7 (batch 6, seed 0): loss nan, grad_norm nan, skipped",
        "recorded: loss nan, grad_norm nan",
    ]
    assert f"image of rows [1], examples [{row['examples'][1]}]" in lines[3]
    assert lines[4].endswith("not finite: x_embedder") and "gradients" in lines[5]
    (line, told) = replay(config, tmp_path, task, mesh, 13)
    assert "checkpoint of step 12" in line
    assert f"loss {np.float32(losses[13]):.9g}" in told and "skipped" not in told
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_many_in_a_row_send_the_run_back_to_the_checkpoint_before_them_and_on_behind_them(folder, tmp_path):
    """Batches 5 to 7 are bad, steps 6 to 8: the state of step 4 goes on with batch 8. Wherever it is killed."""
    *_, run = train(folder, tmp_path / "whole", {5, 6, 7}, log_every_steps=1)
    whole = run()
    assert int(whole.step) == NUM_STEPS
    rows = read_bad_steps(tmp_path / "whole")
    assert [row["step"] for row in rows] == [6, 7, 8, 8] and rows[-1] == {"step": 8, "rolled_back_to": 4}
    assert "going on behind step 8 with the state of step 4" in (tmp_path / "whole" / "log.txt").read_text()
    # As a run that saw the batches but for 4 to 7; its numbers of steps, of which randomness is made, are the same.
    config, task, mesh, _ = train(folder, tmp_path / "whole", ())
    optimizer, train_step = build_update(config, task.gradient_fn, None)
    state = create_state(config, optimizer, mesh)
    step_fn = jit_train_step(train_step, state)
    for number, batch in enumerate(task.train_batches(0)):
        if 4 <= number < 8:
            state = state.replace(step=jax.device_put(np.int32(number + 1), state.step.sharding))
        else:
            state, _ = step_fn(state, put_batch(batch, mesh, 8))
    assert bits(whole) == bits(state)
    for until in (6, 10):
        workdir = tmp_path / f"killed_at_{until}"
        with pytest.raises(InterruptedError):
            train(folder, workdir, {5, 6, 7}, until)[-1]()
        assert bits(train(folder, workdir, {5, 6, 7})[-1]()) == bits(whole)
        assert read_bad_steps(workdir) == rows
    lines = list(replay(config, tmp_path / "whole", task, mesh, 9))
    assert "making steps 1 to 9 again" in lines[0]  # over the return
    with_loss = {row["step"]: row.get("loss") for row in read_metrics(tmp_path / "whole") if row["split"] == "train"}
    assert f"loss {np.float32(with_loss[9]):.9g}," in lines[1]


def test_a_run_stops_where_it_has_no_checkpoint_to_go_back_to_or_has_gone_back_too_often(folder, tmp_path):
    with pytest.raises(ValueError, match=r"steps 2 to 4 were all skipped .*, and no checkpoint is from before them"):
        train(folder, tmp_path / "start", {1, 2, 3, 4}, checkpoint_every_steps=1000)[-1]()
    bad = set(range(5, 12))  # steps 6 to 8, then 9 to 11
    for _ in range(2):  # nor does another start change that
        with pytest.raises(ValueError, match=r"steps 9 to 11 were all skipped .*max_rollbacks=1 returns"):
            train(folder, tmp_path / "often", bad, max_rollbacks=1)[-1]()
    assert int(train(folder, tmp_path / "often", bad, max_rollbacks=2)[-1]().step) == NUM_STEPS
    assert [r["rolled_back_to"] for r in read_bad_steps(tmp_path / "often") if "rolled_back_to" in r] == [4, 8]


def test_the_losses_that_spikes_are_seen_by_are_part_of_a_checkpoint(folder, tmp_path):
    whole = train(folder, tmp_path / "whole", (), spike_zscore=10.0)[-1]()
    assert np.isfinite(whole.recent["loss"]).sum() == NUM_STEPS
    with pytest.raises(InterruptedError):
        train(folder, tmp_path / "cut", (), 9, spike_zscore=10.0)[-1]()
    assert bits(train(folder, tmp_path / "cut", (), spike_zscore=10.0)[-1]()) == bits(whole)
