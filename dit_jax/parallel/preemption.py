"""A run that is asked to make way, by SIGTERM: all of its processes stop after the same step.

SLURM, Kubernetes and the shutdown of a cloud's host send SIGTERM some time before they take a machine, to every
process of a run or to one. A thread listens for it: Python's own handlers run between two operations of the main
thread, which may compile for minutes. As long as the run has made no step, the thread ends the process; there is
nothing to save.

Several processes agree through the keys of JAX's coordination service, so that no step has a collective more: each
tells the step that it is at and waits there, and all go on to the largest of these. `reached_preemption_sync_point` of
JAX agrees likewise, but not in a single process, and not before the first step.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time

RESTART = 75  # exit code that asks to be started again; EX_TEMPFAIL of sysexits.h
POLL_SECONDS = 1.0  # between looks at whether another process was asked
AGREE_SECONDS = 20  # that a process waits to hear where the others are; then it ends, for one of them is lost
REPEAT_SECONDS = 5  # within which a second SIGTERM is taken for the first, which srun passes on and SLURM sends too
ASKED = "dit_jax/asked_to_make_way"


class Preemption:
    """Whether the run was asked to make way; within `with`, which the main thread enters, SIGTERM does so.

    A second SIGTERM, and Ctrl-C at any time, end the process at once.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._step = 0  # the newest that this process is sure to finish; 0: it has made none yet
        self._asked, self._agreed = False, threading.Event()
        self._stop = 0
        self._client, self._process, self._num_processes = None, 0, 1

    def __enter__(self) -> "Preemption":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # C code writes a signal's number to the pipe at once; the handler has to be there, but does nothing.
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="preemption", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._handler)
        os.close(self._write)  # which ends the thread, unless it waits for the other processes
        self._thread.join(POLL_SECONDS)

    def join(self) -> None:
        """Makes this process agree with the others of its run, which it has just met."""
        from jax._src import distributed

        state = distributed.global_state
        self._process, self._num_processes, self._client = state.process_id, state.num_processes, state.client

    def stops_after(self, step: int) -> bool:
        """Returns whether the run makes way after this step, which has been started; else the next one will be, too.

        Every process calls it after every step. After a request it waits until all have told where they are.
        """
        with self._lock:
            if not self._asked:
                self._step = step + 1
                return False
        self._agreed.wait()
        return step >= self._stop

    def _listen(self) -> None:
        """Waits, in a thread, for the first request, here or at another process, and then for a second one here."""
        while not self._others_asked():
            if not select.select([self._read], [], [], POLL_SECONDS)[0]:
                continue
            numbers = os.read(self._read, 64)
            if not numbers:
                return os.close(self._read)
            if signal.SIGTERM in numbers:
                break
        asked = time.monotonic()
        self._agree()
        while numbers := os.read(self._read, 64):
            if signal.SIGTERM in numbers and time.monotonic() - asked > REPEAT_SECONDS:
                os._exit(128 + signal.SIGTERM)
        return os.close(self._read)

    def _others_asked(self) -> bool:
        if self._client is None:
            return False
        try:
            self._client.key_value_try_get(ASKED)
        except RuntimeError:  # there is no such key; or the service is gone, and with it the run
            return False
        return True

    def _agree(self) -> None:
        """Finds the step after which all processes stop; ends this one where there is none."""
        with self._lock:
            self._asked = True
            self._stop = self._step
        if self._client is not None:
            try:
                with contextlib.suppress(RuntimeError):  # another one has set it
                    self._client.key_value_set(ASKED, str(self._process))
                self._client.key_value_set(f"{ASKED}/{self._process}", str(self._step))
                names = [f"{ASKED}/{process}" for process in range(self._num_processes)]
                self._stop = max(int(self._client.blocking_key_value_get(x, AGREE_SECONDS * 1000)) for x in names)
            except RuntimeError as error:
                self._leave(f"not all processes answered ({error})")
        if self._stop == 0:
            self._leave("no step is finished yet")
        self._agreed.set()

    def _leave(self, reason: str) -> None:
        print(f"dit-jax: asked to make way; nothing is saved: {reason}", file=sys.stderr, flush=True)
        if self._client is not None:
            from dit_jax.parallel.distributed import leave

            leave(RESTART)
        sys.stdout.flush()
        os._exit(RESTART)
