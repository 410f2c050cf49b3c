"""DiT's position table by a loop over positions."""

import numpy as np


def position_table(rows, width):
    """Returns [rows * rows, width] float64: column, then row; sines, then cosines."""
    omega = 1.0 / 10_000 ** (np.arange(width // 4) / (width / 4.0))
    return np.array(
        [
            np.concatenate([f(position * omega) for position in (column, row) for f in (np.sin, np.cos)])
            for row in range(rows)
            for column in range(rows)
        ]
    )
