"""What a person sees: a line now and then where there is no terminal, and no notices of the libraries below."""

import ast
import pathlib
import subprocess
import sys

import pytest

from dit_jax import terminal

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_at_the_start_every_ten_seconds_and_at_the_end(clock, capsys):
    for _ in terminal.progress(range(1000), total=1000, unit="step", description="training: step"):
        clock[0] += 0.031
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: step 1 of 1000 (0%)",
        "training: step 324 of 1000 (32%), 32.3 steps/s, 00:20 left",
        "training: step 647 of 1000 (65%), 32.3 steps/s, 00:10 left",
        "training: step 970 of 1000 (97%), 32.3 steps/s, 00:00 left",
        "training: step 1000 of 1000 (100%), 32.3 steps/s, 00:00 left",
    ]


def test_a_log_has_no_line_where_nothing_was_done_since_the_last(clock, capsys):
    bar = terminal.progress(total=4, unit="step", description="step")
    for done in (1, 0, 0, 1):
        clock[0] += 20  # such as an evaluation between two steps
        bar.update(done)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "step 1 of 4 (25%)",
        "step 2 of 4 (50%)",
    ]


def test_progress_that_is_not_this_process_s_to_show_is_silent(capsys):
    with terminal.progress(total=4, unit="image", description="sampling: image", active=False) as bar:
        bar.update(4)
    assert list(terminal.progress([1, 2], total=2, unit="image", description="sampling: image", active=False)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_progress_has_one_home():
    """Whoever makes a bar of their own floods the logs."""
    for path in (ROOT / "dit_jax").rglob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {alias.name for node in imports for alias in node.names} | {
            getattr(node, "module", "") for node in imports
        }
        assert path.name == "terminal.py" or "tqdm" not in names, path


def test_what_gloo_tells_on_standard_output_goes_nowhere_and_what_python_prints_does():
    code = (
        "import os; from dit_jax.terminal import silence_native_output; print('before'); silence_native_output(); "
        "os.write(1, b'[Gloo] Rank 0 is connected to 1 peer ranks.\\n'); print('figures')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("before\nfigures\n", "")


def test_tensorflow_and_libtpu_have_nothing_to_announce(monkeypatch):
    """TensorFlow's notice of oneDNN heeds no level of logging; libtpu asks for a TPU where there is none."""
    from jax._src import hardware_utils

    environment = {}
    monkeypatch.setattr(terminal.os, "environ", environment)
    terminal.silence_tensorflow()
    assert environment == {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
    environment.clear()
    monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (4, None))
    terminal.silence_libtpu()
    assert environment == {}  # a TPU's own runtime reads these
    monkeypatch.setattr(hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (0, None))
    terminal.silence_libtpu()
    assert set(environment) == {"TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"}
