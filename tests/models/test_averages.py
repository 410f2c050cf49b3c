"""Averages of the weights: their profiles, and a length reconstructed after training."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import TrainingConfig
from dit_jax.models.averages import (
    average_decays,
    exponent_of_length,
    initial_share,
    initial_share_note,
    length_name,
    reconstruction_weights,
    update_averages,
)

LENGTHS = (0.05, 0.1)


def averaged(trajectory, decays, snapshot_every):
    """Returns the averages along a trajectory [T, n], and their snapshots: (step, name) -> average."""
    averages, snapshots = {name: {"w": jnp.zeros(trajectory.shape[1])} for name in decays}, {}
    for step, point in enumerate(trajectory, start=1):
        averages = update_averages(averages, {"w": jnp.asarray(point)}, jnp.int32(step), decays)
        if step % snapshot_every == 0:
            snapshots |= {(step, name): np.asarray(average["w"]) for name, average in averages.items()}
    return averages, snapshots


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25])
def test_exponent_gives_the_profile_its_relative_standard_deviation(length):
    gamma = exponent_of_length(length)
    t = (np.arange(200_000) + 0.5) / 200_000
    profile = t**gamma / (t**gamma).sum()
    mean = (profile * t).sum()
    np.testing.assert_allclose(np.sqrt((profile * (t - mean) ** 2).sum()), length, rtol=1e-4)


def test_power_average_weighs_the_past_by_its_profile_and_forgets_the_start():
    decays = average_decays(TrainingConfig(num_train_steps=1, ema_lengths=(0.1,)))
    steps, gamma = 400, exponent_of_length(0.1)
    # Of the unit vectors in turn, the average is the profile itself.
    averages, _ = averaged(np.eye(steps, dtype=np.float32), decays, steps)
    expected = np.diff((np.arange(steps + 1) / steps) ** (gamma + 1))
    np.testing.assert_allclose(averages[length_name(0.1)]["w"], expected, rtol=2e-3, atol=1e-7)


def test_exponential_averages_of_several_decays_are_tracked_at_once():
    decays = average_decays(TrainingConfig(num_train_steps=1, extra_ema_decays=(0.5, 0.9)))
    averages, _ = averaged(np.ones((3, 1), np.float32), decays, 1)
    np.testing.assert_allclose(averages["decay_0.5"]["w"], 1 - 0.5**3, rtol=1e-6)
    np.testing.assert_allclose(averages["decay_0.9"]["w"], 1 - 0.9**3, rtol=1e-6)


@pytest.mark.parametrize("length", [0.05, 0.07, 0.12, 0.2])
def test_reconstructed_average_is_the_one_tracked_directly(length):
    """On a random walk, the hardest of smooth trajectories: the error is small beside what averaging changes."""
    steps, every = 2000, 100
    walk = np.cumsum(np.random.default_rng(0).normal(size=(steps, 64)), axis=0).astype(np.float32)
    decays = average_decays(TrainingConfig(num_train_steps=1, ema_lengths=(*LENGTHS, length)))
    averages, snapshots = averaged(walk, decays, every)
    kept = [(step, each) for step in range(every, steps + 1, every) for each in LENGTHS]
    weights = reconstruction_weights(kept, steps, length)
    made = sum(w * snapshots[step, length_name(each)] for w, (step, each) in zip(weights, kept, strict=True))
    direct = np.asarray(averages[length_name(length)]["w"])
    assert np.linalg.norm(made - direct) < 0.02 * np.linalg.norm(walk[-1] - direct)
    assert abs(weights.sum() - 1) < 0.01


def test_an_average_tells_how_much_of_the_initial_weights_it_holds():
    training = TrainingConfig(num_train_steps=400, extra_ema_decays=(0.99, 0.9), ema_lengths=(0.05,))
    assert initial_share(training, 400) == pytest.approx(0.9999**400)
    note = initial_share_note(training, 400)
    assert "config.training.ema_decay=0.9999" in note and "still 96% the weights from before the first step" in note
    assert initial_share_note(training, 40_000) is None
    assert "decay_0.99" in initial_share_note(training, 300, "decay_0.99")
    assert initial_share_note(training, 400, "decay_0.9") is None
    assert initial_share_note(training, 1, "length_0.05") is None  # begins with the first update
    assert initial_share_note(dataclasses.replace(training, ema_decay=None), 1) is None
    assert initial_share_note(dataclasses.replace(training, init_from="trained"), 1) is None  # and is no fault there
