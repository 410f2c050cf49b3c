"""Scripts that start others show what those said, where they fail."""

import argparse
import os
import signal
import sys

import pytest

from tests.cli import killed_sampling
from tests.speed import against_torch, first_step
from tests.survival import kill


def raises(args):
    raise ValueError(f"no side of {args.size}")


def is_killed(args):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("side", "words"), [(raises, "ValueError: no side of S/2"), (is_killed, "code -9")])
def test_a_side_that_fails_ends_the_comparison_with_its_words(side, words):
    with pytest.raises(SystemExit, match=words):
        against_torch.Side(side, argparse.Namespace(size="S/2"))


def test_a_start_that_fails_before_its_first_step_ends_the_timing_with_its_words(tmp_path):
    with pytest.raises(SystemExit, match="ended with code 2; its last lines:\n(.|\n)*none.py") as error:
        first_step.first_step([f"--config={tmp_path / 'none.py'}"], tmp_path / "round" / "one")
    assert isinstance(error.value.code, str)  # to standard error, and the exit code is 1


def test_a_drawing_that_fails_ends_the_killing_with_its_words(tmp_path):
    with pytest.raises(SystemExit, match="ended with code 2; its last lines:\n(.|\n)*nowhere"):
        killed_sampling.kill_half_way(tmp_path / "nowhere", tmp_path / "output", 16, num_devices=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts are forked")
def test_a_training_that_fails_ends_the_killing_with_its_words(tmp_path):
    def fail():
        os.write(2, b"no room\n")
        sys.exit(3)

    with pytest.raises(SystemExit, match="whole ended with code 3; its last lines:\nno room"):
        kill.wait(kill.fork(fail, tmp_path / "whole.txt"), tmp_path / "whole.txt")
