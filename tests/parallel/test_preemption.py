"""SIGTERM: a process ends or stops after a step that all agree on, whatever its main thread is at."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from dit_jax.parallel.preemption import RESTART, Preemption

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
