"""A run that is started again compiles nothing and does not trace its step; without a cache it runs all the same."""

import json
import os
import pathlib
import subprocess
import sys
import warnings

import jax
import pytest

from dit_jax.config import config_to_dict
from dit_jax.parallel.compilation_cache import DIRECTORY, MIN_SECONDS, use_compilation_cache
from tests.tiny import dit_config, make_image_folder


def test_a_cache_that_cannot_be_written_costs_one_line(capsys):
    use_compilation_cache(None)
    for name in "fg":
        text = f"Error writing persistent compilation cache entry for 'jit_{name}': OSError: No space left on device"
        warnings.showwarning(UserWarning(text), UserWarning, "compiler.py", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line


ROOT = pathlib.Path(__file__).parents[2]
COUNTING_START = """
import collections, json, sys, unittest.mock
import jax
from dit_jax.cli.main import main
from dit_jax.training import reporting
reporting._make_summary_writer = unittest.mock.MagicMock()  # importing TensorFlow would take most of the time
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
traced = lambda event, _, fun_name="", **others: events.update([f"{event.rpartition('/')[2]} {fun_name}"])
jax.monitoring.register_event_duration_secs_listener(traced)
main(sys.argv[1:])
print(json.dumps(events))
"""


def start(*argv) -> dict:
    """Runs the program in a process of its own, without the tests' cache; returns how often it read and compiled."""
    environment = {name: value for name, value in os.environ.items() if name != DIRECTORY.upper()}
    environment["JAX_NUM_CPU_DEVICES"] = "1"  # compiles fastest
    command = [sys.executable, "-c", COUNTING_START, *map(str, argv)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_second_start_of_a_run_compiles_nothing(tmp_path):
    config = dit_config(make_image_folder(tmp_path / "images"), num_train_steps=2)
    file = tmp_path / "config.py"
    values = config_to_dict(config) | {"compute": {"compilation_cache": str(tmp_path / "compilations")}}
    file.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n")
    command = "train", f"--config={file}", f"--workdir={tmp_path / 'run'}"
    cold, step_traced = start(*command), "jaxpr_trace_duration flat_step"
    assert cold["cache_misses"] > 0 and cold[step_traced] == 1
    assert len(list((tmp_path / "compilations").glob("jit_train_step-*-cache"))) == 1
    again = start(*command[:-1], f"--workdir={tmp_path / 'again'}")  # as if it had been killed before a checkpoint
    assert again.get("cache_misses", 0) == 0 and again["cache_hits"] >= cold["cache_misses"]
    assert step_traced not in again
    resumed = start(*command, "--config.training.num_train_steps=4")
    assert resumed.get("cache_misses", 0) == 0 and resumed["cache_hits"] > 0
    assert len(list((tmp_path / "compilations").glob("jit_train_step-*-cache"))) == 1


@pytest.fixture
def updates(monkeypatch):
    """What is set in JAX's configuration, instead of setting it; without the tests' own cache."""
    updates = {}
    for name in (DIRECTORY, MIN_SECONDS):
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    return updates


def test_the_folder_is_made_and_small_programs_are_kept_too(updates, tmp_path):
    use_compilation_cache(str(tmp_path / "a" / "b"))
    assert updates == {DIRECTORY: str(tmp_path / "a" / "b"), MIN_SECONDS: 0.0}
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_none_keeps_nothing(updates):
    use_compilation_cache(None)
    assert updates[DIRECTORY] is None


def test_a_folder_that_cannot_be_written_costs_a_line(updates, tmp_path, capsys):
    (tmp_path / "file").touch()
    use_compilation_cache(str(tmp_path / "file" / "cache"))
    assert updates[DIRECTORY] is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line and "compiled anew at each start" in line


def test_the_environment_goes_before_the_config(updates, tmp_path, monkeypatch):
    monkeypatch.setenv(DIRECTORY.upper(), str(tmp_path / "theirs"))
    use_compilation_cache(str(tmp_path / "ours"))
    assert not updates and not (tmp_path / "ours").exists()
