"""A few killed runs of each stage; `python -m tests.survival.kill` makes as many as one likes."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts are forked")
def test_killed_runs_end_with_the_bits_of_one_that_was_not():
    command = [sys.executable, "-m", "tests.survival.kill", "--runs=2", "--steps=60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if "the same bits" in line] == ["diffusion", "autoencoder"]
    assert lines[-1].endswith("2 ended with the bits of a run that was not killed, 0 did not")
