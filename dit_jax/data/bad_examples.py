"""Examples that cannot be read: another one stands in for each, always the same; too many of them are an error.

Which one stands in is a function of the example's position and the size of the data set. So it depends neither on the
process that meets it, nor on when, nor on whether the images or their latents are read.
"""

import threading

import numpy as np

MIN_SEEN = 1000  # of fewer examples (or of all, if these are fewer), one that is bad says nothing about their share
STAND_IN_STREAM = 2  # beside those of `data.pipeline`


class BadExamples:
    """The bad examples that this process has met in a data set, by their positions; threads may share it.

    Args:
      name: of the data set, for people; size: its number of examples.
      max_share: of the examples seen; where more are bad, that is an error (`config.data.max_bad_share`).
    """

    def __init__(self, name: str, size: int, max_share: float):
        self._name, self._size, self._max_share = name, size, max_share
        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}
        self._untold: list[str] = []

    def __len__(self) -> int:
        return len(self._reasons)

    def reader(self, index: int) -> int:
        """Returns the example to read for the one at `index`: itself, or the first stand-in not known to be bad.

        Raises:
          ValueError: where all that was tried is bad.
        """
        if index not in self._reasons:
            return index
        for attempt in range(100):
            stand_in = int(np.random.default_rng((STAND_IN_STREAM, index, attempt)).integers(self._size))
            if stand_in not in self._reasons:
                return stand_in
        raise ValueError(f"{self._name}: no example can be read: {self._reasons[index]}")

    def add(self, index: int, reason: str, num_seen: int) -> None:
        """Takes note of a bad example, once.

        Args:
          index: its position; reason: one line; num_seen: how many different examples were read so far, about.

        Raises:
          ValueError: where these are too many.
        """
        with self._lock:
            if index in self._reasons:
                return
            self._reasons[index] = reason
            self._untold.append(f"example {index} of {self._name} is left out, another stands in for it: {reason}")
            num_seen = max(min(num_seen, self._size), min(MIN_SEEN, self._size))
            if len(self._reasons) > self._max_share * num_seen:
                raise ValueError(
                    f"{len(self._reasons)} of {num_seen:,} examples of {self._name} cannot be read, more than "
                    f"config.data.max_bad_share={self._max_share:g}; the last, {index}: {reason}; mend them or raise it"
                )

    def news(self) -> list[str]:
        """Returns a line about each bad example that no call has told yet."""
        if not self._untold:
            return []
        with self._lock:
            untold, self._untold = self._untold, []
        return sorted(untold)
