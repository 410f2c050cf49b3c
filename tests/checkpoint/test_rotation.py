"""Which checkpoints are kept, and that only what is verified replaces anything."""

import numpy as np
import pytest

from dit_jax.checkpoint import Checkpoints
from dit_jax.checkpoint.rotation import steps_to_keep
from tests.checkpoint.trees import CONFIG, abstract_on, make_items, one_device, save_steps

STEPS = [10, 20, 30, 40, 50]
LOSSES = {10: 0.5, 20: 0.1, 30: 0.3, 40: float("nan"), 50: 0.2}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"last": 2}, {40, 50}),
        ({"last": 9}, set(STEPS)),
        ({"last": 1, "every": 20}, {20, 40, 50}),
        ({"last": 1, "best": ("loss", "min")}, {20, 50}),
        ({"last": 1, "best": ("loss", "max")}, {10, 50}),  # such as PSNR: more is better
        ({"last": 1, "best": ("unknown", "min")}, {50}),
        ({"last": 1, "every": 40, "best": ("loss", "min")}, {20, 40, 50}),
    ],
)
def test_the_newest_the_grid_and_the_best_stay(options, kept):
    metrics = {step: {"loss": loss} for step, loss in LOSSES.items()}
    assert steps_to_keep(STEPS, metrics=metrics, **options) == kept


def test_a_step_without_figures_is_not_the_best_and_the_newest_of_equals_is():
    assert steps_to_keep([1, 2, 3], last=1, best=("loss", "min"), metrics={1: None, 2: {"loss": 7.0}}) == {2, 3}
    equal = {step: {"loss": 1.0} for step in (1, 2, 3)}
    assert steps_to_keep([1, 2, 3, 4], last=1, best=("loss", "min"), metrics=equal) == {3, 4}


def test_figures_and_what_is_kept_outlive_a_restart(tmp_path):
    options = {"max_to_keep": 1, "keep_best": ("loss", "max"), "keep_every": 4}  # the loss falls with the step
    save_steps(tmp_path, [2, 3], **options)
    assert Checkpoints(tmp_path).all_steps() == [2, 3]
    save_steps(tmp_path, [4, 5, 6], **options)
    assert Checkpoints(tmp_path).all_steps() == [2, 4, 6]
    assert np.isclose(Checkpoints(tmp_path).metrics(2)["loss"], 0.5)


def test_a_damaged_checkpoint_is_not_the_best(tmp_path):
    save_steps(tmp_path, [2, 3])
    (tmp_path / "checkpoints" / "2" / "manifest" / "metadata").write_text("{}")
    save_steps(tmp_path, [4], max_to_keep=1, keep_best=("loss", "max"))
    assert Checkpoints(tmp_path).all_steps() == [3, 4]


def test_the_last_good_checkpoint_outlives_damaged_newer_ones(tmp_path):
    """A run that had to go back to step 1 saves step 2 again: only then may step 1 go."""
    save_steps(tmp_path, [1, 2, 3])
    for step in (2, 3):
        (tmp_path / "checkpoints" / str(step) / "params" / "manifest.ocdbt").write_text("")
    checkpoints = Checkpoints(tmp_path, max_to_keep=1, log=(lines := []).append)
    assert checkpoints.restore_newest_good(abstract_on(one_device(), make_items(1)))[0] == 1 and len(lines) == 2
    assert checkpoints.all_steps() == [1, 2, 3]
    checkpoints.save(2, make_items(2), CONFIG)
    checkpoints.wait()
    assert checkpoints.all_steps() == [2]
