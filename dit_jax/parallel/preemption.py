"""A program that is asked to make way, by SIGTERM or Ctrl-C: all processes of its run stop at the same point, soon.

SLURM, Kubernetes and the shutdown of a cloud's host send SIGTERM some time before they take a machine, to every
process of a run or to one. A thread listens for it: Python's own handlers run between two operations of the main
thread, which may compile for minutes. As long as the program has passed no point (a step of training, a batch of an
evaluation or of a drawing), the thread ends the process; there is nothing to save.

Several processes agree through the keys of JAX's coordination service, so that no step has a collective more: each
tells how many points it is sure to pass and waits at its next one, and all go on to the largest of these numbers.
`reached_preemption_sync_point` of JAX agrees likewise, but not in a single process, and not before the first step.

What hangs (a reader of a dead disk) or takes minutes (a compilation) inside `interruptible` reaches no point: the
thread then ends the process.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

RESTART = 75  # exit code that asks to be started again; EX_TEMPFAIL of sysexits.h
INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C: a person wants it to end
POLL_SECONDS = 1.0  # between looks at whether another process was asked
AGREE_SECONDS = 20  # that a process waits to hear where the others are; then it ends, for one of them is lost
REPEAT_SECONDS = 5  # within which a second SIGTERM is taken for the first, which srun passes on and SLURM sends too
PATIENCE_SECONDS = 5  # without passing a point, after which what is interruptible is ended
ASKED = "dit_jax/asked_to_make_way"

_current: "Preemption | None" = None  # of this process, whose signals it hears


class MakeWay(SystemExit):
    """Raised at a point of the program where it makes way; ends it with the exit code that says so."""


def heed() -> None:
    """Raises MakeWay where the program makes way at this point; every process must call it as often as the others."""
    if _current is not None and _current.stops():
        raise MakeWay(_current.code)


def heed_alone() -> None:
    """Raises MakeWay as soon as the program is asked, where it is a single process: no others have to agree."""
    if _current is not None and _current.asked_alone():
        raise MakeWay(_current.code)


def join() -> None:
    """Makes the program agree with the other processes of its run, which it has just met."""
    if _current is not None:
        _current.join()


class Preemption:
    """Whether the program was asked to make way; within `with`, which the main thread enters, signals do so.

    A second SIGTERM, later than `REPEAT_SECONDS`, and a second Ctrl-C end the process at once.

    Args:
      interrupts: Ctrl-C asks, too, unless it is ignored, as in the background. Otherwise it ends the process.
      nothing_done: what is said where the program has passed no point yet.
    """

    def __init__(self, interrupts: bool = False, nothing_done: str = "nothing is saved: no step is finished yet"):
        self._lock = threading.Lock()
        self._step = 0  # points that this process is sure to pass; 0: it has passed none yet
        self._passed, self._moved = 0, time.monotonic()  # points so far, and when the last one was
        self._asked, self._agreed = False, threading.Event()
        self._stop = 0
        self._client, self._process, self._num_processes = None, 0, 1
        self._nothing_done, self._interrupts = nothing_done, interrupts
        self._at_end: Callable[[], None] | None = None  # of what is interruptible now
        self._ended = False  # by the thread
        self.code = RESTART

    def __enter__(self) -> "Preemption":
        global _current
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        numbers = [signal.SIGTERM]
        if self._interrupts and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            numbers.append(signal.SIGINT)
        # C code writes a signal's number to the pipe at once; the handler has to be there, but does nothing.
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="preemption", daemon=True)
        self._before, _current = _current, self
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        global _current
        _current = self._before
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._write)  # which ends the thread, unless it waits for the other processes
        self._thread.join(POLL_SECONDS)

    def join(self) -> None:
        """Makes this process agree with the others of its run, which it has just met."""
        from jax._src import distributed

        state = distributed.global_state
        self._process, self._num_processes, self._client = state.process_id, state.num_processes, state.client

    def stops_after(self, step: int) -> bool:
        """Returns whether the run makes way after this step, which has been started; else the next one will be, too."""
        return self.stops()

    def stops(self) -> bool:
        """Returns whether the program makes way at this point; else the next point will be reached, too.

        Every process calls it at the same points. After a request it waits until all have told where they are.
        """
        with self._lock:
            self._stay_if_ended()
            self._passed, self._moved = self._passed + 1, time.monotonic()
            if not self._asked:
                self._step = self._passed + 1
                return False
        self._agreed.wait()
        return self._passed >= self._stop

    def asked_alone(self) -> bool:
        """Returns whether a single process is asked; of several False."""
        return self._num_processes == 1 and self._agreed.is_set()

    @contextlib.contextmanager
    def interruptible(self, at_end: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Lets a request end the process, after `at_end`, which a thread calls, while nothing within passes a point."""
        with self._lock:
            before, self._at_end, self._moved = self._at_end, at_end, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._stay_if_ended()
                self._at_end = before

    def _stay_if_ended(self) -> None:
        if self._ended:  # the thread ends the process; meanwhile nothing may change
            threading.Event().wait()

    def _listen(self) -> None:
        """Waits, in a thread, for the first request, here or at another process, and then for a second one here."""
        while not self._others_asked():
            numbers = self._signals()
            if numbers is None:
                return os.close(self._read)
            if {signal.SIGTERM, *self._handlers} & set(numbers):
                break
        else:
            numbers = ()
        asked = time.monotonic()
        if signal.SIGINT in numbers and signal.SIGTERM not in numbers:
            self.code = INTERRUPTED
            if self._step:
                _say("interrupted: what is in hand is finished and saved; Ctrl-C again ends at once")
        self._agree()
        while (numbers := self._signals()) is not None:
            if signal.SIGINT in numbers and signal.SIGINT in self._handlers:
                os._exit(INTERRUPTED)
            if signal.SIGTERM in numbers and time.monotonic() - asked > REPEAT_SECONDS:
                os._exit(128 + signal.SIGTERM)
            self._end_what_hangs(asked)
        return os.close(self._read)

    def _signals(self) -> Sequence[int] | None:
        """Returns the numbers of the signals that came within a while, None at the end."""
        if not select.select([self._read], [], [], POLL_SECONDS)[0]:
            return ()
        return tuple(os.read(self._read, 64)) or None

    def _others_asked(self) -> bool:
        if self._client is None:
            return False
        try:
            code = self._client.key_value_try_get(ASKED)
        except RuntimeError:  # there is no such key; or the service is gone, and with it the run
            return False
        self.code = int(code)
        return True

    def _agree(self) -> None:
        """Finds the point at which all processes stop; ends this one where there is none."""
        with self._lock:
            self._asked = True
            self._stop = self._step
        if self._client is not None:
            try:
                with contextlib.suppress(RuntimeError):  # another one has set it
                    self._client.key_value_set(ASKED, str(self.code))
                self._client.key_value_set(f"{ASKED}/{self._process}", str(self._step))
                names = [f"{ASKED}/{process}" for process in range(self._num_processes)]
                self._stop = max(int(self._client.blocking_key_value_get(x, AGREE_SECONDS * 1000)) for x in names)
            except RuntimeError as error:
                self._leave(f"nothing is saved: not all processes answered ({error})")
        if self._stop == 0:
            self._leave(self._nothing_done)
        self._agreed.set()

    def _end_what_hangs(self, asked: float) -> None:
        with self._lock:
            since = max(self._moved, asked)
            if self._at_end is None or self._ended or time.monotonic() - since < PATIENCE_SECONDS:
                return
            self._ended = True
        try:
            self._at_end()
        finally:
            self._leave("the program did not get on; what was finished is kept", others=True)

    def _leave(self, reason: str, others: bool = False) -> None:
        """Ends the process; others: those of the run as well, which may wait for it in a collective."""
        report = f"dit-jax: asked to make way; {reason}"
        if self._client is not None:
            from dit_jax.parallel.distributed import end_all, leave

            if others:
                end_all(self.code, f"asked to make way; {reason}", report)
            print(report, file=sys.stderr, flush=True)
            leave(self.code)
        with contextlib.suppress(OSError):
            print(report, file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(self.code)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"dit-jax: {message}", file=sys.stderr, flush=True)
