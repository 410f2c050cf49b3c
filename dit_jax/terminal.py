"""What a person sees on standard error: progress, and no notices of the libraries below.

In a terminal progress is a bar; elsewhere, as in a log, it is a line at the beginning, now and then, and at the end.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import tqdm

LINE_SECONDS = 10.0  # between the lines of one progress, where there is no terminal

Item = TypeVar("Item")


def progress(
    items: Iterable[Item] | None = None,
    *,
    total: int,
    unit: str,
    description: str,
    initial: int = 0,
    active: bool = True,
) -> "tqdm.tqdm | Lines[Item]":
    """Returns what shows how far some work is, a context manager: it yields the items, or `update` is called.

    Args:
      items: what the work goes over; None: `update(n)` says that n more are done.
      total: of items; unit: what one is called; description: of the work; initial: items done before.
      active: False shows nothing, for all processes but the first.
    """
    if active and not sys.stderr.isatty():
        return Lines(items, total, unit, description, initial)
    return tqdm.tqdm(
        items, description, total, unit=unit, initial=initial, disable=not active, dynamic_ncols=True, file=sys.stderr
    )


class Lines(Generic[Item]):
    """Progress where there is no terminal, as far as tqdm's bars are used here: a line now and then, see `progress`."""

    def __init__(self, items: Iterable[Item] | None, total: int, unit: str, description: str, initial: int = 0):
        self.n = initial
        self._items, self._total, self._unit, self._description = items, total, unit, description
        self._told: tuple[float, int] | None = None  # when, and of how many, the newest line was
        self._postfix = ""

    def __enter__(self) -> "Lines[Item]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Item]:
        for item in self._items:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        """Counts n more as done."""
        self.n += n
        now = time.monotonic()
        if self._told is None or (n and (now - self._told[0] >= LINE_SECONDS or self.n >= self._total)):
            self._tell(now)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Sets what the next line ends in."""
        self._postfix = text

    def close(self) -> None:
        """Ends it; what is told was told when it happened."""

    def _tell(self, now: float) -> None:
        parts = [f"{self._description} {self.n} of {self._total} ({self.n / max(self._total, 1):.0%})"]
        if self._postfix:
            parts.append(self._postfix)
        if self._told is not None:  # else these are the first, with what is compiled for them: no measure of the rate
            rate = max(self.n - self._told[1], 1) / max(now - self._told[0], 1e-9)
            left = tqdm.tqdm.format_interval(max(self._total - self.n, 0) / rate)
            parts += [f"{rate:.3g} {self._unit}s/s", f"{left} left"]
        tell(", ".join(parts))
        self._told = now, self.n


def tell(message: str) -> None:
    """Writes a line to standard error, above the bar where there is one."""
    with contextlib.suppress(OSError):  # it may be a file on a disk that is full
        tqdm.tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()


def silence_tensorflow() -> None:
    """Keeps TensorFlow's notices away; to be called before it is imported.

    It only writes files here: that it announces its use of oneDNN, which no level of logging keeps it from, is
    answered by not using it. JAX has its own, which these variables do not touch.
    """
    for name, value in {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}.items():
        os.environ.setdefault(name, value)


def silence_libtpu() -> None:
    """Keeps libtpu, where it is installed without a TPU, from telling that it finds none; before a device is used."""
    from jax._src import hardware_utils  # what JAX itself decides by whether there is a TPU

    if hardware_utils.num_available_tpu_chips_and_device_id()[0] == 0:
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")


def silence_native_output() -> None:
    """Sends nowhere what is not Python's own on standard output: Gloo tells there which ranks it has connected."""
    if sys.stdout is not sys.__stdout__:  # of a notebook or a test
        return
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = own
