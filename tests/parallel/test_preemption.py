"""SIGTERM: a process ends or stops after a step that all agree on, whatever its main thread is at."""

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dit_jax.checkpoint import find_checkpoint
from dit_jax.config import config_to_dict
from dit_jax.parallel.preemption import INTERRUPTED, RESTART, Preemption
from tests.tiny import dit_config, make_image_folder

ROOT = pathlib.Path(__file__).parents[2]
LIMIT_SECONDS = 120


class FakeService:
    """Stands for the client of JAX's coordination service."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            if key in self._values:
                raise RuntimeError("ALREADY_EXISTS")
            self._values[key] = value
            self._changed.notify_all()

    def key_value_try_get(self, key):
        if key not in self._values:
            raise RuntimeError("NOT_FOUND")
        return self._values[key]

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self._values[key]


def wait_until_asked(asked: Preemption) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not asked._agreed.is_set():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_single_process_stops_after_the_step_in_hand():
    handler = signal.getsignal(signal.SIGTERM)
    with Preemption() as asked:
        assert not asked.stops_after(1)  # so step 2 will be made
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as srun and SLURM both send it
        wait_until_asked(asked)
        assert asked.stops_after(2)
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("seed", range(20))
def test_processes_at_different_steps_stop_after_the_same_one(seed):
    """Process 0 alone is asked; a process runs up to two steps ahead of the slowest, as a collective would let it."""
    rng, service = random.Random(seed), FakeService()
    runs = [Preemption() for _ in range(4)]
    dispatched, moved, stopped = [0] * 4, threading.Condition(), [0] * 4
    when = rng.randrange(1, 6)

    def listen(index):
        while not (runs[index]._others_asked() if index else runs[0]._step > when):
            time.sleep(0.001)
        runs[index]._agree()

    def main(index):
        delays = random.Random(seed * 4 + index)
        for step in range(1, 1000):
            with moved:
                assert moved.wait_for(lambda: step <= min(dispatched) + 2, LIMIT_SECONDS)  # noqa: B023
                dispatched[index] = step
                moved.notify_all()
            time.sleep(delays.random() * 0.004)
            if runs[index].stops_after(step):
                stopped[index] = step
                return

    threads = []
    for index, run in enumerate(runs):
        run._client, run._process, run._num_processes = service, index, 4
        threads += [threading.Thread(target=f, args=(index,), daemon=True) for f in (listen, main)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    assert len(set(stopped)) == 1 and stopped[0] >= when


SCRIPT = """
import hashlib, sys
from dit_jax.parallel import preemption
preemption.REPEAT_SECONDS = 0
with preemption.Preemption() as asked:
    if sys.argv[1] == "stuck":
        asked.stops_after(1)
    print("ready", flush=True)
    # In C, as a compilation is: no Python handler runs.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(("state", "signals", "code"), [("starting", 1, RESTART), ("stuck", 2, 128 + signal.SIGTERM)])
def test_a_process_that_compiles_is_ended(state, signals, code):
    """At once where it has made no step; later by a second signal, which leaves no time to save."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, state], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # else the kernel makes one of the two
    assert process.wait(LIMIT_SECONDS) == code


HANGS = """
import sys, threading
from dit_jax.parallel import preemption
preemption.PATIENCE_SECONDS = 0
with preemption.Preemption() as asked:
    asked.stops()
    with asked.interruptible(lambda: print("saved", flush=True)):
        print("ready", flush=True)
        threading.Event().wait()
"""


def test_what_hangs_in_an_evaluation_is_ended_after_it_was_saved():
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saved\n" and process.wait(LIMIT_SECONDS) == RESTART


INTERRUPTS = """
import time
from dit_jax.parallel import preemption
with preemption.Preemption(interrupts=True) as asked:
    asked.stops()
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_second_ctrl_c_ends_at_once():
    command = [sys.executable, "-c", INTERRUPTS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again ends at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_SECONDS) == INTERRUPTED


def test_the_programs_end_does_not_wait_for_a_thread_that_hangs():
    script = "import sys, threading\nfrom dit_jax.cli import main\n"
    script += "def run_verb(*_):\n  threading.Thread(target=threading.Event().wait).start()\n  sys.exit(75)\n"
    script += "main.run_verb = run_verb\nmain.main()"
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # else it starts itself anew
    done = subprocess.run([sys.executable, "-c", script], timeout=LIMIT_SECONDS, check=False, env=environment)
    assert done.returncode == RESTART


@pytest.mark.parametrize("num_processes", [1, 4])
def test_training_saves_its_step_and_all_processes_ask_to_be_started_again(num_processes, tmp_path):
    """Only the last process is told."""
    steps = {"num_train_steps": 10**6, "checkpoint_every_steps": 10**6, "eval_every_steps": 10**6}
    values = config_to_dict(dit_config(make_image_folder(tmp_path / "images"), **steps))
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    config.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "DIT_JAX_NUM_PROCESSES": str(num_processes)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment["DIT_JAX_COORDINATOR"] = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "dit_jax", "train", f"--config={config}", f"--workdir={workdir}"]
    processes = []
    with (tmp_path / "output.txt").open("w") as output:
        try:
            for index in range(num_processes):
                own = {"env": environment | {"DIT_JAX_PROCESS_ID": str(index)}, "stdout": output, "stderr": output}
                processes.append(subprocess.Popen(command, cwd=ROOT, **own))
            log, deadline = workdir / "log.txt", time.monotonic() + 8 * LIMIT_SECONDS
            while not (log.exists() and "first step" in log.read_text()):
                assert time.monotonic() < deadline and not any(process.poll() for process in processes)
                time.sleep(0.1)
            processes[-1].send_signal(signal.SIGTERM)
            codes = [process.wait(8 * LIMIT_SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert codes == [RESTART] * num_processes, (tmp_path / "output.txt").read_text()
    (step,) = re.findall(r"asked to make way after step (\d+)", log.read_text())
    assert find_checkpoint(workdir)[0] == int(step) > 0
