"""Seeds of many random streams from one, such that no two streams are the same."""

from __future__ import annotations

from typing import Final

import numpy as np

RUNNERS: Final = 1
"""Key of the seeds that RLlib counts its env runners from."""
BELIEF: Final = 2
"""Key of a belief's draws, beside an environment of the same seed."""
LOOK: Final = 3
"""Key of the times at which evaluations look at beliefs."""


def derived_seeds(seed: int, n: int, *key: int) -> list[int]:
    """``n`` seeds of 31 bits from ``seed``; another ``key`` gives others (``numpy.random.SeedSequence``).

    Neighbouring seeds share none of theirs but by chance, which seed + 1, seed + 2, ... would all.
    """
    words = np.random.SeedSequence(seed % 2**64, spawn_key=key).generate_state(n)
    return [int(word >> 1) for word in words]  # RLlib adds a runner's index, and must not leave 32 bits


def derived_seed(seed: int, *key: int) -> int:
    """The first of ``derived_seeds``."""
    return derived_seeds(seed, 1, *key)[0]
