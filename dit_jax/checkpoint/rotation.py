"""Which checkpoints are kept."""

from collections.abc import Mapping

import numpy as np


def steps_to_keep(
    steps: list[int],
    last: int,
    every: int | None = None,
    best: tuple[str, str] | None = None,
    metrics: Mapping[int, Mapping[str, float] | None] | None = None,
) -> set[int]:
    """Returns the steps whose checkpoints stay: the newest ones, those on a grid and the best one.

    Args:
      steps: of all good checkpoints, ascending; last: how many of the newest stay.
      every: steps that this divides stay; None: no grid.
      best: name of a metric, and "min" or "max"; the best step stays, the newest of equals; None: none for that.
      metrics: held-out figures by step; a step without a finite one is not the best.
    """
    keep = set(steps[max(0, len(steps) - last) :])
    keep |= {step for step in steps if every and step % every == 0}
    if best:
        name, mode = best
        sign = {"min": -1, "max": 1}[mode]
        figures = {step: ((metrics or {}).get(step) or {}).get(name, np.nan) for step in steps}
        known = [step for step in steps if np.isfinite(figures[step])]
        keep |= {max(known, key=lambda step: (sign * figures[step], step))} if known else set()
    return keep
