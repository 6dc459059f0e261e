"""The learning rate over a run, as a share of its peak."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "linear"]


def rate_scale(update: int, schedule: Schedule, *, warmup: int, updates: int) -> float:
    """Factor of the learning rates at optimiser step ``update`` (from 0) of ``updates``.

    Linear warm-up over the first ``warmup`` steps, 1 at the last of them; then 1, or with p the share of the other steps that is
    done, (1 + cos(pi p)) / 2 (Loshchilov and Hutter 2017, without restarts), or 1 - p. The last step is a little above 0; past it, 0.
    """
    if update < warmup:
        return (update + 1) / warmup
    done = min(1.0, (update - warmup) / max(updates - warmup, 1))
    if schedule == "constant":
        return 1.0
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
