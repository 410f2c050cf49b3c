"""The loop: it learns, reports, survives a kill, and reads nothing from the device between logs."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

import dit_jax
from dit_jax.checkpoint import SNAPSHOTS, Checkpoints, find_checkpoint
from dit_jax.cli.train import autoencoder_task, diffusion_task
from dit_jax.config import MeshConfig, config_to_dict
from dit_jax.metrics.history import read_metrics
from dit_jax.parallel.mesh import make_mesh, replicated
from dit_jax.training import loop
from tests.tiny import adversarial_config, autoencoder_config, dit_config, make_image_folder

TASKS = {"autoencoder": autoencoder_task, "diffusion": diffusion_task}
CONFIGS = {
    "autoencoder": functools.partial(
        adversarial_config, codebook={"num_codes": 16, "update": "ema", "restart_usage": 0.5}, start_step=2
    ),
    "diffusion": dit_config,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("images") / "set")


def train(config, workdir):
    workdir.mkdir(exist_ok=True)
    mesh = make_mesh(config.mesh)
    return loop.train(config, workdir, TASKS[config.stage](config, mesh, workdir), mesh)


def assert_same_bits(one, other):
    leaves, other_leaves = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(leaves) == len(other_leaves)
    for x, y in zip(leaves, other_leaves, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("stage", TASKS)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(stage, folder, tmp_path):
    config = CONFIGS[stage](folder, num_train_steps=6)
    whole = train(config, tmp_path / "whole")
    # Interrupted: the optimizer's schedule is constant, so a run to step 4 is the first part of one to step 6.
    train(
        dataclasses.replace(config, training=dataclasses.replace(config.training, num_train_steps=4)), tmp_path / "cut"
    )
    resumed = train(config, tmp_path / "cut")
    assert int(resumed.step) == 6
    assert_same_bits(resumed, whole)
    assert "resuming from the checkpoint of step 4 of 6" in (tmp_path / "cut" / "log.txt").read_text()
    losses = [
        {row["step"]: row["loss"] for row in read_metrics(tmp_path / name) if row["split"] == "train"}
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and sorted(losses[0]) == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_bits(folder, tmp_path):
    config = dit_config(folder)
    whole = train(config, tmp_path)
    damaged = tmp_path / "checkpoints" / "4" / "opt_state" / "_METADATA"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert_same_bits(train(config, tmp_path), whole)
    log = (tmp_path / "log.txt").read_text()
    assert "opt_state/_METADATA has" in log and "the checkpoint of step 2 is used instead" in log
    assert "resuming from the checkpoint of step 2 of 4" in log and find_checkpoint(tmp_path)[0] == 4


def test_further_averages_survive_a_resumed_run_and_are_read_by_name_or_made_of_snapshots(folder, tmp_path):
    averages = {"extra_ema_decays": (0.9,), "ema_lengths": (0.05, 0.1), "snapshot_every_steps": 2}
    config = dit_config(folder, num_train_steps=6, **averages)
    whole = train(config, tmp_path / "whole")
    train(dit_config(folder, num_train_steps=4, **averages), tmp_path / "cut")
    # As after a kill between the two saves of a step: the snapshots are there already when their steps come again.
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    assert_same_bits(train(config, tmp_path / "cut"), whole)
    with Checkpoints(tmp_path / "cut", folder=SNAPSHOTS) as snapshots:
        assert snapshots.all_steps() == [2, 4, 6]
    for name in ("decay_0.9", "length_0.05"):
        assert_same_bits(dit_jax.load(tmp_path / "cut", average=name).params, whole.averages[name])
    # Of a length that was tracked, the reconstruction is that snapshot itself.
    made = dit_jax.load(tmp_path / "cut", ema_length=0.1).params
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(whole.averages["length_0.1"]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    with pytest.raises(ValueError, match="has no average 'decay_0.5', only decay_0.9, length_0.05, length_0.1"):
        dit_jax.load(tmp_path / "cut", average="decay_0.5")
    with pytest.raises(ValueError, match="must be between 0 and 0.288"):
        dit_jax.load(tmp_path / "cut", ema_length=0.3)


def test_training_lowers_the_held_out_loss(folder, tmp_path):
    losses = []
    for num_steps in (2, 40):
        workdir = tmp_path / f"run_{num_steps}"
        at_the_end = dict.fromkeys(("eval_every_steps", "checkpoint_every_steps", "log_every_steps"), num_steps)
        train(autoencoder_config(folder, num_train_steps=num_steps, **at_the_end), workdir)
        losses += [row["reconstruction"] for row in read_metrics(workdir) if row["split"] == "eval"]
    assert len(losses) == 2 and losses[1] < 0.7 * losses[0]


def test_a_workdir_has_what_people_look_at(folder, tmp_path):
    config = autoencoder_config(folder)
    train(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(config_to_dict(config)))
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "reconstructions_0000002.png",
        "reconstructions_0000004.png",
    ]
    assert list((tmp_path / "metrics").glob("events*"))
    assert find_checkpoint(tmp_path) == (4, config)
    # Its average, of decay 0.5, holds 25 % of the initial weights at the first evaluation and 6 % at the second.
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.partition(" step ")[2][:1] for line in lines if "weights from before the first step" in line] == ["2"]


def test_old_checkpoints_are_rotated_out(folder, tmp_path):
    train(autoencoder_config(folder, num_train_steps=8, checkpoint_every_steps=2, max_checkpoints=2), tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [6, 8]


def test_an_async_save_is_not_touched_by_the_steps_after_it(folder, tmp_path):
    """The state is donated to the next step while the save of it still runs."""
    config = dit_config(folder, num_train_steps=3, checkpoint_every_steps=1, max_checkpoints=3)
    train(config, tmp_path / "three")
    for steps in (1, 2):
        shorter = dataclasses.replace(config.training, num_train_steps=steps)
        state = train(dataclasses.replace(config, training=shorter), tmp_path / f"only_{steps}")
        with Checkpoints(tmp_path / "three") as checkpoints:
            assert_same_bits(checkpoints.restore(steps, loop.state_items(state)), loop.state_items(state))


def test_a_run_whose_weights_have_gone_stops_with_its_steps(folder, tmp_path):
    config = dit_config(folder, num_train_steps=6, max_bad_steps=2, checkpoint_every_steps=6, eval_every_steps=6)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30))
    with pytest.raises(ValueError, match=r"steps \d to \d were all skipped .* no checkpoint is from before them"):
        train(config, tmp_path)


@pytest.fixture
def fetches(monkeypatch):
    """The (steps dispatched, how) of all that is read from a device, or waited for, in a run; steps are guarded.

    JAX's guard of transfers to the host sees none on CPU, whose memory is the host's: so what reads is watched. Its
    guard of transfers to the device holds: but for its first call, which compiles, a step takes arrays of devices only.
    """
    seen, dispatched = [], 0

    def watched(owner, name, reads):
        method = getattr(owner, name)

        def call(*args, **kwargs):
            if reads(*args):
                seen.append((dispatched, name))
            return method(*args, **kwargs)

        return call

    def guarded(train_step, state):
        step_fn = jit_train_step(train_step, state)

        def call(*args):
            nonlocal dispatched
            dispatched += 1
            with jax.transfer_guard_host_to_device("disallow" if dispatched > 1 else "allow"):
                return step_fn(*args)

        return call

    jit_train_step = loop.jit_train_step
    monkeypatch.setattr(loop, "jit_train_step", guarded)
    for name in ("__array__", "__float__", "__int__", "__bool__", "block_until_ready", "copy_to_host_async"):
        monkeypatch.setattr(ArrayImpl, name, watched(ArrayImpl, name, lambda *_: True))
    for name in ("asarray", "array"):  # these read the memory of a CPU's array directly
        monkeypatch.setattr(np, name, watched(np, name, lambda x, *_: isinstance(x, jax.Array)))
    return seen


@pytest.mark.parametrize("stage", TASKS)
def test_the_step_reads_nothing_from_the_device_between_logs(stage, folder, tmp_path, fetches):
    steps = {"num_train_steps": 22, "log_every_steps": 10, "eval_every_steps": 22, "checkpoint_every_steps": 22}
    train(CONFIGS[stage](folder, **steps), tmp_path)
    # Metrics are logged one step late: those up to step 10 after step 11 was started.
    assert {dispatched for dispatched, _ in fetches if dispatched > 0} == {11, 21, 22}


@pytest.fixture
def compilations():
    """The training steps that XLA compiled."""
    seen = []

    def listen(event, _, fun_name="", **others):
        if event.endswith("backend_compile_duration") and "train_step" in fun_name:
            seen.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("stage", TASKS)
def test_the_step_compiles_once_a_start_whatever_comes_between_steps(stage, folder, tmp_path, compilations):
    def config(num_train_steps):  # on a mesh that splits parameters: the compiler could place the next state otherwise
        return dataclasses.replace(
            CONFIGS[stage](folder, num_train_steps=num_train_steps), mesh=MeshConfig(data=2, fsdp=4)
        )

    train(config(6), tmp_path)  # evaluated and saved at steps 2, 4 and 6
    assert len(compilations) == 1
    train(config(8), tmp_path)
    assert len(compilations) == 2


def test_a_step_that_compiled_twice_would_be_seen(folder, tmp_path, compilations, monkeypatch):
    """Where a batch is placed in another way than the others, as a careless pipeline might."""
    prefetch = loop.prefetch

    def careless(batches, mesh, batch_size):
        for number, batch in enumerate(prefetch(batches, mesh, batch_size)):
            yield jax.device_put(batch, replicated(mesh)) if number == 2 else batch

    monkeypatch.setattr(loop, "prefetch", careless)
    train(dit_config(folder, eval_every_steps=4, checkpoint_every_steps=4), tmp_path)
    assert len(compilations) == 2


def test_metrics_tell_the_share_of_time_that_went_into_waiting_for_data(monkeypatch):
    now = 0.0
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: now))
    window = loop.MetricsWindow(0)
    for _ in range(2):
        with window.waiting_for_data():
            now += 3.0
        window.add({"loss": jnp.ones(())})
        now += 1.0
    assert window.fetch(keep=0) == [(1, {"loss": 1.0}), (2, {"loss": 1.0})]
    assert window.rates() == {"steps_per_second": 0.25, "data_wait": 0.75}
    window.add({"loss": jnp.ones(())})
    now += 1.0
    assert window.fetch(keep=0) == [(3, {"loss": 1.0})] and window.rates()["data_wait"] == 0.0
    window.add({"loss": types.SimpleNamespace(is_ready=lambda: False)})  # the devices are at work: they do not wait
    with window.waiting_for_data():
        now += 3.0
    assert window.rates()["data_wait"] == 0.0


def test_the_log_tells_when_the_first_step_was_begun_and_done(folder, tmp_path):
    train(dit_config(folder), tmp_path)
    (line,) = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "first step begun" in line]
    begun, compiling, done = map(float, re.findall(r"([\d.]+) s\b", line))
    assert compiling <= begun <= done


@pytest.mark.parametrize("stage", TASKS)
def test_a_killed_run_continues_from_its_last_checkpoint(stage, folder, tmp_path):
    """SIGKILL, as a machine that fails: the same command goes on and says from where."""
    config = CONFIGS[stage](folder, num_train_steps=400, checkpoint_every_steps=5, eval_every_steps=400)
    config_file = tmp_path / "config.py"
    values = config_to_dict(config)
    config_file.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "dit_jax", "train", f"--config={config_file}", f"--workdir={workdir}"]
    root = pathlib.Path(__file__).parents[2]
    with (tmp_path / "first.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=root, stdout=output, stderr=output)
        deadline = time.monotonic() + 300
        while not any(done.parent.name.isdigit() for done in workdir.glob("checkpoints/*/commit_success.txt")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "first.txt").read_text()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    step, _ = find_checkpoint(workdir)
    stop = f"--config.training.num_train_steps={step + 5}"
    again = subprocess.run([*command, stop], cwd=root, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"resuming from the checkpoint of step {step} of {step + 5}" in again.stderr
    assert find_checkpoint(workdir)[0] == step + 5
