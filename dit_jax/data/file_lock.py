"""One process at a time, on one machine or a shared disk: an advisory lock that ends with the process that holds it."""

import contextlib
import fcntl
import pathlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def file_lock(path: pathlib.Path, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Yields whether this process holds the lock, which is let go afterwards; the file itself stays.

    Args:
      path: the lock's file, empty; made with its folder if it is not there.
      wait: until the holder lets go or is killed; otherwise yields False at once where another process holds it.
      on_wait: called before waiting.

    Raises:
      OSError: where the file cannot be made, or its disk has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            if on_wait is not None:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True
